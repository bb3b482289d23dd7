"""What the families that edit pictures promise, on tiny pipelines with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_editors
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_model import Pixels, loaded, no_beat, pixels

from imagemill.errors import BadModel
from imagemill.families import families, family_for
from imagemill.families.flux2 import text_settings
from imagemill.records import Lora, ModelSpec, PlannedTask, Task
from imagemill.runners import Result
from imagemill.runners.diffusion import DiffusionRunner
from orders import order_of, planned

BUILDERS: dict[str, Callable[[Path], Path]] = {
    "klein": tiny_editors.klein,
    "dev": tiny_editors.dev,
    "kontext": tiny_editors.kontext,
    "qwen": tiny_editors.qwen,
    "plus": lambda folder: tiny_editors.qwen(folder, plus=True),
    "generic": lambda folder: tiny_editors.kontext(folder, "FluxImg2ImgPipeline"),
}
SHAPES = {"A": (2, 64), "B": (64, 2)}
SEVERAL = ("klein", "dev", "plus")
SIZES = {
    "klein": (64, 64),
    "dev": (64, 64),
    "generic": (64, 48),
    "kontext": (64, 48),
    "qwen": (64, 48),
    "plus": (64, 48),
}


class Editor:
    """A loaded pipeline, and tasks for it."""

    def __init__(self, name: str, runner: DiffusionRunner, spec: ModelSpec) -> None:
        self.name, self.runner, self.spec = name, runner, spec
        self.family = family_for(type(runner._pipe).__name__)

    def planned(self, seq: int, *images: Path, **changes: Any) -> PlannedTask:
        width, height = SIZES[self.name]
        fields: dict[str, Any] = {"width": width, "height": height, "steps": 2, "seed": 40 + seq, "model": "m"}
        if self.name == "generic":
            fields["steps"] = 4  # of which it does the last 0.6
        fields |= {"prompt": f"paint it {('red', 'blue and very green', 'in gold')[seq % 3]}"}
        for name in ("guidance_scale", "true_cfg_scale", "negative_prompt"):
            fields[name] = getattr(self.family.defaults, name)
        task = Task(id=str(seq), images=tuple(map(str, images)), **(fields | changes))
        return planned(task, self.spec.revision, seq)

    def run(self, *members: PlannedTask) -> list[Result]:
        landed = [result.landed() for result in self.runner.run(order_of(*members, model=self.spec), no_beat)]
        return sorted(landed, key=lambda result: result.seq)

    def picture(self, seq: int, *images: Path, **changes: Any) -> Pixels:
        (result,) = self.run(self.planned(seq, *images, **changes))
        return pixels(result)


@pytest.fixture(scope="module", params=BUILDERS)
def editor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    torch.set_num_threads(1)
    folder = BUILDERS[request.param](tmp_path_factory.mktemp(request.param) / "model")
    spec = ModelSpec(name="m", folder=str(folder), revision="r")
    for runner in loaded(spec):
        yield Editor(request.param, runner, spec)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of coloured fields: two of one size, one upright."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        draw(folder / f"{number}.png", size, number) for number, size in enumerate([(120, 90), (120, 90), (70, 140)])
    ]


def draw(path: Path, size: tuple[int, int], seed: int) -> Path:
    fields = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(fields).resize(size, Image.Resampling.NEAREST).save(path)
    return path


def whole_call(editor: Editor, planned: PlannedTask) -> Pixels:
    """The picture that the pipeline itself makes of the task, all stages in one call, of pictures of the sizes that the
    family asks for."""
    from imagemill.runners.references import Member, take_in

    (member,) = take_in([planned], editor.family, editor.spec)
    assert isinstance(member, Member)
    task, pipe = planned.task, editor.runner._pipe
    named: dict[str, Any] = {
        "klein": {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)},
        "dev": {"text_encoder_out_layers": (1, 2, 3)},
        "kontext": {"max_area": task.width * task.height, "_auto_resize": False},  # type: ignore[operator]
    }.get(editor.name, {})
    for name in ("guidance_scale", "true_cfg_scale", "negative_prompt"):
        if getattr(task, name) is not None:
            named[name] = getattr(task, name)
    pictures = list(member.pictures)
    image = (pictures if editor.name in SEVERAL else pictures[0]) if pictures else None
    noise = torch.Generator("cpu").manual_seed(task.seed or 0)
    with torch.inference_mode():
        made = pipe(
            image=image,
            prompt=task.prompt,
            height=task.height,
            width=task.width,
            num_inference_steps=task.steps,
            generator=noise,
            **named,
        ).images[0]
    return np.asarray(made).astype(np.int16)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch, editor: Editor) -> None:
    """Without it the Qwen pipelines bring every picture to a megapixel, whatever size is asked for."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as one
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    width, height = SIZES[editor.name]
    look = plus.CONDITION_IMAGE_SIZE
    from_area = plus.calculate_dimensions
    monkeypatch.setattr(one, "calculate_dimensions", lambda area, ratio: (width, height, None))
    monkeypatch.setattr(
        plus, "calculate_dimensions", lambda area, ratio: from_area(area, ratio) if area == look else (width, height)
    )


