"""The page in a browser: real clicks and keys, both themes, on paper, and as large as models get."""

from __future__ import annotations

import pytest

from qcompiler.inspection.document import Document
from qcompiler.inspection.read import read_graph
from tests.capture.models import captured
from tests.inspection.browser import EXECUTABLE, Show, cell, focused, text
from tests.inspection.documents import decoder

pytestmark = [
    pytest.mark.skipif(EXECUTABLE is None, reason="chromium is not installed"),
    pytest.mark.xdist_group("browser"),
]


def test_a_click_on_a_weight_tells_why_it_is_as_it_is(show: Show) -> None:
    page = show(decoder(3))
    page.click(cell(2, 7))
    told = text(page, "#details")
    assert "model.layers.1.mlp.down_proj" in told
    for fact in (
        "w:int8/g128",
        "assign: rule 1",
        "vllm-sm90 loads it, by kernel wna16",
        "64.00 KiB (65,536 bytes) of 128.00 KiB dense, 2.00 times",
        "l1.mlp.mul",
    ):
        assert fact in told
    assert text(page, "#block option:checked") == "layer 1"
    assert (
        page.run("document.querySelector('g.box.selected').getAttribute('aria-label')") == "mlp.down_proj w:int8/g128"
    )
    page.click("#details .link")  # what it reads
    assert "l1.mlp.mul" in text(page, "#details-title")


def test_the_grid_is_walked_by_keys_and_gives_the_focus_back(show: Show) -> None:
    page = show(decoder(3))
    page.click(cell(1, 1))
    assert focused(page).startswith("layer 0, self_attn.q_proj")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.press(key)
    assert focused(page).startswith("layer 1, self_attn.v_proj")
    page.press("End")
    assert focused(page).startswith("layer 1, mlp.down_proj")
    page.press("ArrowRight")
    assert focused(page).startswith("layer 1, mlp.down_proj")
    assert page.run("document.querySelectorAll('#grid td[tabindex=\"0\"]').length") == 1
    page.press("Enter")
    assert focused(page) == "details-title"
    page.press("Escape")
    assert focused(page).startswith("layer 1, mlp.down_proj")
    assert page.run("document.querySelector('#details').hidden")


def test_a_search_finds_marks_and_counts(show: Show) -> None:
    page = show(decoder(3))
    page.press("/")
    page.type("down layer:2")
    assert text(page, "#count") == "1 node"
    assert page.run("document.querySelectorAll('#grid td.hit').length") == 1
    page.press("ArrowDown")
    active = page.run("document.querySelector('#search').getAttribute('aria-activedescendant')")
    assert text(page, f"#{active}").startswith("model.layers.2.mlp.down_proj")
    page.press("Enter")
    assert text(page, "#details-title") == "model.layers.2.mlp.down_proj"
    page.press("/")
    page.type("nothing of the kind")
    assert text(page, "#count") == "0 nodes"
    page.press("Escape")
    assert text(page, "#count") == ""
    for query, count in (
        ("structure:mlp-output", 3),
        ("scheme:int", 21),
        ('scheme:"int"', 0),
        ("layer:1 op:linear", 7),
    ):
        page.type(query)
        assert text(page, "#count") == f"{count} nodes"
        page.press("Escape")


def test_the_legend_searches_for_its_scheme(show: Show) -> None:
    page = show(decoder(3))
    page.click("#legend li:nth-child(2) button")
    assert page.run("document.querySelector('#search').value") == 'scheme:"w:int8/g128"'
    assert page.run("document.querySelectorAll('#grid td.hit').length") == 3


def test_cells_show_errors_when_asked(show: Show) -> None:
    page = show(decoder(3))
    assert text(page, cell(1, 7)) == "w:int8/g128"
    page.click("#metrics label:has([value=error])")
    expected = next(node.measures for node in decoder(3).listed if node.path == "model.layers.0.mlp.down_proj")
    assert expected is not None
    assert float(text(page, cell(1, 7))) == pytest.approx(expected.error, rel=0.01)
    assert len({page.run(f"document.querySelector('{cell(1, n)}').className") for n in range(1, 8)}) > 1


