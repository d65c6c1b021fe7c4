"""A document as one self-contained HTML page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from qcompiler.errors import ConfigError
from qcompiler.inspection.document import Document, Measures, Node
from qcompiler.inspection.page.data import page_data
from qcompiler.show import human

_FOLDER = files("qcompiler.inspection.page")
_WORST = 5
_SCRIPTS = ("model.js", "grid.js", "graph.js", "details.js", "search.js", "main.js")


@dataclass(frozen=True, slots=True)
class Library:
    """A library that the page carries: its code, and the licence under which."""

    package: str
    version: str
    licence: str
    code: Markup
    licence_text: str


@dataclass(frozen=True, slots=True)
class Share:
    """A line of a table with a bar: bytes or seconds, and where its bar starts and how long it is, in percent."""

    what: str
    amount: float
    start: float
    length: float
    where: str = ""


def render_page(document: Document) -> str:
    """The document as HTML: everything is inside, nothing is loaded, and it runs from disk.

    A content security policy names the hash of each script and style, so no other runs, whatever the document says.
    """
    environment = Environment(
        loader=PackageLoader("qcompiler.inspection.page", "src"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"human": human}
    libraries = _libraries()
    scripts = [*(library.code for library in libraries), *(_source(name) for name in _SCRIPTS)]
    style = _source("page.css")
    ledger = _shares([(entry.what, entry.bytes, entry.where) for entry in document.ledger])
    passes = document.pipeline.passes if document.pipeline else ()
    streaming = document.pipeline.streaming if document.pipeline else ()
    return environment.get_template("page.html").render(
        document=document,
        data=page_data(document),
        listed=document.listed,
        ledger=ledger,
        ledger_bytes=sum(entry.bytes for entry in document.ledger),
        timings=_shares(
            [
                *((run.name, run.seconds or 0.0, run.stage) for run in passes),
                *((work.what, work.seconds, "") for work in streaming),
            ]
        ),
        title=_title(document.model.name),
        bits=_mean_bits(document.listed),
        worst=_worst(document.listed),
        libraries=libraries,
        scripts=scripts,
        script_hashes=[_hash(script) for script in scripts],
        style=style,
        style_hash=_hash(style),
    )


def write_page(document: Document, file: Path) -> None:
    """Write a document's page. Raises `ConfigError` where the file cannot be written."""
    page = render_page(document)
    try:
        file.write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror or error}", hint="choose another file") from error


def _title(name: str) -> str:
    """A model's name; of a folder, its own: what lies above it says nothing to whom the page is shared with."""
    return (Path(name).name or name) if name.startswith(("/", ".", "~")) else name


def _mean_bits(listed: Sequence[Node]) -> float | None:
    """Bits per weight of all that is listed, large ones counting as much more as they have weights."""
    known = [(node.bits_per_weight, node.parameters) for node in listed if node.bits_per_weight and node.parameters]
    weights = sum(count for _, count in known)
    return sum(bits * count for bits, count in known) / weights if weights else None


def _worst(listed: Sequence[Node]) -> list[tuple[Node, Measures]]:
    """The weights with the largest errors: of outputs where those were measured, else of themselves."""
    measured = [(node, node.measures) for node in listed if node.measures is not None and node.measures.error]
    by_output = any(measures.output_error is not None for _, measures in measured)

    def error(pair: tuple[Node, Measures]) -> float:
        return (pair[1].output_error if by_output else pair[1].error) or 0.0

    return sorted(measured, key=error, reverse=True)[:_WORST]


def _shares(parts: Sequence[tuple[str, float, str]]) -> list[Share]:
    whole = sum(amount for _, amount, _ in parts) or 1
    shares, start = [], 0.0
    for what, amount, where in parts:
        length = 100 * amount / whole
        shares.append(Share(what, amount, start, length, where))
        start += length
    return shares


def _libraries() -> list[Library]:
    folder = _FOLDER / "vendor"
    return [
        Library(
            package=entry["package"],
            version=entry["version"],
            licence=entry["licence"],
            code=_inline((folder / entry["file"]).read_text(encoding="utf-8")),
            licence_text=(folder / entry["file"].replace(".js", ".LICENSE")).read_text(encoding="utf-8"),
        )
        for entry in json.loads((folder / "libraries.json").read_text(encoding="utf-8"))
    ]


def _source(name: str) -> Markup:
    return _inline((_FOLDER / "src" / name).read_text(encoding="utf-8"))


def _inline(code: str) -> Markup:
    """A script or style of ours as it stands inside its element; a source map's address would lead nowhere."""
    return Markup(re.sub(r"^//# sourceMappingURL=.*$", "", code, flags=re.MULTILINE).strip())


def _hash(code: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode("ascii")
