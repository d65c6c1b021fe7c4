"""Where each leaf of the families stands: structure, input groups and fusion groups of a layer of each kind."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import pytest

from qcompiler.capture import capture_graph
from qcompiler.ir.annotations import LeafKind, Role, Structure, need
from qcompiler.ir.graph import Graph
from tests.capture.models import captured, on_meta
from tests.zoo import FAMILIES, VARIANTS


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer: the names of its leaves by structure, and the groups of more than one."""

    attention_input: str = "q_proj k_proj v_proj"
    attention_output: str = "o_proj"
    mlp_input: str = "gate_proj up_proj"
    mlp_output: str = "down_proj"
    router: str = ""
    experts: str = ""
    inputs: tuple[str, ...] = ("q_proj k_proj v_proj", "gate_proj up_proj")
    fused: tuple[str, ...] = ("q_proj k_proj v_proj", "gate_proj up_proj")


SPLIT = Layer()
SPARSE = Layer(
    mlp_input="",
    mlp_output="",
    router="gate",
    experts="experts",
    inputs=("q_proj k_proj v_proj",),
    fused=("q_proj k_proj v_proj",),
)
LATENT = Layer(
    attention_input="q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj",
    inputs=("q_a_proj kv_a_proj_with_mqa", "gate_proj up_proj"),
    fused=("q_a_proj kv_a_proj_with_mqa", "gate_proj up_proj"),
)


def routed(layer: Layer, router: str = "gate") -> Layer:
    """`layer`, its MLP being the shared experts beside routed ones."""
    return replace(layer, router=router, experts="experts")


FALCON = Layer(
    attention_input="query_key_value",
    attention_output="dense",
    mlp_input="dense_h_to_4h",
    mlp_output="dense_4h_to_h",
    inputs=("query_key_value dense_h_to_4h",),
    fused=(),
)

EXPECTED: dict[str, tuple[Layer, ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), (SPLIT,)),
    **dict.fromkeys(("mistral", "granite", "olmo2", "smollm3"), (SPLIT,)),
    **dict.fromkeys(("mixtral", "qwen3_moe"), (SPARSE,)),
    "gpt_oss": (replace(SPARSE, router="router"),),
    "deepseek_v3": (LATENT, routed(LATENT)),
    "glm4_moe": (SPLIT, routed(SPLIT)),  # first dense, then shared and routed experts
    "llama4_text": (routed(SPLIT, router="router"),),
    # One norm feeds attention and MLP: one input group, and each fuses its own.
    "cohere2": (replace(SPLIT, inputs=("q_proj k_proj v_proj gate_proj up_proj",)),),
    "phi": (
        Layer(
            attention_output="dense",
            mlp_input="fc1",
            mlp_output="fc2",
            inputs=("q_proj k_proj v_proj fc1",),
            fused=("q_proj k_proj v_proj",),
        ),
    ),
    **dict.fromkeys(("falcon", "falcon-11b"), (FALCON,)),
    **dict.fromkeys(("falcon-40b", "falcon-rw-1b"), (replace(FALCON, inputs=()),)),  # a norm each
    "phi3": (Layer(attention_input="qkv_proj", mlp_input="gate_up_proj", inputs=(), fused=()),),
    "gpt2": (
        Layer(
            attention_input="c_attn",
            attention_output="c_proj",
            mlp_input="c_fc",
            mlp_output="c_proj",
            inputs=(),
            fused=(),
        ),
    ),
    "opt": (
        Layer(
            attention_output="out_proj",
            mlp_input="fc1",
            mlp_output="fc2",
            inputs=("q_proj k_proj v_proj",),
            fused=("q_proj k_proj v_proj",),
        ),
    ),
}


def found(graph: Graph) -> list[Layer]:
    """What the graph's layers are like, each kind once."""
    by_structure: dict[int, dict[Structure | None, list[str]]] = defaultdict(lambda: defaultdict(list))
    inputs: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    fused: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for node, leaf in graph.leaves():
        role, name = need(node, Role), leaf.path.rpartition(".")[2]
        if role.layer is None or leaf.kind is LeafKind.NORM:
            continue
        by_structure[role.layer][role.structure].append(name)
        if role.input_group:
            inputs[role.layer][role.input_group].append(name)
        if role.fusion_group:
            fused[role.layer][role.fusion_group].append(name)

    def groups(of: dict[str, list[str]]) -> tuple[str, ...]:
        return tuple(" ".join(names) for names in of.values() if len(names) > 1)

    def layer(index: int) -> Layer:
        names = {str(structure).replace("-", "_"): " ".join(names) for structure, names in by_structure[index].items()}
        rest = {"mlp_input": "", "mlp_output": ""}
        return Layer(**{**rest, **names}, inputs=groups(inputs[index]), fused=groups(fused[index]))

    return list(dict.fromkeys(layer(index) for index in sorted(by_structure)))


@pytest.mark.parametrize("model_type", [*FAMILIES, *VARIANTS])
def test_layers_of_a_family(model_type: str) -> None:
    assert found(captured(model_type)) == list(EXPECTED[model_type])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_outside_the_layers_stand_embeddings_and_one_head(model_type: str) -> None:
    roles = [
        (leaf.kind, need(node, Role).structure)
        for node, leaf in captured(model_type).leaves()
        if need(node, Role).layer is None and leaf.kind is not LeafKind.NORM
    ]
    assert roles[-1] == (LeafKind.LINEAR, Structure.LM_HEAD)
    assert all(role == (LeafKind.EMBEDDING, Structure.EMBEDDING) for role in roles[:-1])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_fused_linears_read_one_tensor_and_stand_in_one_place(model_type: str) -> None:
    members: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    for node, _ in captured(model_type).linears():
        role = need(node, Role)
        if role.fusion_group:
            members[role.fusion_group].add((role.structure, role.input_group, role.layer))
    assert all(len(group) == 1 for group in members.values())


@pytest.mark.parametrize("heads", [1, 4], ids=["one", "as many as of queries"])
def test_falcons_new_layout_is_found_with_any_number_of_value_heads(heads: int) -> None:
    model = on_meta("falcon-40b", num_kv_heads=heads)
    assert found(capture_graph(model)) == [replace(FALCON, inputs=())]


def roles_of(model_type: str, name: str) -> list[Role]:
    """The roles of the leaves whose path ends in `name`."""
    return [need(node, Role) for node, leaf in captured(model_type).leaves() if leaf.path.endswith(name)]


def test_the_gate_of_a_shared_expert_routes() -> None:
    gates = roles_of("qwen2_moe", ".shared_expert_gate")
    assert gates
    assert {gate.structure for gate in gates} == {Structure.ROUTER}


def test_a_gate_on_attentions_output_is_an_input_of_attention_and_not_fused() -> None:
    gates = roles_of("afmoe", "self_attn.gate_proj")
    assert gates
    assert {(gate.structure, gate.fusion_group) for gate in gates} == {(Structure.ATTENTION_INPUT, None)}
    assert all("gates" in gate.because for gate in gates)


def test_a_sparse_attentions_indexer_has_no_structure() -> None:
    assert {role.structure for role in roles_of("deepseek_v32", "indexer.wk")} == {None}
