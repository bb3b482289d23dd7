"""Which of diffusers' attention back ends a model uses: the fastest that is installed, or the one that is asked for.

Nothing is downloaded: back ends that come from the network (`*_hub`) are refused. Most of the fast ones take no mask,
which a batch of captions of different lengths has; a call with a mask then goes to torch's own attention instead.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagemill.errors import BadModel, OutOfMemory, WorkerGone, classify
from imagemill.records import Tuning

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

NATIVE = "native"
CANDIDATES = (NATIVE, "_native_cudnn", "_flash_3", "flash")
"""What `auto` tries: torch's own choice, cuDNN, FlashAttention 3 and 2."""

NO_MASK = (
    "_native_cudnn",
    "_native_flash",
    "flash",
    "_flash_3",
    "sage",
    "_sage_qk_int8_pv_fp8_cuda",
    "_sage_qk_int8_pv_fp8_cuda_sm90",
    "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
)
"""Back ends whose calls with a mask go to torch's own: they raise for one, ignore it, or take only some shapes of it."""

NATIVE_ARGUMENTS = ("dropout_p", "is_causal", "scale", "enable_gqa")

TIE = 0.03
"""A back end must be faster than torch's own by more than this share of the time."""

AGREEMENT = 2**-6
"""How far a result may be from torch's own, as a share of its norm: several roundings to bfloat16 (2**-9 each)."""

PATCH = 16
"""Pixels along each side of an image token, with nearly all models."""

TOKENS = 4096
"""Tokens of a picture of 1024x1024, for models whose pictures have no known size."""

ROUNDS, CALLS = 5, 8


@dataclass(frozen=True, slots=True)
class Load:
    """What attention computes in a model: heads, their width, and the tokens of its largest picture."""

    heads: int
    width: int
    tokens: int


def set_up(transformer: Any, tuning: Tuning, device: str) -> list[str]:
    """Set the attention back end that `tuning` asks for; a line that says which and why, none where nothing changed.

    Raises `BadModel` for a name that diffusers does not know or that cannot run here.
    """
    if tuning.attention == "auto" and not device.startswith("cuda"):
        return []
    if not hasattr(transformer, "set_attention_backend"):
        return refuse_forced(f"{type(transformer).__name__} has no choice of attention back ends", tuning)
    load = load_of(transformer, tuning.sizes)
    if load is None:
        return refuse_forced(f"{type(transformer).__name__} has no attention of a known kind", tuning)
    if tuning.attention != "auto":
        check(tuning.attention, transformer, device)
        use(transformer, tuning.attention)
        return [f"attention by {tuning.attention}, as asked"]
    times = probe(load, device)
    name = fastest(times)
    if name != NATIVE:
        use(transformer, name)
    return [f"attention by {name}: {described(times)}"]


def refuse_forced(reason: str, tuning: Tuning) -> list[str]:
    """The reason as a line; raised when a back end was asked for."""
    if tuning.attention != "auto":
        raise BadModel(f"attention {tuning.attention}: {reason}; use auto")
    return [f"attention as it is: {reason}"]


