"""Where rows come from. Only formats that hold data, never code, are read, and nothing is copied: tables are streamed
or memory-mapped, row by row.

`datasets` takes a third of a second to import: it is imported where a dataset is named, and not by who brings rows.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

from qcompiler.errors import DataError, did_you_mean

TEXT_SUFFIX = ".txt"
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
FORMATS = f"{TEXT_SUFFIX}, {', '.join(BUILDERS)}"
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words by which file names tell their split, as the hub reads them."""
SHUFFLE_BUFFER = 10_000
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, slots=True)
class Source:
    """Rows to be read once: strings, mappings or token ids. `documents` says that each row is a whole text file."""

    name: str
    rows: Iterable[Any]
    documents: bool = False


@contextmanager
def open_source(
    dataset: str | Path | None,
    rows: Iterable[Any] | None,
    *,
    config_name: str | None,
    split: str | None,
    usual_split: str,
) -> Iterator[Source]:
    """The rows of `dataset` (see `CalibrationSpec`) or `rows`, exactly one of which is given.

    Where there are splits and none is asked for, `usual_split` is read. What `datasets` writes while it streams goes
    to a temporary folder that lives as long as this context. Raises `DataError`, also while the rows are read.
    """
    if (dataset is None) == (rows is None):
        raise DataError(
            "no data" if rows is None else "both a dataset and rows", hint="give a dataset, or rows, not both"
        )
    name = "rows" if dataset is None else str(dataset)
    if not name.strip():  # as a path it would mean this folder
        raise DataError("the name of the dataset is empty", hint="give a file, a folder, or a hub id")
    path = Path(name).expanduser()
    if config_name is not None and (rows is not None or path.exists()):
        raise DataError(
            f"{name} has no configurations, but {config_name!r} was asked for",
            hint="config_name belongs to hub datasets: leave it out",
        )
    with tempfile.TemporaryDirectory(prefix="qcompiler-data-") as cache, _quiet(named=rows is None):
        if rows is not None:
            yield _from_python(rows, split, usual_split)
        elif path.is_file():
            yield _from_files(name, [path], split, cache)
        elif path.is_dir() and any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
            import datasets

            saved = _loaded(name, lambda: datasets.load_from_disk(str(path)))
            yield Source(name, _pick_split(name, saved, split, usual_split))
        elif path.is_dir():
            yield _from_files(name, _files_of_split(path, split, usual_split), None, cache)
        elif path.exists():
            raise DataError(
                f"{name} is neither a file nor a folder", hint="write what a pipe or a device gives into a file first"
            )
        else:
            yield _from_hub(name, config_name, split or usual_split, cache)


def in_order(rows: Iterable[Any], seed: int | None) -> Iterator[tuple[int, Any]]:
    """`(row number, row)` in an order drawn from `seed`, or as they come if it is `None`.

    What has a length and an index is permuted, and only the rows taken are read. Anything else passes through a
    buffer of `SHUFFLE_BUFFER` rows, from which each is drawn at random.
    """
    if seed is None:
        yield from enumerate(rows)
        return
    rng = Random(seed)
    table: Any = rows
    if hasattr(table, "__len__") and hasattr(table, "__getitem__"):
        for index in _permutation(len(table), rng):
            yield index, table[index]
        return
    buffer: list[tuple[int, Any]] = []
    for numbered in enumerate(rows):
        if len(buffer) < SHUFFLE_BUFFER:
            buffer.append(numbered)
            continue
        drawn = rng.randrange(SHUFFLE_BUFFER)
        yield buffer[drawn]
        buffer[drawn] = numbered
    rng.shuffle(buffer)
    yield from buffer


def _permutation(count: int, rng: Random) -> Iterator[int]:
    """Fisher-Yates that keeps only the entries it has moved: the first k of n cost k, not n."""
    moved: dict[int, int] = {}
    for position in range(count):
        drawn = rng.randrange(position, count)
        yield moved.get(drawn, drawn)
        moved[drawn] = moved.pop(position, position)


@contextmanager
def _quiet(*, named: bool) -> Iterator[None]:
    """No progress bars and no log lines from `datasets` inside: what it logs it raises too. Outside, as they were."""
    if not named and "datasets" not in sys.modules:
        yield
        return
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _from_python(rows: Iterable[Any], split: str | None, usual_split: str) -> Source:
    if isinstance(rows, str | bytes | Path):
        raise DataError("rows is one string", hint="a path goes into `dataset`; texts are a list of strings")
    if _has_splits(rows):
        return Source("rows", _pick_split("rows", rows, split, usual_split))
    if split is not None:
        raise DataError(
            f"rows have no splits, but split {split!r} was asked for", hint="hand over the rows of that split"
        )
    if isinstance(rows, Mapping):
        raise DataError(f"rows is one mapping ({', '.join(map(str, rows))})", hint="hand over a list of such mappings")
    return Source("rows", rows)


