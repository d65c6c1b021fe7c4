"""Twins: the architecture of a config at a tiny size, to run where the real model exists only on the meta device."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qcompiler.capture.buffers import non_persistent_buffers
from qcompiler.capture.twin_layers import counts_layers, keep_layers
from qcompiler.capture.twin_sizes import shrink_sizes
from qcompiler.errors import CaptureError, ConfigError, SizeError
from qcompiler.limits import check_bytes


def shrink(config: PreTrainedConfig, *, layers: int | None = None) -> PreTrainedConfig:
    """A copy of `config` with tiny sizes and the same graph.

    Kept: the kinds of the kept layers and their order, attention type, grouped-query and expert routing, latent
    attention, windows, norms, biases, tying, rotary types, scales, softcaps; sizes that were equal, sums or multiples
    of one another. Windows and other thresholds counted in tokens become 4, so that a short sequence crosses them.
    A checkpoint's `quantization_config` is dropped.

    layers: the decoder layers to keep, from the first. `None`: the fewest, two at least, that show every kind of layer.
    Raises `ConfigError` for `layers < 1`, `CaptureError` for a config that is not one of a single decoder.
    """
    if layers is not None and layers < 1:
        raise ConfigError(f"a twin of {layers} layers", hint="layers is 1 or more")
    parts = [key for key, part in vars(config).items() if isinstance(part, PreTrainedConfig) and counts_layers(part)]
    if parts or config.is_encoder_decoder:
        raise CaptureError(
            f"{type(config).__name__} is not the config of one decoder: it has "
            + (", ".join(parts) if parts else "an encoder and a decoder"),
            hint="take its decoder's: config.get_text_config(decoder=True)",
        )
    twin = copy.deepcopy(config)
    if hasattr(twin, "quantization_config"):
        del twin.quantization_config
    keep_layers(twin, layers)
    shrink_sizes(twin)
    return twin


def build_twin(
    config: PreTrainedConfig,
    *,
    layers: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of `shrink(config, layers=layers)`, with random weights: see `with_random_weights`."""
    twin = shrink(config, layers=layers)
    return with_random_weights(twin, seed=seed, dtype=dtype, trust_remote_code=trust_remote_code)


def with_random_weights(
    config: PreTrainedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a config on the CPU, in eval mode.

    The weights are such that forgetting one changes the logits: attention is not uniform, norms are neither all ones
    nor all zeros, biases and routing corrections are not zero. Equal seeds give equal weights; the global generator is
    left as it was. Raises `CaptureError` when the class refuses the config, `SizeError` when the model is not small.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                bare = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            check_bytes(f"a tiny {type(bare).__name__}", (*bare.parameters(), *bare.buffers()))
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        except SizeError:
            raise
        except Exception as error:
            raise CaptureError(
                f"no tiny model of {type(config).__name__}: {type(error).__name__}: {error}",
                hint="load the weights, so that the graph is compared with the model itself",
            ) from error
        _randomize(model)
    for path, value in non_persistent_buffers(bare).items():
        # As `from_pretrained` computes them, which need not be how the constructor does in a narrow dtype.
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._buffers[name] = value
    return model.eval()


@torch.no_grad()
def _randomize(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            # Unit gain up to the aspect ratio, whichever of the two dimensions is the input (Conv1D, fused experts).
            rows, columns = parameter.shape[-2:]
            parameter.normal_(std=(rows * columns) ** -0.25)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.25)
    persistent = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point() and buffer.dim() == 1 and buffer.numel() > 1:
            buffer.add_(torch.randn_like(buffer), alpha=0.25)  # e.g. the correction bias of a router
