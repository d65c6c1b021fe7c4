"""Move a scale from a producer to its consumers, in their weights."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Protocol

import torch
from torch import Tensor

from qcompiler.transforms.norms import Gain, divided


class Foldable(Protocol):
    """What says where a scale moves: see `qcompiler.patterns.rescaling.RescaleSite`, which is one."""

    @property
    def id(self) -> str: ...

    @property
    def channels(self) -> Tensor: ...

    @property
    def gains(self) -> tuple[Gain, ...]: ...

    @property
    def weights(self) -> tuple[str, ...]: ...


def fold(site: Foldable, scale: Tensor, weights: MutableMapping[str, Tensor]) -> None:
    """Divide the features of the site's tensor by `scale` float32 [I], and multiply the consumers' columns by it.

    `weights` holds the parameters of producer and consumers by path; they are replaced, not written to. Each is
    computed in float32 (float64 where it has that dtype) and rounded once to its dtype. Raises `ValueError` for a scale
    of the wrong shape, one that is not positive and finite, or one that differs between features that share a channel.
    """
    features = site.channels.numel()
    if scale.shape != (features,):
        raise ValueError(f"{site.id}: a scale of shape {tuple(scale.shape)} for {features} features")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{site.id}: scales must be positive and finite")
    channels = site.channels.to(scale.device)
    for gain in site.gains:
        parameter = weights[gain.name]
        rows = torch.ones(parameter.shape[0], dtype=scale.dtype, device=scale.device)
        rows[channels] = scale
        if not torch.equal(rows[channels], scale):
            raise ValueError(f"{site.id}: features that grow with one channel of {gain.name} have different scales")
        weights[gain.name] = divided(parameter, rows, gain.offset).to(parameter.dtype)
    for name in site.weights:
        weights[name] = rescaled(weights[name], scale)


def rescaled(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight [O, I] once its producer gave it `scale` [I]: in float32 at least, rounded once to its dtype."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return (wide * scale.to(wide)).to(weight.dtype)
