"""What a person reads: layers folded, the odd ones out, columns that fit, and why a layer is what it is."""

from __future__ import annotations

import re

import pytest
from rich.text import Text

from qcompiler.errors import ConfigError
from qcompiler.inspection.columns import Cell, Column, laid_out
from qcompiler.inspection.diff import compare, diff_lines
from qcompiler.inspection.document import Document, Node, Verdict
from qcompiler.inspection.explain import explain_lines
from qcompiler.inspection.fold import fold
from qcompiler.inspection.read import read_graph
from qcompiler.inspection.text import TIMES, full_lines, text_lines
from qcompiler.inspection.tree import tree_lines
from qcompiler.ir.printer import print_graph
from qcompiler.show import human
from tests.capture.models import captured
from tests.conftest import Golden


def plain(lines: list[Text]) -> str:
    return "\n".join(line.plain for line in lines)


def with_node(document: Document, node: Node) -> Document:
    """The document with another node of that name."""
    nodes = tuple(node if other.name == node.name else other for other in document.nodes)
    return Document(**{name: getattr(document, name) for name in Document.model_fields} | {"nodes": nodes})


@pytest.fixture
def document(points: dict[str, Document]) -> Document:
    """The mixed model before its weights are needed, under a name that does not change."""
    found = points["insert-observers"]
    return found.model_copy(update={"model": found.model.model_copy(update={"name": "tiny"})})


def test_the_text_of_a_mixed_model(document: Document, golden: Golden) -> None:
    golden("inspect-text", plain(text_lines(document, 1000)))


def test_the_tree_of_a_mixed_model(document: Document, golden: Golden) -> None:
    golden("inspect-tree", plain(tree_lines(document, 1000)))


@pytest.mark.parametrize(
    "name", ["model.layers.3.mlp.down_proj", "model.layers.1.self_attn.v_proj", "model.layers.0.input_layernorm"]
)
def test_what_is_explained(name: str, document: Document, golden: Golden) -> None:
    golden(f"inspect-explain-{name.rpartition('.')[2]}", plain(explain_lines(document, name, 120)))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_an_explanation_fits_the_width_and_names_every_rule(width: int, document: Document) -> None:
    lines = [line.plain for line in explain_lines(document, "model.layers.3.mlp.down_proj", width)]
    assert max(map(len, lines[1:])) <= width
    words = " ".join(plain(explain_lines(document, "model.layers.3.mlp.down_proj", width)).split())
    assert "assign: rule 1 {structure: mlp-output}" in words
    assert "overridden by assign: rule 3" in words


def test_structures_name_modules_as_they_can_be_asked_for(document: Document) -> None:
    text = plain(explain_lines(document, "model.layers.2.mlp.up_proj", 1000))
    assert "mlp-input: through an activation it feeds model.layers.2.mlp.down_proj" in text


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("l2.gate-up", "fusion", "runtimes fuse these, and need one scheme for all"),
        ("l2.mlp-input", "input", "one tensor is read, %l2.post_attention_layernorm"),
        ("l2.mlp-input", "rescale", "model.layers.2.post_attention_layernorm is divided by the scale"),
        ("l2.mlp-input.channels", "observer", "one statistic is collected; insert-observers: awq needs it"),
    ],
)
def test_groups_are_explained_too(name: str, kind: str, says: str, document: Document) -> None:
    lines = plain(explain_lines(document, name, 1000)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"{name}  {kind} group of "))
    assert says in lines[start + 1]
    assert any(re.match(r"    model\.layers\.2\.mlp\.up_proj +w:int4/g16", line) for line in lines[start:])


@pytest.mark.parametrize(
    ("architecture", "name", "reads", "feeds"),
    [
        (
            *("llama", "model.layers.1.self_attn.q_proj"),
            "model.layers.1.input_layernorm [B,S,64]; made of the residual stream",
            "model.layers.1.self_attn.o_proj",
        ),
        (
            *("llama", "model.layers.0.mlp.down_proj"),
            "; made of model.layers.0.mlp.{gate_proj, up_proj}",
            "the residual stream %S, which model.layers.1.input_layernorm reads next",
        ),
        (
            *("gemma3_text", "model.layers.1.self_attn.o_proj"),  # its output is normed before it is added
            "; made of model.layers.1.self_attn.{q_proj, k_proj, v_proj}",  # past the norms of q and k
            "the residual stream %S, which model.layers.1.pre_feedforward_layernorm reads next",
        ),
        (
            *("phi3", "model.layers.1.self_attn.o_proj"),
            "; made of model.layers.1.self_attn.qkv_proj",
            "the residual stream %S, which model.layers.1.post_attention_layernorm reads next",
        ),
        (
            *("mixtral", "model.layers.1.mlp.experts"),
            "; made of model.layers.1.mlp.gate and the residual stream",
            "the residual stream %S, which model.norm reads next",
        ),
    ],
)
def test_dataflow_is_told_from_weight_to_weight(architecture: str, name: str, reads: str, feeds: str) -> None:
    lines = [line.plain for line in explain_lines(read_graph(captured(architecture)), name, 1000)]
    (read,) = (line for line in lines if line.startswith("  reads"))
    (fed,) = (line for line in lines if line.startswith("  feeds"))
    assert reads in read
    assert re.fullmatch(re.escape(f"  feeds        {feeds}").replace("%S", r"%\w+"), fed)


