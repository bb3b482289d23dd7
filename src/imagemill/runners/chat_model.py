"""From a model folder of transformers to a vision-language model that answers greedily, and what memory it takes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from imagemill.devices import host_memory
from imagemill.errors import BadModel
from imagemill.records import ModelSpec
from imagemill.runners import loading
from imagemill.runners.diffusion import process_memory
from imagemill.runners.importing import collector_paused

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
"""Kinds of models whose processor wants torchvision: for videos, and because its settings name a class that uses it."""

QWEN_PICTURE = "<|image_pad|>"
log = logging.getLogger(__name__)


def import_classes() -> None:
    """Import what loading takes most of its first seconds for."""
    with collector_paused():
        from transformers import AutoModelForImageTextToText, AutoProcessor

    log.debug("found %s and %s", AutoModelForImageTextToText.__name__, AutoProcessor.__name__)


def load_processor(spec: ModelSpec) -> Any:
    """The processor of the folder: tokenizer, pictures, chat template. Raises `BadModel` when it can never load."""
    from transformers import AutoProcessor

    folder = Path(spec.folder)
    config = read_config(folder)
    try:
        processor = AutoProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        # A class of its own for videos or for pictures may want it; the one is an ImportError, the other a ValueError.
        if not isinstance(error, ImportError) and "torchvision" not in str(error):
            raise loading.refusal(folder, error) from error
        if config.get("model_type") not in QWEN:
            raise BadModel(f"{folder}: its processor lacks a library: {' '.join(str(error).split())[:300]}") from error
        log.info("torchvision is not there: pictures are read without it")
        processor = _qwen_processor(folder)
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise BadModel(f"{folder} has no {part}; it must be a model that takes pictures and text")
    tokenizer = processor.tokenizer
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        raise BadModel(f"{folder} has no chat template; take a model that was trained to answer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # what is padded is masked, so any token will do
    return processor


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`. Raises `BadModel` when it is not there or does not read."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadModel(f"{folder}/config.json does not read: {error}") from error
    if not isinstance(config, dict):
        raise BadModel(f"{folder}/config.json holds no object")
    return config


def _qwen_processor(folder: Path) -> Any:
    """A processor of the same parts but for videos. `PaddleOCRVLProcessor` fills in a picture's tokens as Qwen's does."""
    from transformers import AutoTokenizer, PaddleOCRVLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    here = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **here)
        if getattr(tokenizer, "image_token", None) is None:
            marks = {"image_token": QWEN_PICTURE}
            tokenizer = AutoTokenizer.from_pretrained(str(folder), extra_special_tokens=marks, **here)
        reader = Qwen2VLImageProcessorPil.from_pretrained(str(folder), local_files_only=True)
        template = _own_template(folder) or tokenizer.chat_template
        return PaddleOCRVLProcessor(reader, tokenizer, chat_template=template)
    except Exception as error:
        raise loading.refusal(folder, error) from error


def _own_template(folder: Path) -> str | None:
    if (place := folder / "chat_template.jinja").is_file():
        return place.read_text("utf-8")
    if (place := folder / "chat_template.json").is_file():
        template = json.loads(place.read_text("utf-8")).get("chat_template")
        return template if isinstance(template, str) else None
    return None


def load_model(spec: ModelSpec, device: str, processor: Any, *, spread: bool) -> Any:
    """The model on the device, or over all GPUs that are seen, set to answer greedily.

    Raises `BadModel` when the folder can never load; whatever the device raises when it has no room.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder, dtype = Path(spec.folder), loading.choose_dtype(spec.dtype, device)
    where = "auto" if spread else {"": device}
    model = loading.load_complete(
        folder, transformers.AutoModelForImageTextToText, dtype, trust_remote_code=False, device_map=where
    )
    loading.refuse_gaps("the model", model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise BadModel(f"{folder}: {type(model).__name__} is no chat model; take one that answers in its own sequence")
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else processor.tokenizer.eos_token_id
    # The folder's own temperature is left out, and its penalty on repetition too: that one counts the padding.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, bos_token_id=own.bos_token_id, eos_token_id=ends, pad_token_id=processor.tokenizer.pad_token_id
    )
    return model if spread else loading.free_to_move(model)


# --- memory -----------------------------------------------------------------------------------------------------------


def sequence_memory(model: Any, tokens: int) -> int:
    """About the bytes that one sequence of that many tokens takes: its cache of keys and values, the activations of the
    widest layer while the prompt is read, and as much again for the part of the model that sees."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    cache = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    active = 8 * config.hidden_size + 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return int(2 * tokens * (cache + active) * model.dtype.itemsize)


def free_memory(model: Any) -> int:
    """Bytes that are free where the model is; of a spread one, where there is least, times its devices."""
    import torch

    places = {parameter.device for parameter in model.parameters()}
    if any(place.type != "cuda" for place in places):
        return host_memory()[0]
    free = []
    for place in places:
        unused = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        free.append(torch.cuda.mem_get_info(place)[0] + unused)
    return int(min(free)) * len(free)


def used_memory(device: str) -> tuple[int, int]:
    """Bytes now, and at the peak since the last call, on the device (`cuda`: on all that are seen). On the CPU: of the
    process, its peak since it started."""
    if not device.startswith("cuda"):
        return process_memory()
    import torch

    if not torch.cuda.is_initialized():
        return 0, 0
    places = [torch.device(device)] if ":" in device else [torch.device(n) for n in range(torch.cuda.device_count())]
    now = sum(torch.cuda.memory_allocated(place) for place in places)
    peak = sum(torch.cuda.max_memory_allocated(place) for place in places)
    for place in places:
        torch.cuda.reset_peak_memory_stats(place)
    return now, peak
