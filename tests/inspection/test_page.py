"""The page as a file: whole, inert, small, and saying what the document says."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qcompiler.cli.commands import app
from qcompiler.errors import ConfigError
from qcompiler.inspection.document import Document, LedgerEntry, Measures
from qcompiler.inspection.page import render_page, write_page
from qcompiler.inspection.page.data import column_of, page_data
from tests.inspection.documents import decoder

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "qcompiler" / "inspection" / "page"
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\"'&amp;{{7*7}}"


class Elements(HTMLParser):
    """Every element with its attributes, and the text before the first element or end inside it."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._inside = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.text.append("")
        self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.text[-1] += data

    def rows(self, table: str) -> list[list[str]]:
        """The cells of each row in the body of the table of this id."""
        start = next(place for place, (_, facts) in enumerate(self.found) if facts.get("id") == table)
        rows: list[list[str]] = []
        for (tag, _), text in zip(self.found[start + 1 :], self.text[start + 1 :], strict=True):
            if tag == "tr":
                rows.append([])
            elif tag in ("th", "td") and rows:
                rows[-1].append(text.strip())
            elif tag == "p":
                break
        return rows[1:]

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(facts, text) for (name, facts), text in zip(self.found, self.text, strict=True) if name == tag]


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(decoder(3))


def test_a_page_is_the_same_for_the_same_document(page: str) -> None:
    assert render_page(decoder(3)) == page


def test_a_page_loads_nothing_and_no_script_but_its_own_may_run(page: str) -> None:
    elements = Elements(page)
    for tag, facts in elements.found:
        assert not {"src", "style", "background", "poster", "data"} & facts.keys(), tag
        assert not [name for name in facts if name.startswith("on")], tag
        assert (facts.get("href") or "#").startswith("#"), tag
    policy = next(facts["content"] or "" for facts, _ in elements.of("meta") if "http-equiv" in facts)
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        code = [text for facts, text in elements.of(tag) if facts.get("type") is None]
        assert allowed[directive].split() == [f"'{_hash(text)}'" for text in code]
    assert "@import" not in page
    assert "url(" not in "".join(text for _, text in elements.of("style"))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def test_what_a_document_says_is_never_markup(page: str) -> None:
    hostile = Elements(render_page(decoder(3, name=HOSTILE, root=HOSTILE)))
    plain = Elements(page)
    assert [tag for tag, _ in hostile.found] == [tag for tag, _ in plain.found]
    assert hostile.of("h1")[0][1] == HOSTILE
    paths = [row["path"] for row in unfolded(json.loads(_data(hostile))) if row["layer"] == 1 and row["path"]]
    assert paths
    assert all(path.startswith(f"{HOSTILE}.1.") for path in paths)


def _data(elements: Elements) -> str:
    return next(text for facts, text in elements.of("script") if facts.get("type") == "application/json")


def unfolded(data: dict[str, Any]) -> list[dict[str, Any]]:
    """Nodes out of the page's data, as its scripts read them."""
    nodes = data["nodes"]
    columns: dict[str, list[Any]] = {}
    for name, column in nodes["own"].items():
        if "plain" in column:
            columns[name] = column["plain"]
            continue
        columns[name] = []
        for cell in column["cells"]:
            pieces = None if cell is None else column["patterns"][cell[0]]
            numbers = [] if cell is None else [*map(str, cell[1:]), ""]
            columns[name].append(pieces and "".join(p + n for p, n in zip(pieces, numbers, strict=True)))
    rows = []
    for place, profile in enumerate(nodes["profile"]):
        shared = zip(nodes["values"], nodes["profiles"][profile], strict=True)
        row = {name: nodes["values"][name][value] for name, value in shared}
        rows.append(row | {name: column[place] for name, column in columns.items()})
    return rows


def test_every_node_comes_out_of_the_data_as_it_went_in() -> None:
    document = decoder(2, root="odd.007.0.x-1.12345678901234567890")
    for node, row in zip(document.nodes, unfolded(page_data(document)), strict=True):
        facts = node.model_dump(mode="json", exclude_defaults=True)
        facts |= facts.pop("measures", {})
        facts = {name: float(f"{fact:.6g}") if isinstance(fact, float) else fact for name, fact in facts.items()}
        row["inputs"] = [document.nodes[place].name for place in row["inputs"]]
        derived = {"residual", "weighted", "alike", "where_because", "short", "column"}
        facts["inputs"] = sorted(facts.get("inputs", []), key=[other.name for other in document.nodes].index)
        assert {name: fact for name, fact in row.items() if fact is not None and name not in derived} == facts


@pytest.mark.parametrize(
    ("path", "layer", "expected"),
    [
        ("model.layers.3.self_attn.q_proj", 3, ("self_attn.q_proj", "self_attn.q_proj")),
        ("model.layers.3.mlp.experts.17.up_proj", 3, ("mlp.experts.17.up_proj", "mlp.experts.*.up_proj")),
        ("transformer.h.0.mlp.fc1", 0, ("mlp.fc1", "mlp.fc1")),
        ("3.proj2", 3, ("proj2", "proj2")),
        ("odd.q13", 13, ("odd.q13", "odd.q13")),
    ],
)
def test_a_column_is_the_path_below_the_layer_without_its_numbers(
    path: str, layer: int, expected: tuple[str, str]
) -> None:
    assert column_of(path, layer) == expected


