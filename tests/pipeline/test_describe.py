"""`qcompiler passes` says of every pass its stages, what it does, and every option with its values and default."""

from __future__ import annotations

from qcompiler.options import options_of, tables_below
from qcompiler.pipeline.describe import describe_passes, describe_pipelines
from qcompiler.pipeline.registry import packaged_pipelines, pass_classes


def sections() -> dict[str, list[str]]:
    """The lines about each pass, by its name."""
    found: dict[str, list[str]] = {}
    for line in describe_passes().splitlines():
        if line and not line.startswith(" "):
            found[line.split()[0]] = lines = []
        lines.append(line)
    return found


def test_every_pass_is_described_with_its_stages_and_its_words() -> None:
    found = sections()
    assert list(found) == sorted(pass_classes())
    assert found["assign"][:2] == [
        "assign  (captured or annotated -> annotated)",
        "  Give every linear that a rule selects its scheme.",
    ]
    assert found["legalize"][0] == "legalize  (annotated)"
    for name, cls in pass_classes().items():
        said = found[name][1].strip()
        assert said in str(cls.__doc__)
        assert not said.startswith(f"{cls.__name__}("), f"{name} says only what `dataclass` makes up"


def test_every_option_is_described_in_its_place() -> None:
    found = sections()
    for name, cls in pass_classes().items():
        for option in options_of(cls):
            assert any(line.startswith(f"    {option.name}: ") for line in found[name])
        for table in filter(options_of, tables_below(cls)):
            title = getattr(table, "name", None)  # what is chosen by name is described under it
            start = found[name].index(f"    {title if isinstance(title, str) else table.__name__}:")
            lines = found[name][start + 1 : start + 1 + len(options_of(table))]
            assert [line.partition(":")[0] for line in lines] == [
                f"      {option.name}" for option in options_of(table)
            ]


def test_types_and_defaults_read_as_yaml() -> None:
    found = sections()
    assert "    rules: [Rule, ...] = []" in found["assign"]
    assert "    kv_cache: KVCacheSpec | null = null" in found["assign"]
    assert "    on_indivisible: error | channel | dense = error" in found["assign"]
    assert "      select: Select" in found["assign"]
    assert "      override: bool = false" in found["assign"]
    assert "      solver: rtn | gptq = rtn" in found["assign"]
    assert "      class: [text, ...] | null = null" in found["assign"]
    assert any("attention-input | attention-output" in line for line in found["assign"])
    assert "    percentile: float = 99.99" in found["insert-observers"]
    assert "    target: text = vllm-sm90" in found["legalize"]


def test_every_packaged_pipeline_is_listed_with_its_description() -> None:
    lines = describe_pipelines().splitlines()
    assert lines[0] == "packaged pipelines"
    assert [line.split()[0] for line in lines[1:]] == list(packaged_pipelines())
    assert any(
        line.endswith("  MLP outputs in 8-bit integers, all else in asymmetric 4-bit integers, groups of 128, by GPTQ.")
        for line in lines
    )
