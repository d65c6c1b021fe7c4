"""What a node can be annotated with. Frozen facts, reached only through `get`, `need` and `annotate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar, Literal, TypeVar

from torch import Tensor

from qcompiler.errors import VerificationError
from qcompiler.ir.fx import Node
from qcompiler.scheme import QuantSpec, Scheme
from qcompiler.solvers.options import GptqOptions
from qcompiler.transforms.norms import Gain
from qcompiler.transforms.options import TransformOptions


class LeafKind(StrEnum):
    """What a raised module computes."""

    LINEAR = "linear"
    CONV1D = "conv1d"  # GPT-2's transposed linear
    BARE_LINEAR = "bare-linear"  # a linear on a parameter, inside a module with a forward of its own (routers)
    EMBEDDING = "embedding"
    NORM = "norm"
    EXPERTS = "experts"  # a block of mixture-of-experts weights


class Structure(StrEnum):
    """Where a leaf stands in the model, found in the graph."""

    ATTENTION_INPUT = "attention-input"
    ATTENTION_OUTPUT = "attention-output"
    MLP_INPUT = "mlp-input"
    MLP_OUTPUT = "mlp-output"
    EXPERTS = "experts"
    ROUTER = "router"
    LM_HEAD = "lm-head"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A `call_module` node that capture raised: one module of the model, called once.

    `in_features` and `out_features` are those of linears; a Conv1D counts as the linear it computes. A bare linear is
    not raised: its annotation stands on the `aten.linear` node, and its path is that of the module that owns the
    weight.
    """

    kind: LeafKind
    path: str
    class_name: str
    parameters: int
    in_features: int = 0
    out_features: int = 0
    bias: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear that can be named and quantized as such."""
        return self.kind in (LeafKind.LINEAR, LeafKind.CONV1D)


@dataclass(frozen=True, slots=True)
class Scope:
    """The module calls a node was traced in, outermost first, as (call key, module path)."""

    calls: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Role:
    """Where a leaf stands, by structure alone: the same under any renaming of modules."""

    structure: Structure | None
    layer: int | None
    input_group: str | None
    fusion_group: str | None
    because: str


@dataclass(frozen=True, slots=True)
class Quant:
    """What becomes of a linear. `scheme` None means it stays dense on purpose; `because` says who decided.

    `solver` names what rounds its weight, `options` are the solver's where it has any. `transform` is what its inputs
    are rescaled by before, where a producer can take the scale. `run` counts the runs over the data, from 1: which one
    solves it, None until a pass has claimed it.
    """

    scheme: Scheme | None
    solver: str
    because: tuple[str, ...]
    options: GptqOptions | None = None
    transform: TransformOptions | None = None
    run: int | None = None

    @property
    def algorithm(self) -> str:
        """Transform and solver in one word, e.g. `awq`, `gptq` or `smoothquant+gptq`; `rtn` where there is neither."""
        names = [self.transform.name] if self.transform else []
        return "+".join(names + [self.solver] * (self.solver != "rtn" or not names))

    @property
    def short(self) -> str:
        """Scheme and algorithm in words, where that is not rounding to nearest."""
        if self.scheme is None:
            return "dense"
        return self.scheme.short if self.algorithm == "rtn" else f"{self.scheme.short} {self.algorithm}"


@dataclass(frozen=True, slots=True)
class Claim:
    """A rule that means a linear: `who` it is (as in `Quant.because`), what it selects, what it would make of it.

    `missed`: the one key that does not hold, and what holds in its place. `hidden`: who took the linear away from it.
    """

    who: str
    selects: str
    becomes: str
    missed: str = ""
    hidden: str = ""


@dataclass(frozen=True, slots=True)
class Considered:
    """The rules that were weighed for a linear, in the order in which they spoke. `Quant` says which one decided."""

    claims: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class Observer:
    """A statistic to collect where an `observe` node stands.

    `id` names the statistic: nodes that share an id share it. `consumers` are the module paths that use it.
    """

    id: str
    kind: Literal["minmax", "mse", "percentile"]
    spec: QuantSpec
    purpose: Literal["input", "key", "value"]
    consumers: tuple[str, ...]
    because: tuple[str, ...]
    percentile: float = 99.99


@dataclass(frozen=True, slots=True)
class InputObserver:
    """What to collect of the inputs of the modules in `consumers`, where an `observe` node stands.

    `id` names the statistic: nodes that share an id share it.
    """

    what: ClassVar[str]

    id: str
    consumers: tuple[str, ...]
    because: tuple[str, ...]


class HessianObserver(InputObserver):
    """X^T X."""

    __slots__ = ()
    what = "hessian"


class ChannelObserver(InputObserver):
    """What each channel is like: mean square, mean magnitude, range."""

    __slots__ = ()
    what = "channels"


@dataclass(frozen=True, slots=True)
class Rescale:
    """A scale that this norm or linear gives to the linears that read its output; see `patterns.rescaling`.

    `transform` chooses it, by the linears of `asked`; all `consumers` take it. `channels` int64 [I]: which of the
    producer's output channels each of their input features grows with (`tied`: several with one). `gains` are the
    producer's parameters to divide, `weights` the consumers' to multiply, by path.
    """

    id: str
    kind: str
    producer: str
    transform: TransformOptions
    asked: tuple[str, ...]
    consumers: tuple[str, ...]
    channels: Tensor = field(compare=False, repr=False)
    tied: bool
    gains: tuple[Gain, ...]
    weights: tuple[str, ...]
    because: tuple[str, ...]


AnyObserver = Observer | InputObserver
Annotation = TypeVar(
    "Annotation", Leaf, Scope, Role, Quant, Considered, Observer, HessianObserver, ChannelObserver, Rescale
)
_KEY = "qcompiler"


def get(node: Node, kind: type[Annotation]) -> Annotation | None:
    """The annotation of this kind on a node, or None."""
    found: Annotation | None = node.meta.get(_KEY, {}).get(kind)
    return found


def every_annotation(node: Node) -> tuple[object, ...]:
    """Everything that a node is annotated with."""
    found: dict[type, object] = node.meta.get(_KEY, {})
    return tuple(found.values())


def need(node: Node, kind: type[Annotation]) -> Annotation:
    """The annotation of this kind on a node. Raises `VerificationError` where there is none."""
    found = get(node, kind)
    if found is None:
        raise VerificationError(f"node %{node.name} has no {kind.__name__} annotation")
    return found


def annotate(node: Node, annotation: Annotation, *, replacing: Annotation | None = None) -> None:
    """Put an annotation on a node.

    `replacing` must be the annotation that is there now: nobody overwrites what he has not read.
    Raises `VerificationError` otherwise.
    """
    kind = type(annotation)
    present = get(node, kind)
    if present != replacing:
        found = f"has no {kind.__name__} annotation" if present is None else f"is already annotated with {present}"
        raise VerificationError(
            f"node %{node.name} {found}; it would silently become {annotation}",
            hint="read the annotation first and pass it as replacing=",
        )
    node.meta[_KEY] = {**node.meta.get(_KEY, {}), kind: annotation}


def inherit(node: Node, other: Node) -> None:
    """Give a node every annotation of `other` of a kind that it does not have: it takes that one's place."""
    node.meta[_KEY] = {**other.meta.get(_KEY, {}), **node.meta.get(_KEY, {})}


def observed(node: Node) -> AnyObserver | None:
    """What an `observe` node collects; None for any other node."""
    return get(node, Observer) or get(node, HessianObserver) or get(node, ChannelObserver)


def get_quant(node: Node) -> Quant | None:
    """What becomes of this linear, or None where nothing was decided yet."""
    return get(node, Quant)


def scheme_of(node: Node) -> Scheme | None:
    """What a leaf's weight becomes; None where it stays dense."""
    quant = get_quant(node)
    return quant.scheme if quant else None


def set_quant(node: Node, quant: Quant, *, replacing: Quant | None = None) -> None:
    """Decide what becomes of a linear; see `annotate`."""
    annotate(node, quant, replacing=replacing)


def consider(node: Node, *claims: Claim) -> None:
    """Remember rules that were weighed for a linear, after those that are remembered."""
    before = get(node, Considered)
    annotate(node, Considered((*(before.claims if before else ()), *claims)), replacing=before)
