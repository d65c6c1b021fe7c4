"""Non-strict `torch.export` of a model's forward pass, and canonicalization of what comes out.

The exported graph takes `input_ids` [B, S] (B and S symbolic) and returns the logits [B, S, vocabulary]. Sequences are
padded on the right: under a causal mask no real token sees a padded one, so the graph needs no attention mask.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import config as fx_config
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel

from qcompiler.capture.calls import undecorated
from qcompiler.capture.experts import experts_as_one_op
from qcompiler.capture.functional import functionalize
from qcompiler.capture.repeat import NotRepeatableError, Repeats, expand_repeats, layers_of, trace_once
from qcompiler.errors import CaptureError, SizeError, in_brief
from qcompiler.ir.annotations import Scope, annotate
from qcompiler.ir.fx import Node, call_functions, erase_dead, is_op, tensor_arg, value
from qcompiler.limits import MOST_TRACED, check_traced

_ROOT = "model"


class _Logits(nn.Module):
    """What is exported: token ids in, logits out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False, return_dict=True).logits
        return logits


@dataclass(frozen=True, slots=True)
class Exported:
    """A canonical graph whose `get_attr` nodes name the model's parameters and buffers.

    `constants` are tensors that the forward pass made itself. `max_sequence_length` is a bound beyond which the graph
    is not the model any more (a frozen long-context rope), else None. `like` says which layer each layer is a copy of;
    empty where all were traced.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    max_sequence_length: int | None
    like: dict[str, str]


def export(model: PreTrainedModel, *, repeat: bool = True) -> Exported:
    """Export `model` (usually on the meta device).

    `repeat`: trace each kind of layer once, where the model allows it. Raises `CaptureError` with the reason when it
    does not trace, `SizeError` when too many layers would have to be traced one by one.
    """
    if repeat:
        try:
            return _export(model, repeat=True)
        except NotRepeatableError:
            pass  # layers that share state
        except CaptureError:  # a model that does not trace at all, or layers that share state: the plain way tells
            if len(layers_of(model)) > MOST_TRACED:
                raise
    check_traced(len(layers_of(model)), type(model).__name__)
    try:
        return _export(model, repeat=False)
    except CaptureError as error:
        if _reason(error.__cause__) is not None or (failure := _alone(model)) is None:
            raise
        raise CaptureError(
            f"{type(model).__name__} cannot be captured, and fails on sequences of one length too: {failure}",
            hint="run it in Transformers: where that fails too, mend its config; where not, its forward pass has "
            "Python that looks at tensors' values, lengths or types, which qcompiler cannot trace",
        ) from error


def _export(model: PreTrainedModel, *, repeat: bool) -> Exported:
    dynamic = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with fake:
        ids = torch.zeros(2, 8, dtype=torch.long)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        repeats = stack.enter_context(trace_once(model)) if repeat else Repeats()
        stack.enter_context(undecorated(model))
        stack.enter_context(experts_as_one_op(model))
        stack.enter_context(_fake_weights(model, fake))
        window = stack.enter_context(_frozen_rope(model))
        stack.enter_context(_quiet())
        stack.enter_context(_without_stack_traces())
        stack.enter_context(_without_fake_cache())
        try:
            program = torch.export.export(_Logits(model), (ids,), dynamic_shapes=dynamic, strict=False)
        except (NotRepeatableError, SizeError):
            raise
        except Exception as error:  # anything at all can come out of tracing foreign code
            raise CaptureError(
                f"{type(model).__name__} cannot be captured: {_reason(error) or in_brief(error)}",
                hint="qcompiler needs a decoder whose forward pass has no data-dependent or length-dependent Python",
            ) from error
    graph, constants = _with_attributes(program)
    functionalize(graph)
    canonicalize(graph)
    expand_repeats(graph)
    bounds = [bound for bound in (window, _longest(program)) if bound is not None]
    return Exported(graph, constants, min(bounds, default=None), repeats.like)


def _longest(program: ExportedProgram) -> int | None:
    """The longest sequence for which a branch on the length goes the way it went; None where no branch bounds it."""
    (name,) = program.graph_signature.user_inputs
    (node,) = (n for n in program.graph.nodes if n.name == name)
    upper = program.range_constraints[value(node).shape[1].node.expr].upper
    return int(upper) if upper.is_Integer else None


_FIXED = re.compile(r"size\(\)\[([01])\] as dynamic but your code specialized it")
_DIMENSIONS = {"0": "the batch size", "1": "the sequence length"}


def _reason(error: BaseException | None) -> str | None:
    """Why a model does not trace, where tracing itself is the reason."""
    text = str(error)
    if "data-dependent" in text:
        return "its forward pass depends on the values of tensors (a loop over the experts that were chosen does)"
    if fixed := sorted({_DIMENSIONS[index] for index in _FIXED.findall(text)}):
        return f"its forward pass fixes {' and '.join(fixed)} (state-space and recurrent layers do)"
    return None


def _alone(model: PreTrainedModel) -> str | None:
    """How the forward pass of a model that does not trace fails on sequences of one length, run on shapes; None where
    it does not fail, or only for want of values.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), _fake_weights(model, fake), _quiet(), fake:
        try:
            _Logits(model)(torch.zeros(2, 8, dtype=torch.long))
        except Exception as error:  # as many ways as there are models
            return None if type(error).__module__.startswith("torch.") else in_brief(error)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from warning, and from printing the graph that it has so far, when it cannot trace a model."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Spare every traced node the Python stack that led to it: an eighth of the time, and nothing here reads it."""
    settings, name = vars(fx_config), "do_not_emit_stack_traces"  # releases that do not know it trace as they did
    before = settings.get(name, False)
    settings[name] = True
    try:
        yield
    finally:
        settings[name] = before


