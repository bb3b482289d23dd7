"""Floating-point operations that a picture takes, stage by stage, from the configurations of a model folder.

    python bench/operations.py FOLDER TASKS.jsonl

Counted as torch's FlopCounterMode counts: two for each multiplication of a matrix product, a convolution or an attention,
nothing for norms, activations and sums; attention is counted whole, also where a mask makes half of it zero. Transformers go
by a formula of their sizes, which `tests/unit/test_bench_throughput.py` holds against FlopCounterMode. Autoencoders are
counted by FlopCounterMode itself on the meta device at two small sizes: convolutions grow with the pixels P and the
attention in the middle with P², so a·P + b·P² through two points is exact.

What a pipeline need not do is left out: text is counted in steps of 32 tokens, not padded to 512; no vocabulary head.

Formulas (d width, T tokens; `linear(i, o)` is i·o multiplications a token):
  attention                2·2·T²·d             (scores, weighted sum; each 2 operations a multiplication)
  Z-Image block            2·T·(q, k, v, out + 3 feed-forward matrices of 8d/3) + attention + one modulation
  Qwen-Image block         2·(N + T)·(4·d² + 8·d²) + attention over N + T + two modulations d → 6d
  Qwen3, Qwen2.5 layer     2·T·(q, k, v, out + 3 feed-forward matrices) + attention
  Qwen2.5-VL vision layer  the same over patches of 14², attention inside windows of 8² patches but for four layers
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

BUCKET = 32
"""Z-Image pads captions and picture tokens to multiples of this."""

PATCH = 14
WINDOW = 8
"""Qwen2.5-VL: pixels of a patch's side, patches of a window's side (`window_size` 112)."""

TERA = 1e12
Config = Mapping[str, Any]
Stages = dict[str, float]


# --- transformers: formulas -------------------------------------------------------------------------------------------


def padded(tokens: int) -> int:
    """Up to the next multiple of `BUCKET`."""
    return -(-tokens // BUCKET) * BUCKET


def z_image_forward(config: Config, width: int, height: int, text: int) -> float:
    """One forward of `ZImageTransformer2DModel` for one picture; sizes in pixels, `text` in tokens."""
    d, patch, channels = int(config["dim"]), int(config["all_patch_size"][0]), int(config["in_channels"])
    image, text = padded((width // 8 // patch) * (height // 8 // patch)), padded(text)
    small = min(d, 256)
    key_value = d * config["n_kv_heads"] // config["n_heads"]
    matrices = 2 * d * d + 2 * d * key_value + 3 * d * int(d / 3 * 8)

    def block(tokens: int, modulated: bool) -> float:
        return 2 * tokens * matrices + 4 * tokens**2 * d + modulated * 2 * small * 4 * d

    refiners, layers, pixels = config["n_refiner_layers"], config["n_layers"], patch * patch * channels
    return (
        2 * (256 * 1024 + 1024 * small)
        + 2 * image * pixels * d
        + 2 * text * config["cap_feat_dim"] * d
        + refiners * (block(image, True) + block(text, False))
        + layers * block(image + text, True)
        + 2 * small * d
        + 2 * (image + text) * d * pixels
    )


def qwen_image_forward(config: Config, image: int, text: int) -> float:
    """One forward of `QwenImageTransformer2DModel`; `image` are target and source tokens together."""
    d = config["num_attention_heads"] * config["attention_head_dim"]
    pixels = config["in_channels"]
    both = image + text
    block = 2 * both * 12 * d * d + 4 * both**2 * d + 2 * 2 * d * 6 * d
    ends = image * pixels * d + text * config["joint_attention_dim"] * d
    out = image * d * config["patch_size"] ** 2 * config["out_channels"] + d * 2 * d
    return config["num_layers"] * block + 2 * (ends + out + 256 * d + d * d)


def decoder_forward(config: Config, tokens: int) -> float:
    """A Qwen text model over a prompt, without its vocabulary head."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or d // heads
    matrices = d * size * (2 * heads + 2 * config["num_key_value_heads"]) + 3 * d * config["intermediate_size"]
    return config["num_hidden_layers"] * (2 * tokens * matrices + 4 * tokens**2 * heads * size)


def vision_forward(config: Config, rows: int, columns: int) -> float:
    """The part of Qwen2.5-VL that sees, for one picture of rows × columns patches."""
    d, patches = config["hidden_size"], rows * columns
    full = len(config["fullatt_block_indexes"])
    windows = _squares(rows) * _squares(columns)
    layer = 2 * patches * (4 * d * d + 3 * d * config["intermediate_size"])
    attention = 4 * d * (full * patches**2 + (config["depth"] - full) * windows)
    merged = patches // 4 * (16 * d * d + 4 * d * config["out_hidden_size"])
    return 2 * patches * 3 * 2 * PATCH**2 * d + config["depth"] * layer + attention + 2 * merged