def test_layers_that_are_alike_fold_to_one_row(show: Show) -> None:
    page = show(decoder(5))
    page.click("#fold")
    assert text(page, "#grid tbody tr th") == "0\N{EN DASH}4"
    assert page.run("document.querySelectorAll('#grid tbody tr').length") == 2
    page.click(cell(1, 7))
    assert "w:int8/g128 \N{MULTIPLICATION SIGN}5" in text(page, "#details")
    assert "bytes each\n64.00 KiB" in text(page, "#details")
    assert "bytes in all\n320.00 KiB" in text(page, "#details")


def test_a_block_is_drawn_with_its_edges_and_groups(show: Show) -> None:
    page = show(decoder(3))
    names = page.run("[...document.querySelectorAll('g.box .name')].map((name) => name.textContent.trim())")
    # fmt: off
    assert sorted(names) == sorted([
        "from model.embed_tokens", "input_norm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "sdpa",
        "self_attn.o_proj", "add", "post_norm", "mlp.gate_proj", "mlp.up_proj", "mul", "mlp.down_proj", "add",
        "to layer 1",
    ])
    # fmt: on
    across = "[...document.querySelectorAll('g.box')].map((box) => box.getBoundingClientRect().x)"
    left = dict(zip(names, page.run(across), strict=True))
    assert left["self_attn.q_proj"] < left["self_attn.k_proj"] < left["self_attn.v_proj"]
    assert page.run("document.querySelectorAll('#drawing .edge').length") == 19
    assert page.run("document.querySelectorAll('#drawing .cluster.fusion').length") == 2
    assert page.run("document.querySelectorAll('#drawing .cluster.input').length") == 1
    page.click("#every")
    assert page.run("document.querySelectorAll('g.box').length") == 15 + 3 + 1  # the views, and the mask
    page.click("#after")
    assert text(page, "#block option:checked") == "layer 1"
    assert "l1.qkv" in text(page, "#groups")


def test_the_drawing_zooms_and_is_walked_by_keys(show: Show) -> None:
    page = show(decoder(3))
    page.click("g.box[aria-label^=input_norm]")
    page.press("ArrowDown")
    page.press("ArrowRight")
    assert focused(page).startswith("self_attn.v_proj")
    scale = "document.querySelector('#drawing > g').transform.baseVal.consolidate().matrix.a"
    page.press("+")
    assert page.run(scale) == pytest.approx(1.3)
    page.click("g.box[aria-label^=post_norm]")  # its details take room from the drawing, not its place
    assert page.run(scale) == pytest.approx(1.3)
    page.press("0")
    assert page.run(scale) == 1


def test_the_largest_errors_lead_to_their_weights(show: Show, stored: Document) -> None:
    page = show(stored)
    path = text(page, "#worst tbody th")
    page.click("#worst tbody button")
    assert text(page, "#details-title") == path
    assert focused(page) == "details-title"
    page.press("Escape")
    assert text(page, "#worst tbody tr:first-child button:focus") == path