def _from_files(name: str, files: Sequence[Path], split: str | None, cache: str) -> Source:
    if split is not None:
        raise DataError(
            f"{name} is one file, without splits, but split {split!r} was asked for", hint="leave split out"
        )
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {TEXT_SUFFIX}:
        return Source(name, [_read_text(file) for file in files], documents=True)
    builders = {BUILDERS.get(suffix) for suffix in suffixes}
    if None in builders:
        raise DataError(f"{name} is of no format that can be read", hint=f"formats: {FORMATS}")
    if len(builders) > 1:
        raise DataError(f"{name} mixes {', '.join(sorted(suffixes))} files", hint="name one file, or keep one format")
    paths = [str(file.resolve()) for file in files if file.stat().st_size > 0]
    if not paths:
        raise DataError(f"{name} is empty", hint="give a file that has rows; check how the file was written")
    builder = builders.pop()

    def stream() -> Any:
        import datasets

        return datasets.load_dataset(builder, data_files=paths, split="train", streaming=True, cache_dir=cache)

    return Source(name, _guarded(name, _loaded(name, stream)))


def _files_of_split(folder: Path, split: str | None, usual_split: str) -> list[Path]:
    """The data files in `folder` and below; of one split only, where their names tell splits apart."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix.lower() in (TEXT_SUFFIX, *BUILDERS))
    if not files:
        raise DataError(f"{folder} holds no data file", hint=f"formats: {FORMATS}")
    names = SPLIT_NAMES if split is None else SPLIT_NAMES | {split: SPLIT_NAMES.get(split, (split.lower(),))}
    of_split = {
        name: [file for file in files if _has_word(str(file.relative_to(folder)).lower(), spellings)]
        for name, spellings in names.items()
    }
    present = sorted(name for name, members in of_split.items() if members)
    wanted = split or (usual_split if present else None)
    if wanted is None:
        return files
    if not of_split[wanted]:
        raise DataError(
            f"{folder} has no file of split {wanted!r}",
            hint=f"splits in its file names: {', '.join(present) or 'none'}",
        )
    return of_split[wanted]


def _has_word(path: str, words: Iterable[str]) -> bool:
    return any(re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", path) for word in words)


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start})", hint="convert it to UTF-8") from error


def _from_hub(name: str, config_name: str | None, split: str, cache: str) -> Source:
    if not _HUB_ID.fullmatch(name) or Path(name).suffix.lower() in (TEXT_SUFFIX, *BUILDERS):
        # Bare names are refused on purpose: `datasets` takes some of them ("text", "json") for the files around it.
        raise DataError(
            f"there is no file or folder {name!r}", hint="check the path; a hub dataset is named owner/name"
        )

    def stream() -> Any:
        import datasets

        return datasets.load_dataset(name, config_name, split=split, streaming=True, cache_dir=cache)

    origin = f"dataset {name!r} of the Hugging Face hub"
    hint = "check id, config_name, split and the network; or download it and give the local path"
    return Source(name, _guarded(origin, _loaded(origin, stream, hint), hint))


def _has_splits(rows: Any) -> bool:
    datasets = sys.modules.get("datasets")  # where nobody imported it, this is none of its objects
    return datasets is not None and isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict)


def _pick_split(name: str, loaded: Any, split: str | None, usual_split: str) -> Any:
    if not _has_splits(loaded):
        if split is not None:
            raise DataError(f"{name} has no splits, but split {split!r} was asked for", hint="leave split out")
        return loaded
    wanted = split or (usual_split if len(loaded) > 1 else next(iter(loaded), usual_split))
    if wanted not in loaded:
        raise DataError(
            f"{name} has no split {wanted!r}{did_you_mean(wanted, loaded)}",
            hint=f"splits: {', '.join(loaded) or 'none'}",
        )
    return loaded[wanted]


def _loaded(name: str, load: Any, hint: str = "check that the file is whole and of the format its name says") -> Any:
    try:
        return load()
    except Exception as error:
        _refuse(name, error, hint)


def _guarded(
    name: str, rows: Iterable[Any], hint: str = "check that the file is whole, and that its rows are of one form"
) -> Iterator[Any]:
    """The rows, with what `datasets` raises while it streams (of many kinds) turned into a `DataError`."""
    try:
        yield from rows
    except Exception as error:
        _refuse(name, error, hint)


def _refuse(name: str, error: Exception, hint: str) -> NoReturn:
    reason = next(iter(str(error).splitlines()), "")
    raise DataError(f"{name} cannot be read: {type(error).__name__}: {reason}", hint=hint) from error
