"""What a recipe says of observers, gathered: here one pass chooses scales for all layers, and another ranges."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from passes.recipes.schema import Quantization
from qcompiler.errors import ConfigError
from qcompiler.pipeline.safe_yaml import Place

Statistic = Literal["minmax", "mse"]

_KNOWN: dict[str, Statistic] = {
    "minmax": "minmax",
    "static_minmax": "minmax",
    "memoryless_minmax": "minmax",
    "mse": "mse",
    "memoryless_mse": "mse",
}


@dataclass(slots=True)
class Observers:
    """The statistics that groups ask for, and in which words they are told of what differs."""

    differences: list[str]
    _weights: set[Statistic] = field(default_factory=set)
    _inputs: set[Statistic] = field(default_factory=set)
    _cache: set[Statistic] = field(default_factory=set)

    def weights(self, name: str | None, kwargs: Mapping[str, Any], place: Place) -> None:
        """How scales of weights are chosen: by their range, if nothing is said. A weight is seen once: no averages."""
        statistic = _KNOWN[_known(name, place)]
        self._weights.add(statistic)
        if statistic == "mse":
            said = f" with {', '.join(sorted(kwargs))}" if kwargs else ""
            self._tell(
                f"weights, observer {name}{said}: scales of least squared error, found on another grid than "
                "llm-compressor's, which takes errors to the power 2.4"
            )

    def inputs(self, name: str | None, place: Place) -> None:
        """How static ranges of inputs are observed."""
        self._inputs.add(self._range(name, "inputs", place))

    def cache(self, name: str | None, place: Place) -> None:
        """How ranges of keys and values are observed."""
        self._cache.add(self._range(name, "keys and values", place))

    def _range(self, name: str | None, what: str, place: Place) -> Statistic:
        """The other tool's default is a moving average of batches; only `static_minmax` sees all of them alike."""
        known = _known(name, place)
        statistic = _KNOWN[known]
        if known != "static_minmax":
            last = known.startswith("memoryless")
            asked = "of the last batch" if last else "averaged over batches, the last ones most"
            kind = "range of least squared error" if statistic == "mse" else "range"
            self._tell(f"{what}, observer {name or 'minmax'}: the {kind} of all data, not one {asked}")
        return statistic

    def options(self) -> dict[str, dict[str, str]]:
        """Options of passes that are not their defaults, by pass."""
        for what, asked in (("weights", self._weights), ("inputs", self._inputs), ("keys and values", self._cache)):
            if len(asked) > 1:
                self._tell(f"{what}: some ask for mse and some for minmax, and all get mse")
        observers = {"inputs": self._inputs, "kv_cache": self._cache}
        chosen = {
            "insert-observers": {key: "mse" for key, asked in observers.items() if "mse" in asked},
            "calibrate": {"scales": "mse"} if "mse" in self._weights else {},
        }
        return {name: options for name, options in chosen.items() if options}

    def _tell(self, text: str) -> None:
        if text not in self.differences:
            self.differences.append(text)


def overrides(modifier: Quantization, place: Place) -> dict[str, str]:
    """What a modifier says of the observers of all its groups, by `weights`, `input` and `output`."""
    alone = {"weights": modifier.weight_observer, "input": modifier.input_observer, "output": modifier.output_observer}
    said = {key: name for key, name in alone.items() if name is not None}
    if said and modifier.observer is not None:
        raise ConfigError(
            f"{place.at('observer')}: it says observers a second time, after those of {', '.join(said)}",
            hint="say them one way",
        )
    return said or {str(key): name for key, name in (modifier.observer or {}).items()}


def _known(name: str | None, place: Place) -> str:
    """The name as it stands in the table; the tool's own is read with any case, `-` and spaces for `_`."""
    plain = re.sub("[ -]", "_", (name or "minmax").lower())
    if plain not in _KNOWN:
        raise ConfigError(f"{place}: there is no observer like {name!r} here", hint=f"use one of: {', '.join(_KNOWN)}")
    return plain
