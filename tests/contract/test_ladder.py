"""Out of memory with a batch of one: what is given up, in which order, and what it does to the pixels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from tiny_model import SPEC, no_beat, planned
from torch.testing._internal.two_tensor import TwoTensor

from imagemill.errors import OutOfMemory
from imagemill.records import LABEL_VARIABLE
from imagemill.runners import ladder as ladder_file
from imagemill.runners import loading
from imagemill.runners.ladder import (
    Ladder,
    Mover,
    device_bytes,
    is_fixed,
    moved,
    release,
    role_of,
)
from imagemill.runners.tiles import tile_side, tiled, tiling

BIG, SMALL = (1024, 1024), (512, 512)


@pytest.fixture(scope="module")
def pipe() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield loading.load(SPEC, "cpu", no_beat).pipe
    torch.set_num_threads(threads)


class Places:
    """Where the parts of a pipeline would be: `move` writes it down instead of moving."""

    def __init__(self, pipe: Any) -> None:
        parts = (pipe.text_encoder, pipe.transformer, pipe.vae)
        self.now = {role_of(part): "cuda:0" for part in parts}
        self.moves: list[tuple[str, str]] = []

    def move(self, part: Any, device: str) -> None:
        if self.now[role_of(part)] != device:
            self.moves.append((role_of(part), device))
        self.now[role_of(part)] = device

    @property
    def on_device(self) -> set[str]:
        return {role for role, device in self.now.items() if device != "cpu"}


class Hungry:
    """A family that runs out of memory in one stage until `fits` says that there is room."""

    def __init__(self, stage: str, fits: Callable[[], bool]) -> None:
        self.stage, self.fits = stage, fits

    def run(self, ladder: Ladder, size: tuple[int, int]) -> None:
        stages = {"encode": ladder.encoding, "denoise": ladder.denoising, "decode": ladder.decoding}
        for stage, within in stages.items():
            with within(size):
                if stage == self.stage and not self.fits():
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def make(self, ladder: Ladder, size: tuple[int, int] = BIG) -> list[str]:
        """The lines of the steps that it took to get a picture; raises what the last try raised."""
        lines = []
        while True:
            try:
                self.run(ladder, size)
            except torch.OutOfMemoryError as error:
                line = ladder.step_down(error, size)
                if line is None:
                    raise
                lines.append(line)
            else:
                return lines


@pytest.fixture
def places(pipe: Any) -> Places:
    return Places(pipe)


@pytest.fixture
def ladder(pipe: Any, places: Places) -> Ladder:
    return Ladder(pipe, "cuda:0", "GPU 2", move=places.move)


def test_with_enough_room_nothing_changes(ladder: Ladder, places: Places) -> None:
    assert Hungry("decode", lambda: True).make(ladder) == []
    assert (ladder.level, ladder.marks(BIG), places.moves) == (0, (), [])


def test_a_decode_without_room_goes_on_in_tiles_and_says_so(ladder: Ladder, pipe: Any, places: Places) -> None:
    lines = Hungry("decode", lambda: pipe.vae.use_tiling).make(ladder)
    assert lines == ["GPU 2: out of memory at 1024x1024; the VAE now decodes in tiles"]
    assert (ladder.level, places.moves) == (1, [])
    assert ladder.marks(BIG) == ("decoded in tiles of 512 pixels",)


def test_a_denoise_without_room_sends_the_text_encoder_away_and_leaves_the_pixels(
    ladder: Ladder, places: Places
) -> None:
    lines = Hungry("denoise", lambda: places.on_device == {"denoiser", "vae"}).make(ladder)
    assert lines == ["GPU 2: out of memory at 1024x1024; the text encoder now waits in main memory"]
    assert (ladder.level, ladder.marks(BIG)) == (2, ())


@pytest.mark.parametrize(
    ("stage", "alone", "steps"),
    [("encode", {"text", "vae"}, 1), ("denoise", {"denoiser"}, 2), ("decode", {"vae"}, 3)],
)
def test_at_last_each_stage_has_the_device_for_itself(
    stage: str, alone: set[str], steps: int, ladder: Ladder, places: Places
) -> None:
    lines = Hungry(stage, lambda: places.on_device == alone).make(ladder)
    assert len(lines) == steps
    assert lines[-1].endswith("text encoder, transformer and VAE now take turns on the device")
    assert ladder.level == 3


def test_steps_last_and_are_not_taken_twice(ladder: Ladder, places: Places) -> None:
    Hungry("denoise", lambda: places.on_device == {"denoiser", "vae"}).make(ladder)
    assert Hungry("denoise", lambda: places.on_device == {"denoiser", "vae"}).make(ladder) == []
    places.moves.clear()
    Hungry("decode", lambda: True).make(ladder)
    assert places.moves == [("text", "cuda:0"), ("text", "cpu")]


def test_when_nothing_is_left_the_task_fails_and_the_next_one_runs(ladder: Ladder, places: Places) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Hungry("decode", lambda: False).make(ladder)
    assert ladder.level == 3
    assert Hungry("decode", lambda: True).make(ladder) == []


def test_parts_leave_before_others_come(ladder: Ladder, places: Places) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Hungry("decode", lambda: False).make(ladder)
    places.moves.clear()
    Hungry("decode", lambda: True).make(ladder)
    encode, denoise, decode = places.moves[:1], places.moves[1:4], places.moves[4:]
    assert encode == [("text", "cuda:0")]
    assert set(denoise[:2]) == {("text", "cpu"), ("vae", "cpu")}
    assert denoise[2:] == [("denoiser", "cuda:0")]
    assert decode == [("denoiser", "cpu"), ("vae", "cuda:0")]


def test_only_pictures_as_large_as_the_one_that_found_no_room_are_tiled(ladder: Ladder, pipe: Any) -> None:
    Hungry("decode", lambda: pipe.vae.use_tiling).make(ladder, BIG)
    with ladder.decoding(SMALL):
        assert not pipe.vae.use_tiling
    with ladder.encoding((2048, 1024)):
        assert not pipe.vae.use_tiling
    with ladder.decoding((2048, 1024)):
        assert pipe.vae.use_tiling
    assert ladder.marks(SMALL) == ()
    lines = Hungry("decode", lambda: pipe.vae.use_tiling).make(ladder, SMALL)
    assert lines == ["GPU 2: out of memory at 512x512; the VAE now decodes in tiles"]
    assert ladder.marks(SMALL) == ("decoded in tiles of 256 pixels",)


def test_on_the_cpu_and_for_a_vae_without_tiles_nothing_useless_is_tried(pipe: Any, places: Places) -> None:
    on_cpu = Ladder(pipe, "cpu", move=places.move)
    with pytest.raises(torch.OutOfMemoryError):
        Hungry("decode", lambda: False).make(on_cpu)
    assert (on_cpu.level, places.moves) == (1, [])
    with pytest.raises(torch.OutOfMemoryError):
        Hungry("decode", lambda: False).make(Ladder(pipe, "cpu"), (256, 256))
    assert tiling(torch.nn.Linear(1, 1)) is None


def test_parts_stay_on_the_device_when_main_memory_is_short(
    ladder: Ladder, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder_file, "device_bytes", lambda part: 2**30)
    monkeypatch.setattr(ladder_file.host_memory, "free", lambda: 2**30 + 1)
    with pytest.raises(torch.OutOfMemoryError):
        Hungry("denoise", lambda: False).make(ladder)
    assert ladder.level == 2
    assert places.on_device == {"denoiser", "vae"}


def test_quantised_weights_never_leave_the_device(ladder: Ladder, places: Places, pipe: Any) -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    quantised = TwoTensor(torch.ones(1, 1), torch.ones(1, 1))
    layer.weight = torch.nn.Parameter(quantised, requires_grad=False)
    assert is_fixed(layer)
    pipe.transformer.extra = layer
    try:
        with pytest.raises(torch.OutOfMemoryError):
            Hungry("decode", lambda: False).make(ladder)
    finally:
        del pipe.transformer.extra
    assert ladder.level == 3
    assert ("denoiser", "cpu") not in places.moves


class WholeCall:
    """A pipeline that does everything within one call; diffusers' own hooks swap its parts."""

    def __init__(self, pipe: Any, order: str | None) -> None:
        self.vae, self.components, self.model_cpu_offload_seq = pipe.vae, pipe.components, order
        self.offloaded: list[str] = []

    def enable_model_cpu_offload(self, device: str) -> None:
        self.offloaded.append(device)


