"""The small files of a model folder that a compiled checkpoint keeps: tokenizer, templates, remote code, licences."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection
from pathlib import Path

from qcompiler.checkpoints.quantized import DESCRIPTIONS

# Weights in any format, indices of weights, hidden files; and files that describe the uncompiled weights, or weights
# compiled by another tool: loaders take some of them for the truth.
_LEFT_OUT = re.compile(
    r"\..*"
    r"|.*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|tflite|ot|mlmodel|npz|npy|pkl|tar|gz|zip)"
    r"|.*\.index\.json"
    r"|(config|params|adapter_config)\.json|recipe\.yaml|README\.md|" + "|".join(map(re.escape, DESCRIPTIONS)),
    re.IGNORECASE,
)
_IN_SUBFOLDERS = ("additional_chat_templates/*.jinja", "**/*.py")


def copy_companions(source: Path, dest: Path, *, without: Collection[str] = ()) -> list[Path]:
    """Copy a model folder's small files, links followed, and return the copies.

    Copied: the folder's own files, its chat templates and every Python module below it. Left out: hidden files, names
    in `without`, config.json (the compiler writes its own), weights and their indices, the model card and
    descriptions of another quantization.
    """
    found = [path for path in source.iterdir() if not _LEFT_OUT.fullmatch(path.name)]
    found += [path for pattern in _IN_SUBFOLDERS for path in source.glob(pattern)]
    copies: list[Path] = []
    for path in sorted(set(found)):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or str(name) in without or not path.is_file():
            continue
        copy = dest / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copies.append(copy)
    return copies
