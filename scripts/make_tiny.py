"""Makes `src/imagemill/assets/tiny`: a Z-Image pipeline folder with random weights, small enough to ship.

    python scripts/make_tiny.py [FOLDER]

The same versions of torch and diffusers give the same bytes. The pictures mean nothing; they vary with prompt and seed,
which is what a test of the machinery needs.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from bpe import byte_letters, learn_merges  # noqa: E402: found on the path just set

FOLDER = Path(__file__).resolve().parents[1] / "src" / "imagemill" / "assets" / "tiny"
SEED = 20250101
DIM = 64
LAYERS = 2
TEXT_DIM = 48
HIDDEN = DIM * 8 // 3
MERGES = 700
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""

WORDS = """
user assistant a an the of in on at with and to from by for is are was it its this that these her his their one two
three four five no not as into over under behind front next near between through above below around beside left right
side photo photograph picture painting portrait drawing sketch illustration render scene image view close up closeup
style detailed realistic photorealistic cinematic lighting light shadow dark bright soft warm cold golden hour sunset
sunrise morning evening night day sky cloud clouds sun moon star stars rain snow fog wind storm water river lake sea
ocean beach wave mountain hill forest tree trees leaf leaves flower flowers grass field garden park street road city
town village house building tower bridge castle church window door wall roof room kitchen bedroom table chair desk bed
lamp book cup plate bowl glass bottle food bread fruit apple orange banana coffee tea cake pizza meat fish dog dogs
cat cats bird horse cow sheep pig bear lion tiger elephant rabbit fox wolf mouse dragon robot man woman boy girl child
people person old young face hair eyes hand hands head body smile smiling wearing shirt dress hat coat jacket shoes
glasses red orange yellow green blue purple pink black white gray grey brown gold silver color colorful large small
big tall tiny long short round square standing sitting walking running holding looking riding flying playing reading
eating sleeping working car bus train plane bicycle motorcycle boat ship rocket space planet earth fire smoke ice
stone wood metal paper oil watercolor digital art artist anime cartoon comic poster logo sign text word words written
says label abstract pattern texture background foreground depth field lens camera shot wide angle high quality
resolution sharp focus blur bokeh natural studio indoor outdoor modern ancient vintage classic future futuristic
fantasy magic world map clock phone computer screen music guitar piano ball game chess soccer basketball winter summer
spring autumn happy sad beautiful elegant simple complex empty full
"""


def main(folder: Path = FOLDER) -> None:
    """Build the pipeline and write it to the folder; files have mode 0644."""
    import torch

    torch.set_num_threads(1)
    pipe = build()
    pipe.to(torch.float16)
    pipe.save_pretrained(str(folder), safe_serialization=True)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {total:,} bytes")


def build() -> Any:
    """The pipeline with random weights, in float32."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    torch.manual_seed(SEED)
    tokens = tokenizer()
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=autoencoder(),
        text_encoder=text_encoder(tokens),
        tokenizer=tokens,
        transformer=denoiser(),
    )
    enliven(pipe.transformer, pipe.vae)
    return pipe


def text_encoder(tokens: Any) -> Any:
    """A Qwen3 model of two layers; the pipeline reads the first one's output."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=-(-len(tokens) // 64) * 64,
        hidden_size=TEXT_DIM,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=tokens.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokens.convert_tokens_to_ids("<|endoftext|>"),
    )
    return Qwen3Model(config)


def denoiser() -> Any:
    """A Z-Image transformer of two layers and one refiner of each kind."""
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=16,
        dim=DIM,
        n_layers=LAYERS,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_DIM,
        axes_dims=[8, 12, 12],
        axes_lens=[1024, 512, 512],
    )


def autoencoder() -> Any:
    """An autoencoder that makes a picture four times smaller each way (the real one: eight times)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def enliven(transformer: Any, vae: Any) -> None:
    """Raise the gains that default initialisation leaves small: else every picture is a gray much like the next."""
    import torch

    with torch.no_grad():
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
        for block in (*transformer.layers, *transformer.context_refiner):
            for matrix in block.parameters():
                if matrix.ndim == 2:
                    matrix.mul_(2.0)
        transformer.all_final_layer["2-1"].linear.weight.mul_(6.0)
        vae.decoder.conv_out.weight.mul_(2.0)


def tokenizer() -> Any:
    """A byte-level BPE tokenizer as Qwen's, with the merges that `WORDS` gives."""
    from transformers import Qwen2Tokenizer

    alphabet = byte_letters()
    texts = Counter(form for word in WORDS.split() for form in (word, " " + word))
    merges = learn_merges(alphabet, texts, MERGES)
    pieces = [*alphabet.values(), *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokens = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        model_max_length=1024,
        eos_token="<|im_end|>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokens.add_tokens(list(SPECIAL), special_tokens=True)
    tokens.chat_template = CHAT_TEMPLATE
    return tokens


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