def test_a_pipeline_without_stages_takes_tiles_then_the_hooks_of_diffusers(pipe: Any, places: Places) -> None:
    whole = WholeCall(pipe, "text_encoder->transformer->vae")
    ladder = Ladder(whole, "cuda:0", "GPU 0", staged=False, move=places.move)
    lines = Hungry("denoise", lambda: bool(whole.offloaded and pipe.vae.use_tiling)).make(ladder)
    assert [line.partition("; ")[2].split(" now ")[0] for line in lines] == [
        "the VAE",
        "text encoder, transformer and VAE",
    ]
    assert (whole.offloaded, places.moves) == (["cuda:0"], [])
    plain = Ladder(WholeCall(pipe, None), "cuda:0", staged=False)
    with pytest.raises(torch.OutOfMemoryError):
        Hungry("denoise", lambda: False).make(plain)
    assert plain.level == 1


def test_the_line_names_the_device_as_people_know_it(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LABEL_VARIABLE, "GPU 5")
    line = Ladder(pipe, "cuda:0").step_down(MemoryError(), BIG)
    assert str(line).startswith("GPU 5: ")
    monkeypatch.delenv(LABEL_VARIABLE)
    assert Ladder(pipe, "cuda:0").label == "cuda:0"


def test_the_failed_batch_s_tensors_are_let_go_although_its_error_is_kept() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def batch() -> None:
        activations = torch.zeros(4)
        seen.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    try:
        try:
            batch()
        except torch.OutOfMemoryError as cause:
            raise OutOfMemory("no room") from cause
    except OutOfMemory as error:
        assert seen[0]() is not None
        release(error, "cpu")
        assert seen[0]() is None


