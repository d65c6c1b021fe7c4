"""Print the schemes that llm-compressor's recipes attach to a model's modules, as JSON. Runs in its environment.

python schemes_of_peer.py MODEL RECIPE...
"""

import json
import sys
from typing import Any

import torch
from llmcompressor.modifiers.quantization import QuantizationMixin
from llmcompressor.recipe import Recipe
from transformers import AutoConfig, AutoModelForCausalLM


def main() -> None:
    folder, *recipes = sys.argv[1:]
    found = {}
    for recipe in recipes:
        try:
            modifiers = Recipe.create_instance(recipe).modifiers
        except ValueError as error:  # pydantic's are: words of older releases
            found[recipe] = {"refused": str(error)}
            continue
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        found[recipe] = schemes(model, modifiers)
    print(json.dumps(found))


def schemes(model: torch.nn.Module, modifiers: list[Any]) -> dict[str, Any]:
    """The scheme of every module that gets one, by its name, and of the KV cache."""
    cache = None
    for modifier in modifiers:
        if isinstance(modifier, QuantizationMixin) and modifier.has_config():
            modifier.initialize_quantization(model)
            cache = modifier.kv_cache_scheme or cache
    attached = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_modules()}
    found = {name: scheme.model_dump(mode="json") for name, scheme in attached.items() if scheme and scheme.weights}
    return found | ({"kv_cache": {"weights": cache.model_dump(mode="json")}} if cache is not None else {})


if __name__ == "__main__":
    main()