def load_of(transformer: Any, sizes: Sequence[tuple[int, int]]) -> Load | None:
    """The load of the model's attention at the largest of the sizes; None for a model built of other parts."""
    for module in transformer.modules():
        heads, width = getattr(module, "heads", None), getattr(getattr(module, "to_q", None), "out_features", None)
        if isinstance(heads, int) and isinstance(width, int):
            tokens = max((across * down // PATCH**2 for across, down in sizes), default=TOKENS)
            return Load(heads, width // heads, tokens)
    return None


def check(name: str, transformer: Any, device: str) -> None:
    """Raises `BadModel` unless a small call with this back end works here; the message names those with which it does."""
    import torch

    load = load_of(transformer, [(256, 256)])
    dtype = next((one.dtype for one in transformer.parameters() if one.is_floating_point()), torch.float32)
    assert load is not None, "the caller has looked"
    reason = failure(name, load, device, dtype)
    if reason:
        able = [one for one in names() if not failure(one, load, device, dtype)]
        raise BadModel(f"attention {name}: {reason}; here work auto, {', '.join(able)}")


def names() -> list[str]:
    """The back ends of diffusers that need no download."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return [one.value for one in AttentionBackendName if not one.value.endswith("_hub")]


def failure(name: str, load: Load, device: str, dtype: torch.dtype) -> str:
    """Why a small call fails with this back end; empty when it works."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements

    if name.endswith("_hub"):
        return "it would have to be downloaded, and nothing is"
    if name not in names():
        return "diffusers knows no such back end"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a call that is only tried
            _check_attention_backend_requirements(AttentionBackendName(name))
            result = attend(name, random_load(load, device, dtype))
    except Exception as error:
        raise_if_lost(error)
        return " ".join(str(error).split())[:200] or type(error).__name__
    return "" if bool(result.isfinite().all()) else "its result is not finite"


def use(transformer: Any, name: str) -> None:
    """Set the back end on every attention of the model, safe with masks."""
    if name in NO_MASK:
        make_masks_native(name)
    transformer.set_attention_backend(name)


def make_masks_native(name: str) -> None:
    """From now on diffusers' calls of this back end that have a mask go to torch's own attention, in this process."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backends = _AttentionBackendRegistry._backends
    fast, native = backends[AttentionBackendName(name)], backends[AttentionBackendName(NATIVE)]
    if not hasattr(fast, "takes_no_mask"):
        backends[AttentionBackendName(name)] = masks_to(native, fast)


def masks_to(native: Any, fast: Any) -> Any:
    """`fast` for calls without a mask, `native` for those with one."""

    def chosen(query: Any, key: Any, value: Any, attn_mask: Any = None, **rest: Any) -> Any:
        if attn_mask is None:
            return fast(query=query, key=key, value=value, **rest)
        known = {argument: rest[argument] for argument in NATIVE_ARGUMENTS if argument in rest}
        return native(query=query, key=key, value=value, attn_mask=attn_mask, **known)

    chosen.takes_no_mask = fast  # type: ignore[attr-defined]
    return chosen


# --- the choice -------------------------------------------------------------------------------------------------------


def fastest(times: Mapping[str, float]) -> str:
    """The name with the least seconds; torch's own unless another is faster by more than `TIE`."""
    best = min(times, key=times.__getitem__, default=NATIVE)
    own = times.get(NATIVE)
    return NATIVE if own is not None and times[best] >= own * (1 - TIE) else best


def described(times: Mapping[str, float]) -> str:
    """The measured times for people."""
    return ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in times.items()) or "none could be measured"


def probe(load: Load, device: str) -> dict[str, float]:
    """Seconds of one call on a GPU for each candidate that works there and agrees with torch's own attention."""
    import torch

    able = [name for name in CANDIDATES if not failure(name, Load(load.heads, load.width, 256), device, torch.bfloat16)]
    with torch.inference_mode():
        try:
            inputs = random_load(load, device, torch.bfloat16)
            own = attend(NATIVE, inputs)
            alike = [name for name in able if agrees(attend(name, inputs), own)]
            return {name: min(seconds(name, inputs, device) for _ in range(ROUNDS)) for name in alike}
        except Exception as error:
            raise_if_lost(error)
            log.warning("attention back ends could not be measured: %s", error)
            return {}


def raise_if_lost(error: Exception) -> None:
    """Raises the error again when the device can compute no more, or has no room even for this."""
    if isinstance(classify(error), OutOfMemory | WorkerGone):
        raise error


def random_load(load: Load, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Query, key and value (1, tokens, heads, width)."""
    import torch

    shape = (1, load.tokens, load.heads, load.width)
    source = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=source, device=device, dtype=dtype) for _ in range(3)]


def attend(name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """One call of diffusers' attention with this back end."""
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    query, key, value = inputs
    result: torch.Tensor = dispatch_attention_fn(query, key, value, backend=AttentionBackendName(name))
    return result


def agrees(result: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether two results differ by no more than rounding."""
    return bool((result.float() - own.float()).norm() <= AGREEMENT * own.float().norm())


def seconds(name: str, inputs: Sequence[torch.Tensor], device: str) -> float:
    """Of one call on a GPU, after some that are not counted."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        for _ in range(CALLS):
            attend(name, inputs)
        begin.record()
        for _ in range(CALLS):
            attend(name, inputs)
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / CALLS