def test_a_module_moves_whole_with_its_ties_and_what_is_there_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    module[1].weight = module[0].weight
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    Mover("cpu")(module, "cpu")
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == places
    # The only device here is the CPU: a copy stands for a move.
    monkeypatch.setattr(ladder_file, "lies_on", lambda tensor, device: False)
    monkeypatch.setattr(ladder_file, "moved", lambda tensor, device, pinned: tensor.clone())
    with torch.inference_mode():
        Mover("cpu")(module, "cpu")
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not {tensor.data_ptr() for tensor in after.values()} & set(places.values())
    assert module[1].weight is module[0].weight
    assert not any(tensor.is_inference() for tensor in (*module.parameters(), *module.buffers()))


def test_a_module_waits_in_page_locked_memory_if_twice_its_size_is_free_when_it_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(ladder_file, "lies_on", lambda tensor, device: False)
    monkeypatch.setattr(ladder_file, "moved", lambda tensor, device, pinned: asked.append(pinned) or tensor)
    monkeypatch.setattr(ladder_file, "device_bytes", lambda part: 10)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    roomy, short, mover = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False), Mover("cpu")
    for part, free in ((roomy, 20), (short, 19), (roomy, 0), (short, 99)):
        monkeypatch.setattr(ladder_file.host_memory, "free", lambda free=free: free)
        mover(part, "cpu")
    mover(roomy, "cuda:0")
    assert asked == [True, False, True, False, False]


