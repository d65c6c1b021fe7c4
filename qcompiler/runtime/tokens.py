"""The tokens that a statistic of a layer's inputs takes in, and what is said where they are no good."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qcompiler.errors import DataError


def real_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """The rows [N, I] of `x` ([B, S, ..., I] or [B * S, I]) where `mask` (bool [B, S]) is true: padding is left out."""
    tokens = x.reshape(-1, x.shape[-1])
    if bool(mask.all()):
        return tokens
    per_token = len(tokens) // mask.numel()  # more than one where a dimension stands between
    return tokens.reshape(mask.numel(), per_token, -1)[mask.flatten().to(x.device)].flatten(0, 1)


def unreached(consumers: Sequence[str], mend: str) -> DataError:
    """No token came by."""
    return DataError(f"no calibration token reached {', '.join(consumers)}: its inputs are unknown", hint=mend)


def not_finite(consumers: Sequence[str]) -> DataError:
    """What came by holds NaN or infinity."""
    return DataError(
        f"NaN or infinite activations enter {', '.join(consumers)} during calibration",
        hint="check the weights and the dtype: float16 overflows where bfloat16 does not",
    )
