"""Documents of a model at points of a pipeline, and of what was compiled."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qcompiler.capture import capture_and_prove
from qcompiler.errors import CheckpointError, ConfigError
from qcompiler.inspection.document import Document, parse_document
from qcompiler.inspection.read import read, read_each, read_graph, read_plan
from qcompiler.ir.annotations import Leaf
from qcompiler.pipeline import Pipeline, parse_pipeline
from qcompiler.provenance import read_provenance
from tests.capture.models import captured


def test_schemes_appear_after_the_pass_that_assigns_them(points: dict[str, Document]) -> None:
    before, after = (points[name].find("model.layers.0.mlp.down_proj") for name in ("capture", "assign"))
    assert (before.decided, before.scheme_name, before.bits_per_weight) == (False, None, 16)
    assert (after.decided, after.scheme_name, after.because) == (True, "w:int8/g16", ("assign: rule 1",))
    assert after.bits_per_weight is not None
    assert 8 < after.bits_per_weight < 10


def test_a_later_pass_is_not_run(points: dict[str, Document]) -> None:
    assert [points[name].stage for name in points] == ["captured", "annotated", "observed"]
    assert not any(node.op == "observe" for node in points["assign"].nodes)
    assert any(node.op == "observe" for node in points["insert-observers"].nodes)
    assert points["assign"].pipeline is not None
    ran = [run.name for run in points["assign"].pipeline.passes if run.seconds is not None]
    assert ran == ["assign"]


def test_the_bytes_of_a_plan_are_those_of_the_checkpoint(points: dict[str, Document], stored: Document) -> None:
    planned = points["insert-observers"]
    assert planned.total_bytes == stored.total_bytes == sum(entry.bytes for entry in planned.ledger)
    tensors = [entry for entry in stored.ledger if entry.where == "tensors"]
    assert {(e.what, e.bytes) for e in planned.ledger} == {(e.what, e.bytes) for e in tensors}
    assert {n.path: n.bytes for n in planned.listed} == {n.path: n.bytes for n in stored.listed}


def test_the_ledger_of_a_checkpoint_adds_up_to_its_files(stored: Document, compiled: str) -> None:
    on_disk = sum(file.stat().st_size for file in Path(compiled).iterdir())
    assert stored.file_bytes == on_disk == sum(entry.bytes for entry in stored.ledger)


def test_a_checkpoint_knows_its_errors_and_its_rules(stored: Document, compiled: str) -> None:
    provenance = read_provenance(Path(compiled))
    assert provenance is not None
    errors = {row.path: row.error for row in provenance.report.layers}
    assert len([error for error in errors.values() if error]) == 24
    assert {n.path: n.measures.error if n.measures else None for n in stored.listed} == errors
    assert stored.find("model.layers.3.mlp.down_proj").because == ("assign: rule 3", "over assign: rule 1")
    assert stored.target == "transformers"
    assert stored.pipeline is not None
    assert stored.pipeline.after == "lower"


def test_rescaled_groups_name_the_norm_and_its_readers(points: dict[str, Document], stored: Document) -> None:
    for document in (points["insert-observers"], stored):
        group = next(group for group in document.groups if group.kind == "rescale")
        assert group.producer == "l0.input_layernorm"
        assert group.members == tuple(f"l0.self_attn.{name}_proj" for name in "qkv")


def test_input_groups_read_one_tensor_whatever_is_inserted(points: dict[str, Document], stored: Document) -> None:
    for document in (*points.values(), stored):
        group = next(g for g in document.groups if g.kind == "input" and g.id == "l1.mlp-input")
        assert group.producer == "l1.post_attention_layernorm"
        assert group.members == ("l1.mlp.gate_proj", "l1.mlp.up_proj")


def test_every_annotation_is_there_as_plain_data(points: dict[str, Document]) -> None:
    norm = points["insert-observers"].find("model.layers.0.input_layernorm")
    assert {"Leaf", "Role", "Scope", "Rescale"} <= norm.annotations.keys()
    assert norm.annotations["Rescale"]["asked"] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    width = points["capture"].model.config["hidden_size"]
    assert norm.annotations["Rescale"]["channels"] == f"0:{width}"


def test_a_document_is_equal_after_json(points: dict[str, Document], stored: Document) -> None:
    for document in (*points.values(), stored):
        assert parse_document(document.as_json(), where="here") == document


def test_a_graph_in_python_is_read_as_it_is() -> None:
    graph = captured("mixtral")
    document = read_graph(graph)
    assert [node.path for node in document.nodes if node.path] == [leaf.path for _, leaf in graph.leaves()]
    assert {node.kind for node in document.listed} >= {"linear", "experts"}
    assert Leaf.__name__ in document.listed[0].annotations


def test_a_checkpoint_of_another_tool_is_read_by_its_config_and_headers(
    stored: Document, compiled: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(compiled, tmp_path / "theirs")
    (folder / "qcompiler.json").unlink()
    document = read(folder)
    assert {n.path: (n.scheme_name, n.bytes) for n in document.listed} == {
        n.path: (n.scheme_name, n.bytes) for n in stored.listed
    }
    node = document.find("model.layers.0.mlp.down_proj")
    assert (node.solver, node.because, node.measures) == ("stored", ("theirs: config.json",), None)
    assert (document.pipeline, document.target) == (None, None)


def test_a_report_that_does_not_fit_the_checkpoint_is_not_believed(compiled: str, tmp_path: Path) -> None:
    folder = shutil.copytree(compiled, tmp_path / "edited")
    said = json.loads((folder / "qcompiler.json").read_text(encoding="utf-8"))
    for row in said["report"]["layers"]:
        if row["path"] in ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"):
            row["scheme"] = "w:int8/channel"
    said["pipeline"] = "name: gone\npasses: [a-pass-that-is-not-installed]\n"
    (folder / "qcompiler.json").write_text(json.dumps(said), encoding="utf-8")
    document = read(folder)
    wrong, right = (document.find(f"model.layers.{layer}.mlp.up_proj") for layer in (1, 0))
    assert (wrong.scheme_name, wrong.measures) == ("w:int4/g16", None)
    assert right.measures is not None
    assert right.measures.error is not None
    assert right.because == ("assign: rule 2",)
    told = [note.text for note in document.notes if note.kind in ("warning", "fallback")]
    one = "model.layers.1.mlp.gate_proj and 1 more: qcompiler.json says w:int8/channel, config.json w:int4/g16: "
    assert [one in text for text in told if "w:int8/channel" in text] == [True]
    assert any("which rules lost is not known: " in text and "a-pass-that-is-not" in text for text in told)


@pytest.mark.parametrize(
    ("after", "says"),
    [
        ("legalise", "has no pass 'legalise'; did you mean 'legalize'?"),
        ("calibrate", "calibrate needs weights"),
    ],
)
def test_unknown_passes_are_refused_before_a_model_is_opened(after: str, says: str, mixed: Pipeline) -> None:
    with pytest.raises(ConfigError, match="(?s)" + says.replace("?", r"\?")):
        read_plan("/no/model", mixed, after=after)


def test_a_pass_that_comes_twice_must_be_told_apart() -> None:
    twice = [{"assign": {"rules": [{"select": {"name": "*"}, "scheme": "W8A16"}]}}, "assign"]
    with pytest.raises(ConfigError, match="runs assign several times\n  hint: say which: 'assign 1', 'assign 2'"):
        read_plan("/no/model", _pipeline(twice), after="assign")


def test_pipelines_are_compared_on_one_capture_and_apart(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def counted(*given: Any, **options: Any) -> Any:
        captured.append(given)
        return capture_and_prove(*given, **options)

    monkeypatch.setattr("qcompiler.compiler.capture_and_prove", counted)
    names = ("w8a8-rtn", "fp8-dynamic", "w8a8-rtn")
    found = read_each(model, names)
    assert len(captured) == 1
    alone = {name: _without_times(read_plan(model, name)) for name in set(names)}
    assert [_without_times(document) for document in found] == [alone[name] for name in names]


def _without_times(document: Document) -> Document:
    assert document.pipeline is not None
    runs = tuple(run.model_copy(update={"seconds": None}) for run in document.pipeline.passes)
    return document.model_copy(update={"pipeline": document.pipeline.model_copy(update={"passes": runs})})


def test_no_pipeline_is_run_on_what_is_decided(compiled: str, mixed: Pipeline) -> None:
    with pytest.raises(ConfigError, match="is a quantized checkpoint: what became of it is decided"):
        read(compiled, mixed)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2", "the file: Invalid JSON"),
        ("{}", "source: Field required"),
        (json.dumps({"schema_version": 7}), r"schema_version: Input should be 1 \(7\)"),
        ("digraph {}", "the file: Invalid JSON"),
    ],
)
def test_files_that_are_no_export_are_refused(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"graph.json is no exported graph: {says}"):
        read(file)


def test_an_export_whose_edges_lead_nowhere_is_refused(points: dict[str, Document], tmp_path: Path) -> None:
    data = json.loads(points["capture"].as_json())
    data["nodes"][-1]["inputs"] = ["nothing"]
    (tmp_path / "graph.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(CheckpointError, match="reads nothing, which is no node"):
        read(tmp_path / "graph.json")


def test_rules_that_lost_are_told_with_the_reason(points: dict[str, Document], stored: Document) -> None:
    for document in (points["assign"], stored):
        weighed = document.find("model.layers.3.mlp.down_proj").candidates
        assert [(c.who, c.outcome, c.because) for c in weighed] == [
            ("assign: rule 1", "overridden", "by assign: rule 3"),
            ("assign: rule 3", "decides", ""),
        ]
        (decided, missed) = document.find("model.layers.0.mlp.down_proj").candidates
        assert (decided.outcome, missed.outcome, missed.because) == ("decides", "missed", "layers: 0")
        assert missed.selects == "{layers: -1, structure: mlp-output}"
        head = document.find("lm_head").candidates
        assert [(c.who, c.outcome) for c in head] == [("assign: ignore 1", "decides"), ("assign: rule 4", "hidden")]


def test_targets_that_lost_are_told_too(model: str) -> None:
    groups = [
        {"targets": ["re:.*o_proj"], "scheme": {"weights": {"bits": 8, "group_size": 16}}},
        {"targets": ["re:.*(o|down)_proj"], "scheme": {"weights": {"bits": 4, "group_size": 16}}},
    ]
    passes = [{"assign-targets": {"assignments": [{"groups": groups, "ignore": ["model.layers.1.self_attn.o_proj"]}]}}]
    document = read_plan(model, _pipeline(passes))
    weighed = document.find("model.layers.0.self_attn.o_proj").candidates
    assert [(c.selects, c.outcome) for c in weighed] == [
        ("re:.*o_proj", "decides"),
        ("re:.*(o|down)_proj", "overridden"),
    ]
    ignored = document.find("model.layers.1.self_attn.o_proj").candidates
    assert [c.outcome for c in ignored] == ["decides", "hidden", "hidden"]


def _pipeline(passes: object) -> Pipeline:
    return parse_pipeline(yaml.safe_dump({"name": "p", "passes": passes}))