def test_a_drawing_in_a_narrow_window_is_scrolled_not_shrunk_to_nothing(show: Show) -> None:
    page = show(decoder(3))
    page.send("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=1, mobile=False)
    try:
        page.click("#fit")
        sizes = "((svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)"
        assert page.run(f"{sizes}(document.querySelector('#drawing'))") >= 0.65
        assert page.run("document.documentElement.scrollWidth") <= 400
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")


def test_a_compiled_checkpoint_tells_its_rules_groups_and_errors(show: Show, stored: Document) -> None:
    page = show(stored)
    last = next(node for node in stored.listed if node.structure == "mlp-output" and node.layer == 3)
    page.press("/")
    page.type(f"{last.path} ")
    page.press("Enter")
    told = text(page, "#details")
    assert last.measures is not None
    assert last.measures.error is not None
    assert f"{last.measures.error:.1e}".split("e")[0] in told
    for candidate in last.candidates:
        assert f"{candidate.outcome}: {candidate.who}" in told
    assert {candidate.outcome for candidate in last.candidates} == {"decides", "overridden"}
    assert "Made of" in told
    whole = stored.file_bytes
    assert f"{whole:,}" in text(page, "#ledger-sum")


def test_a_search_for_a_weight_of_an_expert_finds_the_block_that_stands_for_it(show: Show) -> None:
    document = read_graph(captured("mixtral"))
    experts = document.find("model.layers.1.mlp.experts").experts
    assert experts is not None
    page = show(document)
    page.press("/")
    for query, count in (
        ("experts.1.down_proj", 2),
        ("model.layers.1.mlp.experts.0.gate_proj", 1),
        ("path:experts.1.down_proj layer:0", 1),
        (f"experts.{experts.count}.down_proj", 0),
        ("experts.1.no_proj", 0),
    ):
        page.type(query)
        assert text(page, "#count").split()[0] == str(count), query
        page.press("Escape")
    page.type("model.layers.1.mlp.experts.0.up_proj")
    page.press("Enter")
    assert text(page, "#details-title") == "model.layers.1.mlp.experts"
    told = text(page, "#details")
    assert f"{experts.count}, run as one node" in told
    assert f"model.layers.1.mlp.experts.{{0\N{EN DASH}{experts.count - 1}}}.up_proj" in told
    names = page.run("[...document.querySelectorAll('g.box .name')].map((name) => name.textContent.trim())")
    assert f"mlp.experts ({experts.count} in one)" in names


def test_details_lead_from_weight_to_weight(show: Show) -> None:
    page = show(read_graph(captured("llama")))
    page.press("/")
    page.type("model.layers.0.mlp.down_proj ")
    page.press("Enter")
    sections = page.run(
        "Object.fromEntries([...document.querySelectorAll('#details section')].map((section) =>"
        " [section.querySelector('h3').innerText, section.innerText]))"
    )
    assert "model.layers.0.mlp.gate_proj" in sections["Made of"]
    assert "model.layers.0.mlp.up_proj" in sections["Made of"]
    assert sections["Feeds"].endswith("the residual stream")
    assert "model.layers.1" not in sections["Feeds"]


def test_names_made_to_break_out_are_shown_and_run_nothing(show: Show) -> None:
    hostile = "</script><img src=x onerror=alert(1)>"
    page = show(decoder(2, name=hostile, root=hostile))
    page.click(cell(1, 1))
    page.press("/")
    page.type("<img")
    assert text(page, "h1") == hostile
    assert text(page, "#details-title") == f"{hostile}.0.self_attn.q_proj"
    assert text(page, "#hits li").startswith(hostile)
    assert page.run("document.querySelectorAll('img').length") == 0


CONTRASTS = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const channels = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const parts = channels(colour).slice(0, 3).map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (channels(colour)[3] === 255) return colour;
    }
  };
  const low = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest('svg, .hidden, .skip')) continue;
    if (!element.checkVisibility()) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push([texts.currentNode.data, element.className, contrast]);
  }
  return low;
})()
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_can_be_read(show: Show, theme: str) -> None:
    page = show(decoder(3))
    try:
        page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 64)"
        assert page.run(dark) is (theme == "dark")
        page.click(cell(1, 1))
        assert page.run(CONTRASTS) == []
        page.click("#metrics label:has([value=error])")
        page.press("/")
        page.type("down")
        assert page.run(CONTRASTS) == []
        page.click("#theme")
        page.press("Escape")
        page.run("document.querySelector('#theme').value = 'light'")
        page.run("document.querySelector('#theme').dispatchEvent(new Event('change'))")
        assert page.run(dark) is False
    finally:
        page.send("Emulation.setEmulatedMedia", features=[])


def test_what_is_printed_is_all_of_the_grid_and_of_the_drawing(show: Show) -> None:
    page = show(decoder(80))
    page.click("#fold")  # so many layers are folded at first
    page.send("Emulation.setEmulatedMedia", media="print")
    try:
        page.run("dispatchEvent(new Event('beforeprint'))")
        assert page.run(
            "(({scrollHeight, clientHeight}) => scrollHeight === clientHeight)(document.querySelector('#grid-frame'))"
        )
        frame, drawn = (
            page.run(f"(({{x, y, width, height}}) => [x, y, x + width, y + height])({box}.getBoundingClientRect())")
            for box in ("document.querySelector('.frame')", "document.querySelector('#drawing > g')")
        )
        assert frame[0] <= drawn[0]
        assert frame[1] <= drawn[1]
        assert drawn[2] <= frame[2]
        assert drawn[3] <= frame[3]
        assert not page.run("document.querySelector('#search').checkVisibility()")
    finally:
        page.send("Emulation.setEmulatedMedia", media="")
