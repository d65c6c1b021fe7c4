"""Two checkpoints of one dense model by one measure: output errors per linear, and KL divergence.

    python tools/bench/fidelity.py DENSE OURS THEIRS [--tokens 32x256 | --text FILE]

Output errors are ||(W - Q) X||^2 / ||W X||^2, of linears whose inputs no transform rescaled: with the dense model's own
inputs X, and with those that the two checkpoints see when they are served, half of X from each. The 95% interval of the
difference of KL divergences is a paired bootstrap over sequences.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp
from pathlib import Path
from statistics import mean

import torch
from token_rows import token_rows
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

_DRAWS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("ours", type=Path)
    parser.add_argument("theirs", type=Path)
    parser.add_argument("--tokens", default="32x256")
    parser.add_argument("--text", type=Path, help="evaluate on this text in place of random tokens")
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    rows = _rows(options)
    dense = load(options.dense)
    models = {"ours": load(options.ours), "theirs": load(options.theirs)}
    if not any(_rescaled(dense, model) for model in models.values()):
        _tell_errors("dense inputs", dense, models, _hessians([dense], rows))
        _tell_errors("served inputs", dense, models, _hessians(models.values(), rows))
    divergences = {name: torch.tensor(_divergences(dense, model, rows)) for name, model in models.items()}
    difference = divergences["ours"] - divergences["theirs"]
    generator = torch.Generator().manual_seed(0)
    drawn = difference[torch.randint(0, len(difference), (_DRAWS, len(difference)), generator=generator)].mean(1)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    means = {name: float(values.mean()) for name, values in divergences.items()}
    print(
        f"  KL to dense: ours {means['ours']:.5f}, theirs {means['theirs']:.5f}, "
        f"difference {float(difference.mean()):+.5f}, 95% interval {low:+.5f} to {high:+.5f}",
        flush=True,
    )


def _tell_errors(
    inputs: str, dense: PreTrainedModel, models: Mapping[str, PreTrainedModel], hessians: Mapping[str, Tensor]
) -> None:
    errors = {name: _errors(dense, model, hessians) for name, model in models.items()}
    shared = [path for path in errors["ours"] if path in errors["theirs"]]
    ours, theirs = (mean(errors[name][path] for path in shared) for name in models)
    worst = max(shared, key=lambda path: errors["ours"][path] / max(errors["theirs"][path], 1e-30))
    ratio = errors["ours"][worst] / max(errors["theirs"][worst], 1e-30)
    print(
        f"  output error over {len(shared)} linears, {inputs}: ours {ours:.4e}, theirs {theirs:.4e}, "
        f"ratio {ours / theirs:.4f}, largest {ratio:.4f} ({worst})"
    )


def _rows(options: argparse.Namespace) -> list[list[int]]:
    if options.text is None:
        return token_rows(options.tokens, vocabulary=1000)
    ids = AutoTokenizer.from_pretrained(options.dense)(options.text.read_text(encoding="utf-8"))["input_ids"]
    return [ids[start : start + options.length] for start in range(0, len(ids) - options.length + 1, options.length)]


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts on some rows: perplexity, log-probabilities, and their mean KL divergence from others."""

    perplexity: float
    logits: list[Tensor]
    divergence: float


def predictions(model: PreTrainedModel, rows: list[list[int]], against: list[Tensor] | None = None) -> Predictions:
    """Run a model over rows; `against` are the dense model's log-probabilities [S, V] of each."""
    kept: list[Tensor] = []
    losses, divergences = [], []
    with torch.no_grad():
        for index, row in enumerate(rows):
            found = functional.log_softmax(model(torch.tensor([row])).logits[0].float(), -1)
            losses.append(float(functional.nll_loss(found[:-1], torch.tensor(row[1:]))))
            if against is None:
                kept.append(found)
            else:
                total = functional.kl_div(found, against[index], log_target=True, reduction="sum")
                divergences.append(float(total) / len(row))
    return Predictions(exp(mean(losses)), kept, mean(divergences) if divergences else 0.0)


def load(folder: Path) -> PreTrainedModel:
    """A model in evaluation, decompressed."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        model.eval()(torch.tensor([[0]]))  # what is compressed is decompressed when it first runs
    return model.requires_grad_(False)


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _hessians(models: Iterable[nn.Module], rows: list[list[int]]) -> dict[str, Tensor]:
    """X^T X over the inputs of each linear, summed over the models."""
    found: dict[str, Tensor] = {}
    for model in models:
        handles = []
        for path, module in _linears(model).items():

            def collect(_: nn.Module, inputs: tuple[Tensor, ...], path: str = path) -> None:
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
                found[path] = found[path].addmm_(x.t(), x) if path in found else x.t() @ x

            handles.append(module.register_forward_pre_hook(collect))
        with torch.no_grad():
            for row in rows:
                model(torch.tensor([row]))
        for handle in handles:
            handle.remove()
    return found


def _errors(dense: nn.Module, model: nn.Module, hessians: Mapping[str, Tensor]) -> dict[str, float]:
    """By path, of linears that are quantized."""
    found: dict[str, float] = {}
    solved = _linears(model)
    for path, module in _linears(dense).items():
        weight, rounded = module.weight.double(), solved[path].weight.double()
        if torch.equal(weight, rounded):
            continue
        hessian = hessians[path].double()
        difference = weight - rounded
        found[path] = float(((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum())
    return found


def _rescaled(dense: nn.Module, model: nn.Module) -> bool:
    norms = {name: value for name, value in dense.named_parameters() if value.dim() == 1}
    others = dict(model.named_parameters())
    return any(name in others and not torch.equal(value, others[name]) for name, value in norms.items())


def _divergences(dense: nn.Module, model: nn.Module, rows: list[list[int]]) -> list[float]:
    """KL(dense || model) per sequence, in nats per token."""
    found: list[float] = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            wanted, given = (functional.log_softmax(m(ids).logits[0].float(), -1) for m in (dense, model))
            found.append(float(functional.kl_div(given, wanted, log_target=True, reduction="sum")) / len(row))
    return found


if __name__ == "__main__":
    main()
