"""What a model's name means, and what a folder's revision depends on."""

from __future__ import annotations

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
from io import StringIO
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from imagemill import models, revision
from imagemill.errors import InputError
from imagemill.models import KNOWN, folder_revision, resolve
from imagemill.records import Tuning

REPO = "studio/painter"


def safetensors(tensors: dict[str, bytes]) -> bytes:
    header, start = {}, 0
    for name, content in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [start, start + len(content)]}
        start += len(content)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors.values())


def pipeline(folder: Path, class_name: str = "StableDiffusionXLPipeline", weights: bytes = b"") -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    index = {
        "_class_name": class_name,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "feature_extractor": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "model.safetensors").write_bytes(weights or safetensors({"weight": bytes(range(256))}))
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache; every download fails as it does without a network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    real = huggingface_hub.hf_hub_download

    def offline_only(repo: str, name: str, *, local_files_only: bool) -> str:
        if not local_files_only:
            raise errors.LocalEntryNotFoundError("no\nnetwork")
        return real(repo, name, local_files_only=True)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline_only)
    return folder


def snapshot(cache: Path, repo: str) -> Path:
    """A repository in the cache, as the hub's library lays it out: a snapshot of links into blobs."""
    home, commit = cache / f"models--{repo.replace('/', '--')}", "a" * 40
    source = pipeline(cache / "source")
    for number, path in enumerate(sorted(path for path in source.rglob("*") if path.is_file())):
        blob, link = home / "blobs" / f"{number:064x}", home / "snapshots" / commit / path.relative_to(source)
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    return home / "snapshots" / commit


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", KNOWN.values(), ids=KNOWN)
def test_every_known_model_has_a_family_that_is_there_and_a_memory_above_its_weights(known: models.KnownModel) -> None:
    from imagemill.families import families

    assert known.family in families()
    assert known.memory >= known.parameters * 2e9
    assert bool(known.repo) == (known.name not in ("tiny", "tiny-edit", "fake"))


def test_the_embedded_model_is_found_without_the_hub() -> None:
    code = (
        "import sys; from imagemill.models import resolve; print(resolve('tiny').spec.folder);"
        "assert not {'torch', 'diffusers', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (Path(ended.stdout.strip()) / "model_index.json").is_file()


def test_the_fake_model_needs_no_folder() -> None:
    model = resolve("fake")
    assert (model.spec.runner, model.spec.folder, model.planned.family.name) == ("fake", "", "fake")


def test_a_models_own_defaults_go_before_those_of_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline(tmp_path / "flux", "FluxPipeline")
    monkeypatch.setattr(models, "_from_hub", lambda repo, download: folder)
    defaults = resolve("flux.1-schnell").planned.defaults
    assert (defaults.steps, defaults.guidance_scale, defaults.width) == (4, 0.0, 1024)
    assert resolve("flux.1-dev").planned.defaults.steps == 28


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("zimage-turbo", "did you mean z-image-turbo"),
        ("qwenimage", "did you mean qwen-image"),
        ("", "is not known"),
        ("/no/such/folder", "there is no such folder"),
        ("./tiny", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("a--b/c", "is no name of a repository"),
        ("x" * 300, "is not known"),
        ("./" + "x" * 300, "there is no such folder"),
    ],
)
def test_a_name_that_means_nothing_is_refused_in_one_line_with_the_mend(cache: Path, name: str, part: str) -> None:
    with pytest.raises(InputError, match=part) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_gets_the_family_of_its_pipeline_class(tmp_path: Path) -> None:
    model = resolve(str(pipeline(tmp_path / "m")))
    assert (model.spec.family, model.planned.family.name, model.known) == ("sdxl", "sdxl", None)
    assert resolve(str(pipeline(tmp_path / "n", "SomeNewPipeline"))).spec.family == "generic"


def test_the_memory_of_an_unknown_folder_is_its_weights_and_an_allowance(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "m", weights=safetensors({"weight": bytes(5_000_000)}))
    assert 2 * 2**30 + 6_000_000 <= resolve(str(folder)).spec.memory < 2 * 2**30 + 6_001_000


