"""How far a quantized model is from the dense one, and how well it predicts a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qcompiler.data import TokenBatch


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model against the dense one, over every predicted token of a text.

    KL divergences are in nats, of the model's next-token distribution from the dense one, D(dense || model). `top1` is
    the share of tokens whose likeliest successor is the same. `perplexity` is the dense model's.
    """

    kl_mean: float
    kl_median: float
    kl_99: float
    kl_max: float
    top1: float
    perplexity: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """What a text says of a model. `perplexity` is exp of the mean negative log-likelihood (nats) of its tokens."""

    tokens: int
    perplexity: float
    against: Divergence | None

    def __str__(self) -> str:
        if self.against is None:
            return f"perplexity {self.perplexity:.4f} over {self.tokens} tokens"
        a = self.against
        return (
            f"perplexity {self.perplexity:.4f} against {a.perplexity:.4f} dense "
            f"({100 * (self.perplexity / a.perplexity - 1):+.2f}%)\n"
            f"KL divergence: mean {a.kl_mean:.5f}, median {a.kl_median:.5f}, 99% {a.kl_99:.5f}, max {a.kl_max:.5f} "
            f"nats over {self.tokens} tokens\n"
            f"top-1 agreement {100 * a.top1:.2f}%"
        )


def run_model(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """The logits [B, S, V] of one batch, on the CPU."""
    with torch.no_grad():
        result: Tensor = model(input_ids=batch.input_ids.to(model.device), use_cache=False).logits
    return result.cpu()


def measure(model: PreTrainedModel, dense: PreTrainedModel | None, batches: Iterable[TokenBatch]) -> Fidelity:
    """Run both models over batches of full windows. A window's first token is predicted by nothing, and not counted."""
    kl: list[Tensor] = []
    agree: list[Tensor] = []
    losses: list[Tensor] = []
    dense_losses: list[Tensor] = []
    for batch in batches:
        labels = batch.input_ids[:, 1:, None]
        got = _log_probabilities(model, batch)
        losses.append(-got.gather(-1, labels).flatten())
        if dense is not None:
            wanted = _log_probabilities(dense, batch)
            dense_losses.append(-wanted.gather(-1, labels).flatten())
            kl.append((wanted.exp() * (wanted - got)).sum(-1).flatten())
            agree.append((wanted.argmax(-1) == got.argmax(-1)).flatten())
    against = _divergence(torch.cat(kl), torch.cat(agree), torch.cat(dense_losses)) if dense is not None else None
    return Fidelity(sum(map(len, losses)), _perplexity(torch.cat(losses)), against)


def _log_probabilities(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    return torch.log_softmax(run_model(model, batch)[:, :-1].float(), -1)


def _divergence(kl: Tensor, agree: Tensor, losses: Tensor) -> Divergence:
    ordered = kl.clamp_min(0).sort().values  # rounding makes the divergence of equals slightly negative
    return Divergence(
        kl_mean=float(ordered.double().mean()),
        kl_median=float(ordered[(len(ordered) - 1) // 2]),
        kl_99=float(ordered[int(0.99 * (len(ordered) - 1))]),
        kl_max=float(ordered[-1]),
        top1=float(agree.double().mean()),
        perplexity=_perplexity(losses),
    )


def _perplexity(losses: Tensor) -> float:
    return float(losses.double().mean().exp())
