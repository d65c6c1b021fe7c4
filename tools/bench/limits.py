"""Where the time of a compilation goes, and how far each part is from this machine's matrix products.

    python tools/bench/limits.py --models DIR [--model FOLDER] [--recipe int4-int8] [--tokens 32x256]

The limit of a part is its products (2 m n k operations each; Hessians and quadratic forms count half, being symmetric)
at the rate of large products on as many threads: in the model's dtype for the forward runs and the reported errors, in
float32 for the rest. What attention, norms and activations cost has no limit here: it is part of what is above it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from measure import run
from solvers import HERE, MODELS, random_model

from qcompiler.compiler import plan
from qcompiler.ir.annotations import HessianObserver, Leaf, get, get_quant, need, observed
from qcompiler.ir.fx import Node, ancestors
from qcompiler.ir.graph import Graph, Partition
from qcompiler.ir.partition import partitions
from qcompiler.runtime.segments import segments

NARROW = ("forward: collect", "forward: propagate", "solve: measure")
"""What multiplies in the model's dtype."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="where random models and outputs are kept")
    parser.add_argument("--model", type=Path, action="append", help="a model folder in place of the random ones")
    parser.add_argument("--recipe", default="int4-int8")
    parser.add_argument("--tokens", nargs="+", default=["32x256", "64x512"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wide = rate(torch.float32)
    recipe = HERE / "recipes" / f"{options.recipe}.yaml"
    for folder in options.model or [random_model(options.models / name) for name in MODELS]:
        graph = plan(folder, recipe).graph
        narrow = rate(graph.model.dtype)
        print(f"{options.threads} threads: {wide / 1e9:.0f} GFLOP/s float32, {narrow / 1e9:.0f} {graph.model.dtype}")
        for tokens in options.tokens:
            samples, length = map(int, tokens.split("x"))
            work = operations(graph, samples * length)
            arguments = ("compile", str(folder), str(recipe), str(options.models / "out-ours"), tokens)
            found = run(Path(sys.executable), HERE / "job_ours.py", *arguments, threads=options.threads)
            print(f"{folder.name}, {options.recipe}, {tokens} tokens: {found.seconds:.2f} s")
            _table(found.seconds, found.values, {n: w / (narrow if n in NARROW else wide) for n, w in work.items()})


def rate(dtype: torch.dtype) -> float:
    """Operations per second of a product of [1024, 2048] by [2048, 2048]: the best of ten."""
    a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 * 2048 * 2048 / best


def operations(graph: Graph, tokens: int) -> Counter[str]:
    """Of a pipeline's one sweep, by the part of its time. As the executor runs them: see `qcompiler/runtime`."""
    work: Counter[str] = Counter()
    rounded = {leaf.path for node, leaf in graph.linears() if (quant := get_quant(node)) and quant.scheme}
    order: list[tuple[Partition, set[Node]]] = []
    for part in partitions(graph):
        observers = {node: found for node in part.nodes if (found := observed(node)) is not None}
        parts = segments(part, observers, rounded.__contains__) if observers else (part,)
        order += [(one, observers.keys() & set(one.nodes)) for one in parts]
    last = max(index for index, (_, nodes) in enumerate(order) if nodes)
    for index, (part, nodes) in enumerate(order):
        needed = ancestors(nodes)
        for node in filter(_is_linear, part.nodes):
            products = 2 * tokens * need(node, Leaf).parameters
            work["forward: collect"] += products if node in needed else 0
            work["forward: propagate"] += products if index < last else 0
    hessians = {o for _, nodes in order for node in nodes if isinstance(o := observed(node), HessianObserver)}
    linears = {leaf.path: (leaf, get_quant(node)) for node, leaf in graph.linears()}
    for observer in hessians:
        columns = linears[observer.consumers[0]][0].in_features
        work["observe"] += tokens * columns**2
        work["solve: factor"] += columns**3 // 3
    for leaf, quant in linears.values():
        if quant is not None and quant.options is not None:
            work["solve: columns"] += leaf.out_features * leaf.in_features**2
            work["solve: measure"] += 2 * leaf.out_features * leaf.in_features**2
    return work


def _is_linear(node: Node) -> bool:
    leaf = get(node, Leaf)
    return leaf is not None and leaf.is_linear


def _table(seconds: float, parts: Mapping[str, float], limits: Mapping[str, float]) -> None:
    times = {name: spent for name, spent in parts.items() if name != "bytes"}
    print(f"  {'':<22} {'seconds':>8} {'share':>6} {'limit':>8} {'of limit':>9}")
    for name, spent in sorted(times.items(), key=lambda item: -item[1]):
        if spent < 0.005 * seconds:
            continue
        limit = f"{limits[name]:8.2f} {limits[name] / spent:9.0%}" if name in limits else ""
        print(f"  {name:<22} {spent:8.2f} {spent / seconds:6.0%} {limit}")
    rest = seconds - sum(spent for name, spent in times.items() if not name.startswith("solve: "))
    print(f"  {'the rest':<22} {rest:8.2f} {rest / seconds:6.0%}")
    total = sum(limits.values())
    print(f"  {'all products':<22} {'':>8} {'':>6} {total:8.2f} {total / seconds:9.0%}", flush=True)


if __name__ == "__main__":
    main()