def test_a_block_of_experts_says_what_it_stands_for() -> None:
    document = read_graph(captured("mixtral"))
    experts = document.find("model.layers.1.mlp.experts").experts
    assert experts is not None
    parts, last = "{gate_proj, up_proj, down_proj}", experts.count - 1
    assert f"mlp.experts is {experts.count} experts in one: mlp.experts.{{0-{last}}}.{parts}" in plain(
        text_lines(document, 1000)
    )
    assert f"{experts.count} experts: {{0-{last}}}.{parts}" in plain(tree_lines(document, 1000))
    for name in (f"model.layers.1.mlp.experts.{last}.down_proj", "model.layers.1.mlp.experts.0.gate_proj"):
        lines = plain(explain_lines(document, name, 1000))
        assert lines.startswith("model.layers.1.mlp.experts  ")
        assert f"model.layers.1.mlp.experts.{{0-{last}}}.{parts}" in lines
        assert f"asked for    {name}: one of these" in lines
    for name in (f"model.layers.1.mlp.experts.{last + 1}.down_proj", "model.layers.1.mlp.experts.0.no_proj"):
        with pytest.raises(ConfigError, match=r"has no node .* did you mean 'model\.layers\.1\.mlp\.experts'"):
            document.find(name)
    with pytest.raises(ConfigError, match=r"is part of model\.layers\.0\.mlp\.experts"):
        document.find(f"experts.{last}.down_proj")


def test_folded_layers_say_the_bytes_of_each_and_of_all(document: Document) -> None:
    node = document.find("model.layers.0.mlp.gate_proj")
    assert node.bytes is not None
    each, together = human(node.bytes), human(3 * node.bytes)
    for lines in (text_lines(document, 1000), tree_lines(document, 1000)):
        (line,) = (line.plain for line in lines if "gate_proj" in line.plain)
        assert re.search(rf"{each} +{TIMES}3 = {together}", line)
        (alone,) = (line.plain for line in lines if "lm_head" in line.plain and "KiB" in line.plain)
        assert "=" not in alone


def test_an_observer_says_what_it_collects_and_for_whom(document: Document) -> None:
    name = next(node.name for node in document.nodes if node.observes == "l2.mlp-input.channels")
    text = plain(explain_lines(document, f"%{name}", 1000))
    assert "collects     l2.mlp-input.channels, for model.layers.2.mlp.{gate_proj, up_proj}" in text


def test_what_was_measured_is_explained(stored: Document) -> None:
    node = stored.find("model.layers.1.self_attn.q_proj")
    assert node.measures is not None
    assert node.measures.error is not None
    text = plain(explain_lines(stored, "model.layers.1.self_attn.q_proj", 1000))
    assert f"error        {node.measures.error:.3e} of the weight's square" in text
    assert "transform    awq: output error" in text
    assert "assign: rule 2  {structure: [attention-input, mlp-input]}" in text


def test_layers_that_are_alike_are_folded_and_the_odd_one_shown(document: Document) -> None:
    common, odd = fold(document)
    assert (common.layers, odd.layers) == ((0, 1, 2), (3,))
    assert [(node.path, other and other.path) for node, other in odd.odd] == [
        ("model.layers.3.mlp.down_proj", "model.layers.0.mlp.down_proj")
    ]
    text = plain(text_lines(document, 1000))
    assert text.count("q_proj") == 1
    assert "layer 3: as layers 0-2, but" in text


def test_layers_of_other_modules_are_shown_whole() -> None:
    first, *_ = folds = fold(read_graph(captured("deepseek_v3")))
    assert len(folds) > 1
    text = plain(text_lines(read_graph(captured("deepseek_v3")), 1000))
    dense = next(found for found in folds if any("gate_proj" in node.name for node in found.nodes))
    assert text.count("kv_b_proj") == len(folds)
    assert first.layers[0] == 0
    assert dense.nodes


