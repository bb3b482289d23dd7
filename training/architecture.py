"""The embedded models' parts, untrained, and the pipelines they make: every size is chosen here.

Each pipeline keeps within 20 MB in float16: 1.3 M parameters of autoencoder, 0.8 M of text encoder, 7.7 M of transformer.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from bpe import byte_letters, learn_merges
from nouns import Noun
from scenes import ALSO, COLOURS, ENDINGS, FILLER, OPENINGS, PLACES, SYLLABLES

DIM = 240
HEADS = 6
LATENT = 8
TEXT_DIM = 128
VOCABULARY = 1536
EDIT_TOKENS = 64
"""Tokens of an instruction; the rest is cut."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = "{%- for message in messages -%}{{- message.content + '<|im_end|>' -}}{%- endfor -%}"
TIME_RMS = 0.6
OPEN_GATE = 0.3
"""Where the residual gates begin: from zero they hardly ever open."""

EVERYDAY = """
the of in on at with and to from by for is are was it its this that his her their not as into over under behind front
next near between above below side left right up down out one two three four five six photo picture painting portrait
sketch scene image view close style detailed realistic cinematic lighting light shadow dark bright soft warm cold day
night morning evening sunset sky clouds rain wind water river lake sea ocean beach mountain hill forest leaves grass
field garden park street road city town village tower wall roof room kitchen table glass bottle food people person man
woman boy girl child old young face hair eyes hand head body smile smiling wearing shirt standing sitting walking
running holding looking playing reading eating sleeping background corner middle center centre make change turn replace
add put place insert remove delete take away erase get rid mirror flip horizontally bigger larger enlarge smaller shrink
reduce size grayscale black white convert color colour darker darken brighter brighten lower raise brightness paint
recolor give picture image small little tiny big large huge pair beside against
"""


def autoencoder(flux2: bool = False) -> Any:
    """An autoencoder with 8 latent channels at a quarter of the side; for Flux 2 pipelines the same with statistics."""
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    shared: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 64, 80),
        "layers_per_block": 1,
        "latent_channels": LATENT,
        "norm_num_groups": 16,
        "sample_size": 128,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "mid_block_add_attention": False,
    }
    return AutoencoderKLFlux2(**shared) if flux2 else AutoencoderKL(**shared, force_upcast=False)