def test_a_tensor_goes_where_it_shall() -> None:
    tensor = torch.ones(2)
    assert moved(tensor, "cpu") is tensor
    assert moved(tensor, "meta").device.type == "meta"
    assert device_bytes(torch.nn.Linear(4, 2)) == 0
    assert device_bytes(torch.nn.Linear(4, 2, device="meta")) == 4 * (4 * 2 + 2)


def test_no_stage_of_z_image_needs_the_weights_of_a_part_that_waits_elsewhere(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, tasks = loading.choose_family(SPEC, "ZImagePipeline"), [planned(guidance_scale=2.0).task]
    parts = {name: getattr(pipe, name) for name in ("text_encoder", "transformer", "vae")}
    made: Any = None
    stages: tuple[tuple[str, Callable[[Any], Any]], ...] = (
        ("text_encoder", lambda _: family.encode(pipe, tasks, [()])),
        ("transformer", lambda conditioning: family.denoise(pipe, tasks, conditioning, lambda step, steps: None)),
        ("vae", lambda latents: family.decode(pipe, tasks, latents)),
    )
    with torch.inference_mode():
        for needed, stage in stages:
            with monkeypatch.context() as elsewhere:
                for name in parts.keys() - {needed}:
                    elsewhere.setattr(pipe, name, deepcopy(parts[name]).to("meta"))
                made = stage(made)
        conditioning = family.encode(pipe, tasks, [()])
        whole = family.decode(pipe, tasks, family.denoise(pipe, tasks, conditioning, lambda step, steps: None))
    assert torch.equal(made, whole)


def small_vaes() -> Iterator[Any]:
    from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage

    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4,) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    }
    yield AutoencoderKL(latent_channels=4, sample_size=1024, **blocks), (1, 4, 96, 80)
    yield AutoencoderKLFlux2(latent_channels=4, sample_size=1024, **blocks), (1, 4, 96, 80)
    yield AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1), (1, 4, 1, 96, 80)


@pytest.mark.parametrize("which", range(3))
def test_every_kind_of_vae_decodes_in_tiles_no_larger_than_asked(which: int) -> None:
    torch.manual_seed(0)
    vae, shape = list(small_vaes())[which]
    vae.eval()
    sizes: list[tuple[int, ...]] = []
    vae.decoder.register_forward_pre_hook(lambda module, given: sizes.append(tuple(given[0].shape[-2:])))
    with torch.inference_mode(), tiled(vae, 512):
        picture = vae.decode(torch.randn(shape), return_dict=False)[0]
    assert picture.shape[-2:] == (768, 640)
    assert len(sizes) > 1
    assert max(max(size) for size in sizes) == 64
    assert not vae.use_tiling


def test_tiles_shift_the_pixels_a_little(pipe: Any) -> None:
    vae = pipe.vae
    latents = torch.randn(1, vae.config.latent_channels, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = vae.decode(latents, return_dict=False)[0]
        with tiled(vae, 128):
            in_tiles, again = (vae.decode(latents, return_dict=False)[0] for _ in range(2))
        after = vae.decode(latents, return_dict=False)[0]
    assert torch.equal(whole, after)
    assert torch.equal(in_tiles, again)
    assert not torch.equal(whole, in_tiles)
    assert (whole - in_tiles).abs().mean() < 0.2 * whole.abs().mean()


def test_tiles_are_decoded_by_the_code_as_written_and_never_compiled() -> None:
    vae, shape = next(iter(small_vaes()))
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    vae.decoder.compile(backend=backend)
    with torch.inference_mode():
        with tiled(vae, 256):
            vae.decode(torch.zeros(shape), return_dict=False)
        assert compiled == []
        vae.decode(torch.zeros(1, 4, 8, 8), return_dict=False)
    assert compiled != []


@pytest.mark.parametrize(
    ("size", "side"), [((2048, 1024), 512), ((513, 64), 512), ((512, 512), 256), ((256, 128), 256)]
)
def test_tiles_fit_the_picture(size: tuple[int, int], side: int) -> None:
    assert tile_side(size) == side
