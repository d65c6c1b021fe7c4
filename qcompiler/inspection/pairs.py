"""What the two words of `--diff` mean: passes of a pipeline, pipelines, or folders and exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qcompiler.errors import ConfigError, did_you_mean
from qcompiler.inspection.document import Document
from qcompiler.inspection.read import Options, read, read_each, read_plans
from qcompiler.pipeline.registry import packaged_pipelines

_SUFFIXES = (".yaml", ".yml")


def read_pair(
    model: str | None, pipeline: str | None, words: tuple[str, str], options: Options
) -> tuple[Document, Document]:
    """The two documents to compare. With a pipeline, words are its passes; else both are pipelines, or both are read.

    Raises `ConfigError` where a word means nothing, or could mean two things.
    """
    if pipeline is not None:
        if model is None:
            raise ConfigError("--diff of two passes needs a MODEL", hint="qcompiler inspect MODEL -p P --diff A B")
        for word in words:
            if Path(word).exists() and ("/" in word or Path(word).suffix):
                raise ConfigError(
                    f"--diff {word}: with --pipeline it compares two of its passes, and this is a file or folder",
                    hint="leave --pipeline out to compare folders, exports or pipelines",
                )
        first, second = read_plans(model, pipeline, words, options=options)
        return first, second
    kinds = [_kinds(word) for word in words]
    common = [kind for kind in kinds[0] if kind in kinds[1]]
    if len(common) > 1:
        raise ConfigError(
            f"--diff {' '.join(words)}: each is the name of a packaged pipeline, and of a folder here",
            hint=f"write ./{words[0]} for the folder; rename it, or change to another folder, for the pipeline",
        )
    if not common:
        said = "; ".join(f"{word} is {' or '.join(found)}" for word, found in zip(words, kinds, strict=True))
        raise ConfigError(
            f"--diff compares two of one kind: {said}", hint="to compare passes, say of which --pipeline they are"
        )
    if common == [_PIPELINE]:
        if model is None:
            raise ConfigError("--diff of two pipelines needs a MODEL", hint="qcompiler inspect MODEL --diff P Q")
        first, second = read_each(model, words, options=options)
        return first, second
    if model is not None:
        raise ConfigError(
            f"--diff {' '.join(words)}: these are read by themselves, and MODEL {model} has no part in it",
            hint="leave MODEL out",
        )
    first, second = (read(word, options=options) for word in words)
    if options.target is None and first.target != second.target:  # judge both by one target
        exported = [found.target for word, found in zip(words, (first, second), strict=True) if Path(word).is_file()]
        target = exported[0] if exported else second.target or first.target
        again = replace(options, target=target)
        first, second = (
            found if target in (None, found.target) or Path(word).is_file() else read(word, options=again)
            for word, found in zip(words, (first, second), strict=True)
        )
    return first, second


_PIPELINE, _READ = "a pipeline", "a folder or an export"


def _kinds(word: str) -> list[str]:
    """What a word can mean. Raises `ConfigError` where that is nothing."""
    path, packaged = Path(word), packaged_pipelines()
    found = [_PIPELINE] if word in packaged or path.suffix in _SUFFIXES else []
    if path.is_dir() or (path.is_file() and path.suffix not in _SUFFIXES):
        found.append(_READ)
    if not found:
        raise ConfigError(
            f"--diff {word}: there is no such folder, file or packaged pipeline{did_you_mean(word, packaged)}",
            hint="to compare passes, say of which --pipeline they are",
        )
    return found