def test_the_stages_give_the_pixels_of_one_whole_call(editor: Editor, sources: list[Path], small_sizes: None) -> None:
    planned = editor.planned(1, sources[0], steps=3)
    made = pixels(editor.run(planned)[0])
    assert made.shape == (*SIZES[editor.name][::-1], 3)
    assert np.abs(made - whole_call(editor, planned)).max() <= (1 if editor.name == "plus" else 0)
    assert made.std() > 10


def test_an_instruction_behind_many_tokens_is_read(editor: Editor, sources: list[Path], small_sizes: None) -> None:
    """A picture of a megapixel is some 1300 tokens of Qwen's text, and the instruction stands behind them."""
    if editor.name not in ("qwen", "plus"):
        return
    planned = editor.planned(1, sources[0], prompt="a house by the sea, " * 60 + "in gold")
    made = pixels(editor.run(planned)[0])
    assert np.abs(made - whole_call(editor, planned)).max() <= 1


def test_the_picture_depends_on_source_prompt_and_seed_alone(editor: Editor, sources: list[Path]) -> None:
    first = editor.picture(1, sources[0])
    assert np.array_equal(first, editor.picture(1, sources[0]))
    for other in (
        editor.picture(1, sources[1]),
        editor.picture(1, sources[0], seed=9),
        editor.picture(1, sources[0], prompt="a castle by the sea"),
    ):
        assert np.abs(first - other).mean() > 0.05


def test_a_batch_is_at_most_one_level_from_singles(editor: Editor, sources: list[Path]) -> None:
    members = [editor.planned(seq, sources[seq]) for seq in range(3)]
    together = editor.run(*members)
    assert {result.batch_size for result in together} == {1 if editor.name == "generic" else 3}
    for member, result in zip(members, together, strict=True):
        assert np.abs(pixels(result) - pixels(editor.run(member)[0])).max() <= 1


def test_each_of_several_pictures_counts_and_so_does_their_order(editor: Editor, sources: list[Path]) -> None:
    if editor.name == "qwen":
        assert "takes one picture" in str(editor.run(editor.planned(1, *sources))[0].error)
    if editor.name not in SEVERAL:
        assert editor.family.max_images == 1 or editor.name == "qwen"
        return
    pair = editor.picture(1, sources[0], sources[1])
    for others in ([sources[0]], [sources[0], sources[2]], [sources[1], sources[0]]):
        assert np.abs(pair - editor.picture(1, *others)).mean() > 0.02


def test_pictures_of_unlike_shapes_never_share_a_batch(editor: Editor, sources: list[Path]) -> None:
    if editor.name not in SEVERAL:
        return
    members = [editor.planned(seq, sources[0], sources[1 + seq % 2]) for seq in range(3)]
    together = editor.run(*members)
    assert [result.batch_size for result in together] == [2, 1, 2]
    for member, result in zip(members, together, strict=True):
        assert np.abs(pixels(result) - pixels(editor.run(member)[0])).max() <= 1


def test_text_alone_makes_a_picture_where_the_model_can_or_is_a_bad_task(editor: Editor) -> None:
    if "prompt_only" in editor.family.fields and editor.name != "generic":
        planned = editor.planned(1)
        assert np.array_equal(pixels(editor.run(planned)[0]), whole_call(editor, planned))
    if editor.name == "generic":
        (result,) = editor.run(editor.planned(1))
        assert str(result.error) == "FluxImg2ImgPipeline edits pictures; name one"


