"""Hold what recipes become to llm-compressor's own reading: the scheme of every linear, and of the KV cache.

    python tools/recipes/compare.py --peer-python PEER/bin/python [--model DIR] [RECIPE...]

PEER is a virtual environment with llmcompressor==0.14.0.1; it reads the recipe and attaches its schemes to a model's
modules, and runs nothing. Without recipes, those of the tests are compared. Where groups overlap, the two differ by
design: the report of a plan says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from qcompiler import plan
from qcompiler.demo import model_path
from qcompiler.emit.schema import kv_cache_dict, scheme_dict
from qcompiler.ir.annotations import get_quant

HERE = Path(__file__).parent
CORPUS = HERE.parent.parent / "tests" / "recipes" / "corpus"
KEYS = ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("recipes", type=Path, nargs="*", default=sorted(CORPUS.glob("*.yaml")))
    options = parser.parse_args()
    job = [options.peer_python, str(HERE / "schemes_of_peer.py"), str(options.model), *map(str, options.recipes)]
    printed = subprocess.run(job, check=True, capture_output=True, text=True).stdout
    peers = json.loads(printed.splitlines()[-1])
    failed = 0
    for recipe in options.recipes:
        if "refused" in peers[str(recipe)]:
            print(f"{recipe.stem:<24} not read by llm-compressor: {peers[str(recipe)]['refused'].splitlines()[1]}")
            continue
        theirs = {path: _brief(scheme) for path, scheme in peers[str(recipe)].items()}
        planned = plan(options.model, recipe, target="transformers")
        differ = _differences(_ours(planned.graph), theirs)
        known = any(note.kind == "warning" and "compressed-tensors takes" in note.text for note in planned.report.notes)
        failed += bool(differ) and not known
        print(f"{recipe.stem:<24} {f'{len(differ)} differ' if differ else 'equal'}{' (as reported)' * known}")
        for line in differ[:4]:
            print(f"  {line}")
    sys.exit(bool(failed))


def _ours(graph: Any) -> dict[str, Any]:
    found = {
        leaf.path: _brief(scheme_dict(quant.scheme))
        for node, leaf in graph.linears()
        if (quant := get_quant(node)) is not None and quant.scheme is not None
    }
    return found | ({"kv_cache": _brief({"weights": kv_cache_dict(graph.kv_cache)})} if graph.kv_cache else {})


def _brief(scheme: dict[str, Any]) -> list[list[Any]]:
    parts = [scheme.get(name) for name in ("weights", "input_activations")]
    return [[part.get(key) for key in KEYS] for part in parts if part]


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    paths = sorted({*ours, *theirs})
    return [f"{p}: {ours.get(p)} here, {theirs.get(p)} there" for p in paths if ours.get(p) != theirs.get(p)]


if __name__ == "__main__":
    main()
