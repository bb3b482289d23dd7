"""Weights in 8 bits: the large linear layers of the denoising model's repeated blocks compute in float8 (torchao).

Weights are rounded once, with one scale for each output; inputs are rounded anew at every call, with one scale for each
token. What embeds, modulates, normalises or ends the model keeps bfloat16: it costs little time and much of the quality.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadModel

if TYPE_CHECKING:
    import torch

CAPABILITY = (8, 9)
"""CUDA compute capability from which on tensor cores multiply float8: Ada and Hopper."""

SIDES = 16
"""The float8 product wants both sides of a weight to be multiples of this."""

LEAST = 1e-12
"""The least magnitude that a row is scaled by. A row of zeros, as padding leaves them, would be divided by zero: NaN."""

KEPT_WORDS = ("norm", "mod", "ada", "embed", "time")
"""Parts of the names of layers inside a block that keep their precision: modulations under all their names."""


def refuse_without_float8(device: str) -> None:
    """Raises `BadModel` with the reason where a model cannot compute in fp8."""
    if not device.startswith("cuda"):
        raise BadModel(f"precision fp8 needs a GPU, and the model is on {device}; use bf16")
    if find_spec("torchao") is None:
        raise BadModel("precision fp8 needs torchao: pip install 'imagemill[fp8]', or use bf16")
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        has = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        raise BadModel(f"precision fp8 needs a GPU of compute capability 8.9 or later; {has}; use bf16")


def float8_config() -> Any:
    """torchao's way: both sides dynamic float8 (e4m3), a scale for each row.

    Without the settings of Inductor that torchao recommends: they time many variants of every kernel of the process, the
    decoder's too, which takes minutes, and workers that choose differently would make different pictures.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow(), activation_value_lb=LEAST, set_inductor_config=False
    )


def quantise(module: Any, config: Any = None) -> int:
    """Quantise the large linear layers inside the repeated blocks of a denoising model, in place; returns how many.

    `config` is one of torchao's, float8 unless given. Adapters that are to be merged later need the weights as they were:
    their `hold` comes before this. Raises `BadModel` when there is nothing to quantise.
    """
    import torch
    from torchao.quantization import quantize_

    chosen = candidates(module)
    if not chosen:
        raise BadModel(f"{type(module).__name__} has no linear layers that compute in fp8; use bf16")
    wanted = {id(layer) for layer in chosen}
    config = config or float8_config()
    with torch.inference_mode(False), torch.no_grad():
        for layer in chosen:
            layer.weight.copy_(without_empty_rows(layer.weight))
        quantize_(module, config, filter_fn=lambda layer, name: id(layer) in wanted)
    done = [layer for layer in chosen if is_quantised(layer)]
    for layer in done:
        layer._imagemill_config = config
    return len(done)


def without_empty_rows(weight: torch.Tensor) -> torch.Tensor:
    """The weight (outputs, inputs) with `LEAST` in place of the zeros of a row that has nothing else."""
    return weight.masked_fill(weight.abs().amax(1, keepdim=True) == 0, LEAST)


def candidates(module: Any) -> list[torch.nn.Linear]:
    """The linear layers that `quantise` takes: in a repeated block, of fitting sides, no modulation and no norm."""
    from torch.nn import Linear

    kinds = set(getattr(module, "_repeated_blocks", None) or ())
    blocks = [block for block in module.modules() if type(block).__name__ in kinds]
    return [
        layer
        for block in blocks
        for name, layer in block.named_modules()
        if type(layer) is Linear
        and layer.in_features % SIDES == 0
        and layer.out_features % SIDES == 0
        and not any(word in name.lower() for word in KEPT_WORDS)
    ]


def is_quantised(layer: Any) -> bool:
    """True for a layer that `quantise` has changed."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return bool(is_traceable_wrapper_subclass(layer.weight))


def set_weight(linear: Any, weight: torch.Tensor) -> None:
    """Write a weight (outputs, inputs) of full precision into a linear layer, in place and on the current stream; a
    quantised layer rounds it as it did its own.

    Type, shape and storage stay, so compiled code stays valid, and the host does not wait.
    """
    import torch

    with torch.no_grad():
        if is_quantised(linear):
            device, dtype = linear.weight.device, linear.weight.dtype
            overwrite(linear.weight, requantised(linear, weight.detach().to(device, dtype, non_blocking=True)))
        else:
            linear.weight.copy_(weight, non_blocking=True)


def requantised(linear: Any, weight: torch.Tensor) -> Any:
    """The weight as torchao keeps it for this layer."""
    from torch.nn import Linear, Parameter
    from torchao.quantization import quantize_

    stand_in = Linear(1, 1, bias=False, device="meta")
    stand_in.in_features, stand_in.out_features = linear.in_features, linear.out_features
    stand_in.weight = Parameter(without_empty_rows(weight), requires_grad=False)
    quantize_(stand_in, linear._imagemill_config)
    return stand_in.weight


def overwrite(old: Any, new: Any) -> None:
    """Copy the plain tensors inside one quantised weight into those of another. Raises `ValueError` when they differ in
    kind or shape."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if type(old) is not type(new):
        raise ValueError(f"{type(new).__name__} does not go into {type(old).__name__}")
    names = old.__tensor_flatten__()[0]
    if names != new.__tensor_flatten__()[0]:
        raise ValueError(f"the parts of two {type(old).__name__} differ")
    for name in names:
        place, found = getattr(old, name), getattr(new, name)
        if is_traceable_wrapper_subclass(place):
            overwrite(place, found)
        elif place.shape != found.shape or place.dtype != found.dtype:
            raise ValueError(f"{name} is {tuple(found.shape)} of {found.dtype}, not {tuple(place.shape)} {place.dtype}")
        else:
            place.copy_(found)