def text_encoder(tokens: Any, layers: int = 3) -> Any:
    """A small Qwen3 with tied word embeddings; the pipelines read its inner layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=TEXT_DIM,
        intermediate_size=320,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokens.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokens.convert_tokens_to_ids("<|endoftext|>"),
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def z_image() -> Any:
    """The transformer of `tiny`: six layers and a refiner of each kind."""
    from diffusers import ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(
        in_channels=LATENT,
        dim=DIM,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_DIM,
        axes_dims=[8, 16, 16],
        axes_lens=[1024, 256, 256],
    )
    with torch.no_grad():
        transformer.x_pad_token.normal_(std=0.02)
        transformer.cap_pad_token.normal_(std=0.02)
        for block in (*transformer.layers, *transformer.noise_refiner):
            modulation = block.adaLN_modulation[0]
            modulation.weight.normal_(std=0.02)
            modulation.bias.zero_()
            modulation.bias[DIM : 2 * DIM] = OPEN_GATE
            modulation.bias[3 * DIM :] = OPEN_GATE
        final = transformer.all_final_layer["2-1"]
        final.adaLN_modulation[1].weight.zero_()
        final.adaLN_modulation[1].bias.zero_()
        final.linear.weight.mul_(0.3)
        final.linear.bias.zero_()
    settle_time(transformer)
    return transformer


def settle_time(transformer: Any) -> None:
    """Make Z-Image's time embedding a fixed, centred feature of root mean square 0.6, which training leaves alone.

    Adam moves its 1,024 hidden units in step, whatever their gradient's size: after 3,000 steps its values
    were 860, every scale and gate had followed, and nothing was learnt.
    """
    embedder = transformer.t_embedder
    with torch.no_grad():
        times = embedder(torch.linspace(0, 1, 201) * transformer.t_scale)
        scale = TIME_RMS / (times - times.mean(0)).square().mean().sqrt()
        embedder.mlp[2].weight.mul_(scale)
        embedder.mlp[2].bias.copy_((embedder.mlp[2].bias - times.mean(0)) * scale)
    embedder.requires_grad_(False)


def flux2() -> Any:
    """The transformer of `tiny-edit`: one double and seven single blocks.

    Flux 2's modulations have no bias. To open the gates all the same, one channel of the time embedding is made nearly
    constant: the cosine of the slowest frequency, which stays above 0.99.
    """
    from diffusers import Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT,
        num_layers=1,
        num_single_layers=7,
        attention_head_dim=DIM // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=3 * TEXT_DIM,
        timestep_guidance_channels=256,
        mlp_ratio=3.0,
        axes_dims_rope=(8, 12, 12, 8),
        rope_theta=2000,
        guidance_embeds=False,
    )
    silu = nn.functional.silu
    with torch.no_grad():
        time = transformer.time_guidance_embed.timestep_embedder
        time.linear_1.weight[0].zero_()
        time.linear_1.weight[0, 127] = 4.0
        time.linear_2.weight[:, 0].zero_()
        time.linear_2.weight[0].zero_()
        time.linear_2.weight[0, 0] = 0.5
        constant = silu(0.5 * silu(torch.tensor(4.0)))
        for modulation in (
            transformer.double_stream_modulation_img,
            transformer.double_stream_modulation_txt,
            transformer.single_stream_modulation,
        ):
            weight = modulation.linear.weight
            weight.normal_(std=0.02)
            weight[:, 0].zero_()
            for gate in range(2, weight.shape[0] // DIM, 3):
                weight[gate * DIM : (gate + 1) * DIM, 0] = OPEN_GATE / constant
        transformer.norm_out.linear.weight.zero_()
        transformer.proj_out.weight.zero_()
    return transformer


def scheduler() -> Any:
    """Flow matching with Euler steps, shifted towards high noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def tokenizer(nouns: list[Noun], max_length: int = 512) -> Any:
    """A byte-level BPE tokenizer as Qwen's, whose merges are learnt from the words of the captions."""
    from transformers import Qwen2Tokenizer

    alphabet = byte_letters()
    merges = learn_merges(alphabet, spellings(words_of(nouns)), VOCABULARY - 256 - len(SPECIAL))
    pieces = [*alphabet.values(), *("".join(pair) for pair in merges)]
    tokens = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))},
        merges=merges,
        model_max_length=max_length,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokens.add_tokens(list(SPECIAL), special_tokens=True)
    tokens.chat_template = CHAT_TEMPLATE
    return tokens


def words_of(nouns: list[Noun]) -> Counter[str]:
    """Words to learn merges from, with weights: colours and grammar often, every noun alike."""
    words: Counter[str] = Counter()
    for name in (*COLOURS, *(other for others in ALSO.values() for other in others), *PLACES, *OPENINGS, *ENDINGS):
        for word in name.split():
            words[word] += 8
    for word in (*EVERYDAY.split(), *" ".join(FILLER).split()):
        words[word] += 4
    for noun in nouns:
        for name in (noun.name, noun.plural, *noun.also):
            for word in name.split():
                words[word] += 3
    words.update(SYLLABLES)
    words |= Counter(dict.fromkeys(("background", "picture", "image", "change", "make", "remove"), 99))
    return words


def spellings(words: Counter[str]) -> Counter[str]:
    """Every word as it stands inside a text, behind a space, and four times more seldom as the text's first."""
    texts = Counter[str]()
    for word, weight in words.items():
        texts[" " + word] += weight
        texts[word] += weight // 4
    return texts