def test_a_single_file_is_refused_with_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is a file; give the folder"):
        resolve(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("index", ["{", "[]", '{"unet": ["diffusers", "X"]}', '{"_class_name": ["pipeline", "Own"]}'])
def test_an_index_that_names_no_pipeline_is_refused(tmp_path: Path, index: str) -> None:
    folder = pipeline(tmp_path / "m")
    (folder / "model_index.json").write_text(index)
    with pytest.raises(InputError, match=r"model_index\.json"):
        resolve(str(folder))


def test_a_folder_without_an_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no model_index\.json"):
        resolve(str(tmp_path))


def test_a_folder_that_lacks_a_component_or_a_shard_is_refused_before_anything_starts(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "m")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "unet" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lacks unet/model-2\.safetensors"):
        resolve(str(folder))
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(InputError, match="lacks scheduler/"):
        resolve(str(folder))


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_cached_repository_is_found_without_a_network(cache: Path) -> None:
    folder = snapshot(cache, REPO)
    model = resolve(REPO)
    assert (model.spec.name, model.spec.folder, model.known) == (REPO, str(folder), None)


def test_a_known_model_is_known_by_its_repository_too(cache: Path) -> None:
    snapshot(cache, KNOWN["sdxl"].repo)
    assert resolve(KNOWN["sdxl"].repo).known is KNOWN["sdxl"]
    assert resolve("sdxl").spec.memory == KNOWN["sdxl"].memory
    assert resolve("sdxl").spec.name == "sdxl"


@pytest.mark.parametrize("name", [REPO, "z-image-turbo"])
@pytest.mark.parametrize("way", ["offline", "not asked", "no network"])
def test_a_model_that_cannot_be_had_says_where_it_was_looked_for_and_how_to_get_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, way: str, name: str
) -> None:
    if way == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="hf download") as caught:
        resolve(name, download=way != "not asked")
    message = str(caught.value)
    assert "\n" not in message
    assert str(cache) in message
    assert {"offline": "HF_HUB_OFFLINE", "not asked": "none was asked", "no network": "no network"}[way] in message


def test_a_hub_that_does_not_answer_is_told_once_and_by_the_networks_own_words(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(repo: str, name: str, *, local_files_only: bool) -> str:
        if local_files_only:
            raise errors.LocalEntryNotFoundError("not here")
        log = logging.getLogger("huggingface_hub.utils._http")
        for seconds in (1, 2, 4):
            log.warning("'%s' thrown while requesting HEAD %s", "[Errno 111] Connection refused", "https://hub")
            log.warning(f"Retrying in {seconds}s [Retry 1/5].")
        log.warning("something else")
        refused = ConnectionError("[Errno 111] Connection refused")
        raise errors.LocalEntryNotFoundError("An error happened. Please check your connection." * 9) from refused

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    logger, said = logging.getLogger("huggingface_hub"), StringIO()
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        with pytest.raises(InputError, match=r"the download failed \(\[Errno 111\] Connection refused\); get it with"):
            resolve(REPO)
        logger.warning("Retrying in 8s, said by somebody else")
    finally:
        logger.removeHandler(handler)
    assert said.getvalue().splitlines() == [
        "the hub does not answer; it is asked again for half a minute",
        "something else",
        "Retrying in 8s, said by somebody else",
    ]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("401 Client Error.\n\nRepository Not Found.", "401 Client Error. Repository Not Found"),
        (f"No such thing. {'Please check it ' * 20}.", "No such thing"),
        ("word " * 60, "word " * 39 + "word ..."),
        ("", "OSError"),
    ],
)
def test_the_reason_of_a_failed_download_ends_with_a_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, said: str, told: str
) -> None:
    def refuse(repo: str, name: str, *, local_files_only: bool) -> str:
        raise errors.LocalEntryNotFoundError("not here") if local_files_only else OSError(said)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(InputError) as caught:
        resolve(REPO)
    assert f"the download failed ({told}); get it with" in str(caught.value)


