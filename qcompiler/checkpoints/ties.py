"""Tied parameters (one tensor, several paths) and paths that no checkpoint holds, by Transformers' rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from qcompiler.checkpoints.conversions import Conversion


@dataclass(frozen=True, slots=True)
class Ties:
    """What ties mean for a checkpoint, by path.

    aliases: tied paths that are not written, each with the path that is. stand_ins: paths that no file holds, each with
    the path whose value they take. apart: paths that the model ties, and that the checkpoint holds with other values
    than the path that each is given with.
    """

    aliases: Mapping[str, str]
    stand_ins: Mapping[str, str]
    apart: Mapping[str, str]


def tie_classes(model: PreTrainedModel) -> list[list[str]]:
    """Sets of paths that the model ties; the first of each is the one that `save_pretrained` keeps."""
    targets: Mapping[str, str] = model.all_tied_weights_keys
    classes: dict[int | str, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for path in state:
        root = path
        while root in targets:
            root = targets[root]
        # One tensor object under two names is tied too (modules shared by custom code).
        classes.setdefault(id(state[root]) if root in state else root, []).append(path)
    return [sorted(paths, key=lambda path: path in targets) for paths in classes.values() if len(paths) > 1]


def resolve_ties(
    classes: Sequence[Sequence[str]],
    reads: Mapping[str, Conversion],
    same: Callable[[Conversion, Conversion], bool],
) -> Ties:
    """Decide what ties mean for a checkpoint that holds the paths in `reads`.

    As in `PreTrainedModel.tie_weights`, paths that a checkpoint holds with *different* values are not tied after all.
    """
    aliases: dict[str, str] = {}
    stand_ins: dict[str, str] = {}
    apart: dict[str, str] = {}
    for paths in classes:
        held = [path for path in paths if path in reads]
        if not held:
            continue
        stand_ins |= {path: held[0] for path in paths if path not in reads}
        apart |= {path: held[0] for path in held[1:] if not same(reads[held[0]], reads[path])}
        aliases |= {path: paths[0] for path in paths[1:] if path not in apart}
    return Ties(aliases, stand_ins, apart)


def not_by_design(
    model: PreTrainedModel, missing: Iterable[str], unused: Iterable[str]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Missing paths that the model's class does not declare as not stored, and unused keys that it does not expect."""
    unused = tuple(unused)
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unused),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return frozenset(info.missing_keys), tuple(key for key in unused if key in info.unexpected_keys)