def test_a_picture_that_cannot_be_edited_costs_its_task_alone(
    editor: Editor, sources: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(sources[0].read_bytes()[:200])
    results = editor.run(editor.planned(0, sources[0]), editor.planned(1, broken), editor.planned(2, sources[2]))
    assert [result.error.kind if result.error else None for result in results] == [None, "bad_task", None]
    assert "broken.png is damaged or cut off" in str(results[1].error)


def test_a_picture_that_changed_since_planning_is_refused(editor: Editor, tmp_path: Path) -> None:
    path = draw(tmp_path / "a.png", (64, 64), 1)
    planned = editor.planned(1, path)
    draw(path, (64, 64), 2)
    assert "has changed since the run was planned" in str(editor.run(planned)[0].error)


def test_a_size_that_the_model_cannot_make_is_a_bad_task(editor: Editor, sources: list[Path]) -> None:
    (result,) = editor.run(editor.planned(1, sources[0], width=60))
    assert result.error
    assert result.error.kind in ("bad_task", "bad_output")
    assert editor.name == "generic" or "both must be multiples of" in str(result.error)


def test_guidance_changes_the_picture_where_there_is_any(editor: Editor, sources: list[Path]) -> None:
    first = editor.picture(1, sources[0])
    if "true_cfg_scale" in editor.family.fields:
        other = editor.picture(1, sources[0], true_cfg_scale=6.0, negative_prompt="blurry")
    else:
        other = editor.picture(1, sources[0], guidance_scale=1.0)
    assert editor.name == "generic" or np.abs(first - other).mean() > 0.05


def test_every_family_that_edits_is_tried_here() -> None:
    edit = {name for name, family in families().items() if family.max_images}
    assert edit - {"fake", "generic", "judge"} == {"flux2", "flux_kontext", "qwen_edit"}


def test_an_adapter_changes_an_edit_and_none_brings_it_back(
    editor: Editor, sources: list[Path], tmp_path: Path
) -> None:
    if editor.name != "klein":
        return
    dice = torch.Generator().manual_seed(1)
    key = "transformer.transformer_blocks.0.attn.to_q"
    save_file(
        {f"{key}.lora_{side}.weight": torch.randn(shape, generator=dice) for side, shape in SHAPES.items()},
        tmp_path / "a.safetensors",
    )
    lora = Lora(str(tmp_path / "a.safetensors"), 1.0, sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest())
    plain = editor.picture(1, sources[0])
    assert np.abs(plain - editor.picture(1, sources[0], loras=(lora,))).mean() > 0.02
    assert np.array_equal(plain, editor.picture(1, sources[0]))


# --- what is derived from a loaded model ------------------------------------------------------------------------------


class Parts:
    """What `text_settings` reads of a pipeline."""

    def __init__(self, depth: int, width: int, wanted: int, tokens: int = 10**30) -> None:
        self.text_encoder = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=depth, hidden_size=width))
        self.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=wanted))
        self.tokenizer = SimpleNamespace(model_max_length=tokens)
        self.tokenizer_max_length = 512

    def encode_prompt(self, prompt: str, text_encoder_out_layers: tuple[int, ...] = (9, 18, 27)) -> None:
        """Only its signature is read."""


@pytest.mark.parametrize(
    ("parts", "layers", "tokens"),
    [
        (Parts(36, 2560, 7680), (9, 18, 27), 512),
        (Parts(3, 48, 144, 64), (1, 2, 3), 64),
        (Parts(12, 48, 144), (4, 8, 12), 512),
        (Parts(36, 48, 96), (18, 36), 512),
        (Parts(1, 48, 48), (1,), 512),
    ],
)
def test_the_layers_read_of_a_text_encoder_fit_the_transformer(
    parts: Parts, layers: tuple[int, ...], tokens: int
) -> None:
    assert text_settings(parts) == {"text_encoder_out_layers": layers, "max_sequence_length": tokens}


def test_a_text_encoder_that_cannot_fit_refuses_the_model() -> None:
    with pytest.raises(BadModel, match="takes text of width 100; the encoder's layers give 48 each"):
        text_settings(Parts(3, 48, 100))