def test_errors_are_means_and_the_worst_layer_is_named(stored: Document) -> None:
    nodes = [stored.find(f"model.layers.{layer}.mlp.gate_proj") for layer in range(3)]
    errors = [node.measures.error for node in nodes if node.measures and node.measures.error is not None]
    line = next(line.plain for line in text_lines(stored, 1000) if "mlp.gate_proj" in line.plain)
    assert f"{sum(errors) / 3:.2e}" in line
    assert f"{max(errors):.2e} in layer {errors.index(max(errors))}" in line


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_lines_fit_the_width_and_keep_what_matters(width: int, document: Document, stored: Document) -> None:
    for shown in (document, stored):
        table = [line for line in text_lines(shown, width) if line.plain.startswith("  ")]
        assert max(len(line.plain) for line in table) <= max(width, 60)
        assert any("w:int4/g16" in line.plain for line in table)
    assert max(len(line.plain) for line in tree_lines(document, width)[4:-2]) <= width


def test_columns_of_the_highest_rank_go_first_and_names_are_cut_in_the_middle() -> None:
    columns = (Column("name"), Column("much", rank=2), Column("some", rank=1), Column("kept"))
    rows = [[Cell("model.layers.0.mlp.down_proj"), Cell("mmmm"), Cell("ssss"), Cell("kkkk")]]
    assert [line.plain for line in laid_out(columns, rows, 45, titles=False)] == [
        "  model.layers.0.mlp.down_proj  ssss  kkkk"
    ]
    (line,) = laid_out(columns, rows, 24, titles=False)
    assert line.plain == "  model…down_proj  kkkk"[: len(line.plain)] or "…" in line.plain
    assert line.plain.endswith("down_proj  kkkk")


def test_schemes_have_colours_and_what_a_target_refuses_is_red(points: dict[str, Document]) -> None:
    document = points["assign"]
    styles = {str(span.style) for line in text_lines(document, 1000) for span in line.spans}
    assert {"cyan", "green"} <= styles
    assert not any("red" in style for style in styles)
    head = document.find("lm_head").model_copy(update={"verdict": Verdict(legal=False)})
    refused = with_node(document, head)
    spans = [str(span.style) for line in text_lines(refused, 1000) for span in line.spans if "lm_head" in line.plain]
    assert "bold red" in spans


def test_full_shows_every_node_as_the_printer_does(points: dict[str, Document]) -> None:
    graph = captured("llama")
    document = read_graph(graph)
    shown = [line.plain.rstrip() for line in full_lines(document)]
    printed = [line.partition("  ;")[0].rstrip() for line in print_graph(graph).splitlines()[1:]]
    assert [line for line in shown if line.startswith(("%", "return"))] == printed


def test_a_full_tree_folds_nothing(document: Document) -> None:
    assert plain(tree_lines(document, 1000, full=True)).count("q_proj") == 4
    assert plain(tree_lines(document, 1000)).count("q_proj") == 1


def test_passes_differ_in_what_they_decide(points: dict[str, Document], golden: Golden) -> None:
    found = compare(points["capture"], points["insert-observers"], ("capture", "insert-observers"))
    golden("inspect-diff", plain(diff_lines(found, 1000)))


def test_a_document_does_not_differ_from_itself(stored: Document) -> None:
    found = compare(stored, stored, ("a", "b"))
    assert found.is_empty
    assert plain(diff_lines(found, 80)) == "a → b\nnothing differs"


def test_errors_that_differ_are_a_difference(stored: Document) -> None:
    path = "model.layers.2.mlp.up_proj"
    node = stored.find(path)
    assert node.measures is not None
    worse = node.model_copy(update={"measures": node.measures.model_copy(update={"error": 0.5})})
    found = compare(stored, with_node(stored, worse), ("a", "b"))
    assert [(layer.path, [change.what for change in layer.changes]) for layer in found.layers] == [(path, ["error"])]
    assert "→ 5.00e-01" in plain(diff_lines(found, 1000))


def test_layers_that_only_one_has_are_told(points: dict[str, Document]) -> None:
    fewer = points["capture"]
    other = read_graph(captured("llama"))
    found = compare(fewer, other, ("four", "fewer"))
    only = {layer.path for layer in found.layers if layer.only == "four"}
    assert "model.layers.3.mlp.up_proj" in only
    assert "only in" in plain(diff_lines(found, 1000))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("q_pro", "no node 'q_pro'; did you mean 'model.layers.0.self_attn.q_proj'"),
        ("k_proj", "part of model.layers.0.self_attn.k_proj, model.layers.1.self_attn.k_proj"),
        ("model.layers.9.mlp.up_proj", "did you mean 'model.layers."),
        ("", "no node ''"),
    ],
)
def test_names_that_are_none_have_near_misses(name: str, says: str, document: Document) -> None:
    with pytest.raises(ConfigError) as error:
        explain_lines(document, name, 80)
    assert says in str(error.value)