def _without_fake_cache() -> AbstractContextManager[None]:
    """Spare every traced operation an entry in torch's cache of what operations return.

    Filling it takes a third of the time, and with symbolic sizes hardly any entry is ever used.
    """
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)  # type: ignore[no-any-return]


@contextmanager
def _fake_weights(model: PreTrainedModel, fake: FakeTensorMode) -> Iterator[None]:
    """Trace with tensors that say they lie on the CPU and hold nothing.

    On the meta device itself a constant that the forward pass makes next to its inputs would lose its value.
    """
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    tied: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                if id(tensor) not in tied:
                    meta = tensor.detach().to("meta")
                    hollow = FakeTensor(fake, meta, torch.device("cpu"))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tied[id(tensor)] = nn.Parameter(hollow, requires_grad=False) if is_parameter else hollow
                replaced.append((table, name, tensor))
                table[name] = tied[id(tensor)]
    try:
        yield
    finally:
        for table, name, tensor in replaced:
            table[name] = tensor


@contextmanager
def _frozen_rope(model: PreTrainedModel) -> Iterator[int | None]:
    """Freeze length-dependent rotary embeddings (dynamic NTK, longrope) to their form within the original window.

    Exact up to that window; yields it, so that longer calibration sequences can be refused.
    """
    frozen: list[tuple[nn.Module, Any]] = []
    window: int | None = None
    for module in model.modules():
        rope = getattr(module, "rope_type", None)
        by_layer = rope if isinstance(rope, dict) else {None: rope}
        if not any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in by_layer.values()):
            continue
        frozen.append((module, rope))
        module.rope_type = dict.fromkeys(rope, "default") if isinstance(rope, dict) else "default"
        config = module.config if hasattr(module, "config") else model.config
        original = _original_window(config)
        window = original if window is None else min(window, original)
    try:
        yield window
    finally:
        for module, rope in frozen:
            module.rope_type = rope


def _original_window(config: Any) -> int:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    found = [p["original_max_position_embeddings"] for p in nested if "original_max_position_embeddings" in p]
    declared = getattr(config, "original_max_position_embeddings", None)
    return int(min(found) if found else declared or config.max_position_embeddings)


def _with_attributes(program: ExportedProgram) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The program's graph, and its constants.

    Parameters, buffers and constants that were lifted to inputs become `get_attr` nodes, on the model's own paths.
    """
    graph = program.graph_module.graph
    constants: dict[str, Tensor] = {}
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        spec = specs[node.name]
        if spec.kind is InputKind.USER_INPUT:
            continue
        target = str(spec.target)
        if spec.kind is InputKind.CONSTANT_TENSOR:
            constant, target = program.constants[target], f"constant_{len(constants)}"
            constants[target] = constant
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            target = target.removeprefix(f"{_ROOT}.")
        else:
            raise CaptureError(f"the traced graph takes an input of kind {spec.kind.name}, which has no meaning here")
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", target)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    logits = next(spec.arg.name for spec in program.graph_signature.output_specs if spec.kind.name == "USER_OUTPUT")
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = (next(n for n in graph.nodes if n.name == logits),)
    for node in graph.nodes:
        annotate(node, _scope(node))
    return graph, constants


def _scope(node: Node) -> Scope:
    """The module calls around a node. A module's second call is `path@1`, as the tracer counts them."""
    calls = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        if path == _ROOT or path.startswith(f"{_ROOT}."):
            own = path.removeprefix(_ROOT).removeprefix(".")
            _, at, count = key.rpartition("@")
            calls.append((own + at + count if at else own, own))
    return Scope(tuple(calls))


def canonicalize(graph: fx.Graph) -> None:
    """Drop what computes nothing: assertions, inactive dropout, casts to the same dtype, slices of everything."""
    for node in list(call_functions(graph)):
        if is_op(node, "aten._assert_tensor_metadata", "aten._assert_scalar", "aten.sym_constrain_range_for_size"):
            graph.erase_node(node)
        elif _is_identity(node):
            source = tensor_arg(node, 0)
            assert source is not None
            node.replace_all_uses_with(source)
            graph.erase_node(node)
    erase_dead(graph)


_CASTS = ("aten.to", "aten._to_copy")
_ALIASES = ("aten.detach", "aten.detach_", "aten.alias", "aten.lift_fresh_copy", "aten.dropout", "aten.feature_dropout")
_ALL = 9223372036854775807


def _is_identity(node: Node) -> bool:
    source = tensor_arg(node, 0)
    if source is None:
        return False
    if is_op(node, *_ALIASES):
        # Models are captured in eval mode, where dropout is the identity.
        return True
    if is_op(node, *_CASTS):
        before, after = value(source), value(node)
        return bool(before.dtype == after.dtype and before.device == after.device)
    if is_op(node, "aten.slice"):
        given: list[object] = [*node.args[2:], *(None, _ALL, 1)[len(node.args) - 2 :]]
        start, end, step = given
        return start in (0, None) and end in (_ALL, None) and step == 1
    return False