def test_an_incomplete_snapshot_is_completed_or_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = snapshot(cache, REPO)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(InputError, match="lacks scheduler/"):
        resolve(REPO, download=False)
    asked = []

    def fetch(repo: str, *, local_files_only: bool, **patterns: list[str]) -> str:
        asked.append((local_files_only, patterns))
        if not local_files_only:
            (folder / "scheduler").mkdir()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(folder / "model_index.json"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve(REPO).spec.folder == str(folder)
    assert [offline for offline, _ in asked] == [True, False]


def test_only_what_the_pipeline_reads_is_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    folder = pipeline(cache / "s")
    patterns: dict[str, list[str]] = {}

    def fetch(repo: str, *, local_files_only: bool, **given: list[str]) -> str:
        patterns.update(given)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(folder / "model_index.json"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    resolve(REPO)
    held = ["model_index.json", "unet/config.json", "unet/model.safetensors", "unet/model-00001-of-2.safetensors"]
    others = [
        "README.md",
        "painter.safetensors",
        "unet/model.fp16.safetensors",
        "unet/model.bin",
        "vae_1_0/config.json",
    ]
    others += ["unet/model.fp16-00001-of-2.safetensors", "unet/model.safetensors.index.fp16.json", "unet/flax.msgpack"]
    assert list(filter_repo_objects([*held, *others], **patterns)) == held


def test_a_gated_repository_says_where_to_accept_its_licence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gated(errors.GatedRepoError):
        def __init__(self) -> None:
            Exception.__init__(self, "403")

    def refuse(repo: str, name: str, *, local_files_only: bool) -> str:
        raise errors.LocalEntryNotFoundError("not here") if local_files_only else Gated()

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"accept its licence at https://huggingface\.co/black-forest-labs"):
        resolve("flux.1-dev")


# --- revisions --------------------------------------------------------------------------------------------------------


def test_the_revision_is_the_same_for_a_copy_with_other_times_and_modes(tmp_path: Path, cache: Path) -> None:
    linked = snapshot(cache, REPO)
    copied = tmp_path / "elsewhere" / "copy"
    shutil.copytree(linked, copied)
    for path in copied.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert folder_revision(linked) == folder_revision(copied)


def test_the_revision_ignores_what_loading_does_not_read(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "m")
    before = folder_revision(folder)
    (folder / ".cache").mkdir()
    (folder / "spare").mkdir()
    for name in ("README.md", "sample.png", ".gitattributes", ".cache/x.json", "unet/model.fp16.safetensors"):
        (folder / name).write_text("x")
    for name in ("unet/model.bin", "unet/.hidden.json", "spare/model.safetensors"):
        (folder / name).write_text("x")
    assert folder_revision(folder) == before


def test_the_revision_changes_with_each_file_that_loading_reads(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "m")
    seen = {folder_revision(folder)}
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "unet/new.json", "unet/model.safetensors"):
        (folder / name).write_text('{"changed": true}')
        seen.add(folder_revision(folder))
    (folder / "unet" / "new.json").rename(folder / "unet" / "other.json")
    seen.add(folder_revision(folder))
    assert len(seen) == 6


def test_the_precision_is_part_of_the_revision_and_attention_is_not() -> None:
    plain, other, fp8 = resolve("tiny"), resolve("tiny", attention="native"), resolve("tiny", precision="fp8")
    assert plain.spec.revision == other.spec.revision != fp8.spec.revision
    assert fp8.planned.revision == fp8.spec.revision == f"{plain.spec.revision}/fp8"
    assert (other.spec.tuning, fp8.spec.tuning) == (Tuning(attention="native"), Tuning(precision="fp8"))


def test_the_dtype_is_part_of_the_revision() -> None:
    half, full = resolve("tiny", dtype="bfloat16"), resolve("tiny", dtype="float32")
    assert half.planned.revision != full.planned.revision
    assert half.planned.revision == half.spec.revision
    assert half.spec.dtype == "bfloat16"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files from 100 kB on are sampled, as those of real models are."""
    monkeypatch.setattr(revision, "SMALL_FILE", 100_000)
    monkeypatch.setattr(revision, "SMALL_FOLDER", 0)
    monkeypatch.setattr(revision, "EDGE", 512)
    monkeypatch.setattr(revision, "SAMPLES", 2)
    monkeypatch.setattr(revision, "SAMPLE", 64)


@pytest.mark.usefixtures("large")
def test_every_tensor_of_a_large_file_counts(tmp_path: Path) -> None:
    tensors = {f"block.{number}": bytes([number]) * 20_000 for number in range(10)}
    seen = {folder_revision(pipeline(tmp_path / "base", weights=safetensors(tensors)))}
    for name in tensors:
        changed = safetensors({**tensors, name: b"\xff" * 20_000})
        seen.add(folder_revision(pipeline(tmp_path / name, weights=changed)))
    assert len(seen) == 11


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("head", [b"\xff" * 8, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{{", b"\0" * 8])
def test_a_damaged_large_file_still_has_a_revision(tmp_path: Path, head: bytes) -> None:
    assert len(folder_revision(pipeline(tmp_path / "m", weights=head + bytes(200_000)))) == 64


@pytest.mark.usefixtures("large")
def test_a_large_file_is_read_only_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, offset: read.append(length) or real(file, length, offset))
    folder_revision(pipeline(tmp_path / "m", weights=safetensors({"weight": bytes(1_000_000)})))
    assert sum(read) < 10_000
