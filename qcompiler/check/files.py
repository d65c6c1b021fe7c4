"""Which files of a folder each loader reads, and where in config.json each finds the quantization."""

from __future__ import annotations

from collections.abc import Iterator

from qcompiler.check.checkpoint import PLACE, Checkpoint
from qcompiler.check.findings import ALL, MODEL, Finding
from qcompiler.checkpoints.reader import INDEX_FILE, SINGLE_FILE, read_index
from qcompiler.emit.schema import QUANT_METHOD


def of_folder(opened: Checkpoint) -> Iterator[Finding]:
    """What is wrong with a checkpoint before any layer of it is looked at.

    Raises `CheckpointError` for an index that is none.
    """
    yield from _place(opened)
    yield from _method(opened)
    index, single = opened.folder / INDEX_FILE, opened.folder / SINGLE_FILE
    files = sorted(path.name for path in opened.folder.glob("*.safetensors"))
    if index.exists():
        yield from _indexed(opened, read_index(index), single.exists())
    elif len(files) > 1:
        others = [name for name in files if name != SINGLE_FILE]
        yield Finding.of(
            "file-stray",
            MODEL,
            ("vllm", "sglang"),
            f"there is no index, and {', '.join(others[:4])} beside {SINGLE_FILE}: vLLM and SGLang load every "
            "safetensors file then, and raise for names that they do not know, or take the last tensor of a name",
            "remove the other files, or write an index of those that belong together",
        )


def _indexed(opened: Checkpoint, weight_map: dict[str, str], single: bool) -> Iterator[Finding]:
    named = sorted(set(weight_map.values()))
    if single and named != [SINGLE_FILE]:
        yield Finding.of(
            "files-differ",
            MODEL,
            ("vllm", "sglang"),
            f"there are both {SINGLE_FILE} and an index of {', '.join(named[:4])}: Transformers reads the one (as is "
            "judged here), vLLM and SGLang the others",
            f"remove {SINGLE_FILE}, or the index with its files",
        )
    elif absent := [key for key in opened.reader.tensors if key not in weight_map]:
        message = f"the index lacks {absent[0]} and so {len(absent)} tensors in all, and loaders read them even so"
        yield Finding.of("index-incomplete", MODEL, (), message, "write the index again")


def _place(opened: Checkpoint) -> Iterator[Finding]:
    if opened.place != PLACE:
        yield Finding.of(
            "config-place",
            MODEL,
            ("transformers",),
            f"the quantization stands in {opened.place}, where vLLM finds it, and Transformers does not look for it: "
            "it builds dense linears and leaves them at random",
            f"write it into config.json as {PLACE}",
        )


def _method(opened: Checkpoint) -> Iterator[Finding]:
    method = opened.quantization.get("quant_method")
    if method == QUANT_METHOD or (method is None and opened.place == "compression_config"):
        return
    loaders = ALL if method is None else ("transformers",)
    does = "vLLM builds a dense model, Transformers raises ValueError" if method is None else "Transformers raises"
    message = f"quant_method is {method!r}: {does}"
    yield Finding.of("method-unread", MODEL, loaders, message, f'write "quant_method": "{QUANT_METHOD}"')