def test_a_folder_is_called_by_its_own_name_and_a_model_of_a_hub_by_both() -> None:
    for name, title in (("/home/me/models/tiny-int4", "tiny-int4"), ("org/tiny", "org/tiny"), ("./out", "out")):
        elements = Elements(render_page(decoder(1, name=name)))
        assert elements.of("h1")[0][1] == title
        assert elements.of("title")[0][1].startswith(f"{title} ")


def test_the_largest_errors_are_listed_by_those_of_outputs_where_they_are_known(stored: Document) -> None:
    errors = {n.path: n.measures.error for n in stored.listed if n.measures and n.measures.error is not None}
    worst = sorted(errors, key=lambda path: -errors[path])[:5]
    rows = Elements(render_page(stored)).rows("worst")
    assert [(row[0], row[-1]) for row in rows] == [(path, f"{errors[path]:.2e}") for path in worst]

    def measured(error: float | None) -> Document:
        """The same; the smaller the error of a weight, the larger that of its output."""
        nodes = []
        for node in stored.nodes:
            of_weight = errors.get(node.path or "")
            known = Measures(error=of_weight, output_error=error / of_weight) if of_weight and error else None
            nodes.append(node.model_copy(update={"measures": known}))
        return Document(**{name: getattr(stored, name) for name in Document.model_fields} | {"nodes": tuple(nodes)})

    best = sorted(errors, key=lambda path: errors[path])[:5]
    rows = Elements(render_page(measured(1e-3))).rows("worst")
    assert [(row[0], row[-1]) for row in rows] == [(path, f"{1e-3 / errors[path]:.2e}") for path in best]
    assert "Largest errors" not in render_page(measured(None))


def test_bits_per_weight_are_those_of_all_weights_together(stored: Document) -> None:
    known = [(node.bits_per_weight or 0, node.parameters or 0) for node in stored.listed]
    mean = sum(bits * count for bits, count in known) / sum(count for _, count in known)
    assert f"<dt>bits per weight, mean</dt><dd>{mean:.2f}</dd>" in render_page(stored)


def test_the_time_of_what_passes_do_together_is_shown(stored: Document, compiled: str) -> None:
    told = json.loads((Path(compiled) / "qcompiler.json").read_text(encoding="utf-8"))["timings"]["passes"]
    assert stored.pipeline is not None
    assert {run.name for run in stored.pipeline.passes} | {work.what for work in stored.pipeline.streaming} == (
        told.keys() - {"capture"}
    )
    page = render_page(stored)
    for work in stored.pipeline.streaming:
        assert f'<th scope="row">{work.what}</th><td class="words">while weights are streamed</td>' in page


def test_the_ledger_adds_up_or_says_what_is_missing(page: str) -> None:
    document = decoder(3)
    assert f"These are all the bytes of the files: {document.file_bytes:,}." in page
    short = document.model_copy(update={"ledger": (LedgerEntry(what="weights", bytes=1000),)})
    assert f"have {short.file_bytes:,} bytes: {short.file_bytes - 1000:,} are not accounted for" in render_page(short)


def test_a_document_with_only_nodes_has_a_page() -> None:
    bare = decoder(1).model_dump(include={"source", "model", "stage", "nodes"})
    page = render_page(Document.model_validate(bare))
    assert "No pipeline ran" in page
    assert "Nothing is known of bytes" in page


def test_the_command_writes_the_page_of_what_it_is_given(tmp_path: Path) -> None:
    document = decoder(1)
    export, page = tmp_path / "graph.json", tmp_path / "page.html"
    export.write_text(document.as_json(), encoding="utf-8")
    done = CliRunner().invoke(app, ["inspect", str(export), "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert page.read_text(encoding="utf-8") == render_page(document)


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", "no/such/model", "--html", str(tmp_path / "nowhere" / "page.html")])
    assert isinstance(done.exception, ConfigError)
    assert "there is no folder" in done.exception.message
    with pytest.raises(ConfigError, match=r"cannot be written: Is a directory"):
        write_page(decoder(1), tmp_path)


@pytest.mark.parametrize(("layers", "experts"), [(126, 0), (48, 128)])
def test_a_page_of_a_large_model_has_less_than_5_megabytes(layers: int, experts: int) -> None:
    assert len(render_page(decoder(layers, experts=experts)).encode()) < 5_000_000


def test_every_file_of_the_page_is_in_the_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    globs = project["tool"]["setuptools"]["package-data"]["qcompiler"]
    for file in (file for file in PAGE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")):
        name = str(file.relative_to(ROOT / "qcompiler"))
        assert any(fnmatch.fnmatchcase(name, glob) for glob in globs), name


def test_the_libraries_are_as_published_and_carry_their_licences(page: str) -> None:
    listed = json.loads((PAGE / "vendor" / "libraries.json").read_text(encoding="utf-8"))
    for library in listed:
        code = (PAGE / "vendor" / library["file"]).read_bytes()
        assert hashlib.sha256(code).hexdigest() == library["sha256"]
        licence = (PAGE / "vendor" / library["file"].replace(".js", ".LICENSE")).read_text(encoding="utf-8")
        assert licence.splitlines()[0] in page
        assert f"{library['package']} {library['version']}, {library['licence']}" in page
    there = {file.name for file in (PAGE / "vendor").iterdir()} - {"libraries.json"}
    assert there == {name for lib in listed for name in (lib["file"], lib["file"].replace(".js", ".LICENSE"))}


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_scripts_are_javascript() -> None:
    for script in sorted((PAGE / "src").glob("*.js")):
        done = subprocess.run(["node", "--check", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