def _squares(length: int) -> int:
    """The sum of the squared sides of the windows that a side is cut into."""
    return length // WINDOW * WINDOW**2 + (length % WINDOW) ** 2


# --- autoencoders: counted --------------------------------------------------------------------------------------------


def counted(call: Callable[[], Any]) -> float:
    """What FlopCounterMode counts of a call. Attention is forced into plain products: it knows not every CPU kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def autoencoder(folder: Path) -> tuple[Callable[[int], float], Callable[[int], float]]:
    """Operations of decode and of encode as functions of a picture's pixels."""
    import diffusers
    import torch

    config = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        vae = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    video = "temperal_downsample" in config
    scale = 2 ** len(config["temperal_downsample"]) if video else 2 ** (len(config["block_out_channels"]) - 1)
    channels = config["z_dim"] if video else config["latent_channels"]

    def shape(count: int, side: int) -> tuple[int, ...]:
        return (1, count, 1, side, side) if video else (1, count, side, side)

    def decode(side: int) -> float:
        return counted(lambda: vae.decode(torch.empty(shape(channels, side // scale), device="meta")))

    def encode(side: int) -> float:
        return counted(lambda: vae.encode(torch.empty(shape(3, side), device="meta")))

    return fitted(decode), fitted(encode)


def fitted(count: Callable[[int], float]) -> Callable[[int], float]:
    """a·P + b·P² through the counts at squares of 64 and 128 pixels."""
    small, large = 64**2, 128**2
    rise, run = count(128) / large - count(64) / small, large - small
    b = rise / run
    a = count(64) / small - b * small
    return lambda pixels: a * pixels + b * pixels**2


# --- a picture --------------------------------------------------------------------------------------------------------


def of_tasks(folder: Path, tasks: Sequence[Mapping[str, Any]]) -> Stages:
    """Mean operations a picture of these tasks by stage: encode, denoise, decode."""
    index = json.loads((folder / "model_index.json").read_text())
    count = {"ZImagePipeline": _z_image, "QwenImageEditPipeline": _qwen_edit}[index["_class_name"]]
    found = count(folder, tasks)
    return {stage: sum(one[stage] for one in found) / len(found) for stage in found[0]}


def _config(folder: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / part / "config.json").read_text())
    return found


def _z_image(folder: Path, tasks: Sequence[Mapping[str, Any]]) -> list[Stages]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    transformer, encoder = _config(folder, "transformer"), _config(folder, "text_encoder")
    decode, _ = autoencoder(folder / "vae")
    found = []
    for task in tasks:
        message = [{"role": "user", "content": task["prompt"]}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        tokens = padded(min(512, len(tokenizer(text).input_ids)))
        width, height = task["width"], task["height"]
        forward = z_image_forward(transformer, width, height, tokens)
        found.append(
            {
                "encode": decoder_forward(encoder, tokens),
                "denoise": task["steps"] * forward,
                "decode": decode(width * height),
            }
        )
    return found


TEMPLATE_TOKENS = 64
"""What the pipeline cuts from the start of the encoded text (`prompt_template_encode_start_idx`)."""


def _qwen_edit(folder: Path, tasks: Sequence[Mapping[str, Any]]) -> list[Stages]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
    transformer, encoder = _config(folder, "transformer"), _config(folder, "text_encoder")
    decode, encode = autoencoder(folder / "vae")
    language, vision = encoder.get("text_config", encoder), encoder["vision_config"]
    found = []
    for task in tasks:
        width, height = task["width"], task["height"]
        # Seen at the size of the result, cut into patches of 28 pixels (Qwen2-VL, section 2.1).
        rows, columns = (2 * max(1, round(side / (2 * PATCH))) for side in (height, width))
        seen = rows * columns // 4
        image = 2 * (width // 16) * (height // 16)
        stages = {"encode": encode(width * height), "denoise": 0.0, "decode": decode(width * height)}
        for prompt in (task["prompt"], task["negative_prompt"]):
            words = len(tokenizer(prompt).input_ids)
            stages["encode"] += decoder_forward(language, TEMPLATE_TOKENS + seen + words)
            stages["encode"] += vision_forward(vision, rows, columns)
            stages["denoise"] += task["steps"] * qwen_image_forward(transformer, image, seen + words)
        found.append(stages)
    return found


def main() -> None:
    """Print the stages of a folder for the tasks of a file as JSON, in operations."""
    if len(sys.argv) != 3:
        sys.exit("usage: python bench/operations.py FOLDER TASKS.jsonl")
    tasks = [json.loads(line) for line in Path(sys.argv[2]).read_text().splitlines()]
    print(json.dumps(of_tasks(Path(sys.argv[1]), tasks)))


if __name__ == "__main__":
    main()
