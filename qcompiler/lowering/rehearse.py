"""Rehearse, before any weight is read, how Transformers loads what will be written: on meta, by names and shapes."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import LoadStateDictConfig
from transformers.quantizers.auto import get_hf_quantizer
from transformers.utils import logging

from qcompiler.errors import in_brief
from qcompiler.ir.annotations import scheme_of
from qcompiler.ir.graph import Graph
from qcompiler.lowering.predict import written_specs
from qcompiler.lowering.ties import untied
from qcompiler.source import ModelSource
from qcompiler.tensors import Spec

_META = {"": torch.device("meta")}


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What Transformers did. `refused`: why it does not load the checkpoint. `unknown`: why that cannot be said."""

    refused: str | None = None
    unknown: str | None = None


def rehearse(graph: Graph, source: ModelSource, quantization: Mapping[str, Any]) -> Rehearsal:
    """Load the annotated graph's checkpoint in Transformers: every tensor that will be written, without its values.

    It finds what no table of kernels can: a model class that initializes linears by a `weight` that packed ones do not
    have, experts that the quantizer exchanges for others, converters that look for other keys. Where the dense model
    does not pass either, the rehearsal is at fault, and its result is unknown. A forward pass is not rehearsed, but for
    what is known to end one: see `_other_dtype`.
    """
    if (reason := _other_dtype(graph, source.dtype)) is not None:
        return Rehearsal(refused=reason)
    config = copy.deepcopy(source.config)
    if untied(graph, source):
        config.tie_word_embeddings = False  # as it will be written: see `CheckpointStep`
    refused = _obstacle(source, config, _on_meta(written_specs(graph, source)), quantization)
    if refused is None:
        return Rehearsal()
    dense = source.names.dense_specs(source.model.state_dict())
    unknown = _obstacle(source, source.config, _on_meta(dense), None)
    return Rehearsal(refused=refused) if unknown is None else Rehearsal(unknown=unknown)


def _other_dtype(graph: Graph, dtype: torch.dtype) -> str | None:
    """compressed-tensors makes FP4 and MX weights bfloat16, whatever the model computes in: torch multiplies no two."""
    if dtype is torch.bfloat16:
        return None
    for node, leaf in graph.linears():
        scheme = scheme_of(node)
        if scheme is not None and (scheme.weights.is_nvfp4 or scheme.weights.is_mx):
            return (
                f"the model computes in {str(dtype).removeprefix('torch.')}, and the weight of {leaf.path} "
                f"({scheme.weights.short}) becomes bfloat16 there: use --dtype bfloat16 (Python: dtype)"
            )
    return None


def _on_meta(specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (dtype, shape) in specs.items()}


def _obstacle(
    source: ModelSource, config: Any, tensors: dict[str, Tensor], quantization: Mapping[str, Any] | None
) -> str | None:
    """What keeps Transformers from loading `tensors`, in words; None where they are what it looks for."""
    config = copy.deepcopy(config)
    if quantization is not None:
        config.quantization_config = copy.deepcopy(dict(quantization))
    try:
        with _quiet():
            info = _load(type(source.model), config, tensors, source.dtype)
    except Exception as error:  # loading fails in as many ways as there are models
        return in_brief(error)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    return "; ".join(f"{key}: {value[:3]}" for key, value in problems.items()) or None


def _load(cls: type[PreTrainedModel], config: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """The steps of `from_pretrained` on the meta device, for which it would ask for another package (accelerate)."""
    quantizer = None
    if hasattr(config, "quantization_config"):
        quantizer, config, _ = get_hf_quantizer(config, None, _META, True, {})
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
        if quantizer is not None:
            quantizer.preprocess_model(
                model=model, dtype=dtype, device_map=_META, checkpoint_files=None, use_kernels=False
            )
    how = LoadStateDictConfig(
        device_map=_META,
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        hf_quantizer=quantizer,
        weight_mapping=get_model_conversion_mapping(model, None, quantizer),
    )
    info, _ = cls._load_pretrained_model(model, tensors, None, how)
    found: dict[str, Any] = cls._finalize_model_loading(model, how, info).to_dict()
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' progress bars and its table of what it missed: what they say is returned."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
