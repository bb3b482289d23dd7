"""What a worker imports before and beside loading, and what becomes of what fails there."""

from __future__ import annotations

import gc
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import SPEC, TINY, no_beat

from imagemill.errors import BadModel
from imagemill.records import Event, Tuning, WorkerReady, WorkerSpec
from imagemill.runners import importing, tuning
from imagemill.runners.diffusion import DiffusionRunner
from imagemill.runners.importing import COMPILER, collector_paused
from imagemill.worker import Worker

COMPILED = replace(SPEC, tuning=Tuning(compile=True, sizes=((64, 64),)))
TIMEOUT = 30.0


class Imported:
    """Stands for `import_module`: notes the names and whether the collector was on. What only the compiler needs waits until
    `may_go`, and fails with `error` if there is one."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.collected: list[bool] = []
        self.may_go = threading.Event()
        self.error: Exception | None = None

    def __call__(self, name: str) -> None:
        if name in COMPILER:
            assert self.may_go.wait(TIMEOUT), "nobody let the import go on"
            if self.error is not None:
                raise self.error
        self.names.append(name)
        self.collected.append(gc.isenabled())


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Iterator[Imported]:
    stand_in = Imported()
    monkeypatch.setattr(importing, "import_module", stand_in)
    monkeypatch.setattr(tuning, "tune", lambda *arguments, **how: [])  # nothing is compiled here
    yield stand_in
    stand_in.may_go.set()


def test_what_tuning_asks_for_is_imported_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = importing.needed_modules(Tuning())
    assert "PIL.PngImagePlugin" in usual
    assert not any("torch" in name for name in usual)
    monkeypatch.setattr(importing, "find_spec", lambda name: None)
    assert importing.needed_modules(Tuning(precision="fp8")) == usual
    monkeypatch.setattr(importing, "find_spec", lambda name: name)
    assert importing.needed_modules(Tuning(precision="fp8")) == [*usual, "torchao.quantization"]


def test_classes_are_imported_at_once_and_what_loading_would_refuse_is_refused(
    imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes: list[str] = []
    monkeypatch.setattr(importing.loading, "component_class", lambda *entry: classes.append(entry[1]))
    assert [span.stage for span in importing.import_for(SPEC).finish()] == ["import torch", "import classes"]
    assert {"ZImageTransformer2DModel", "AutoencoderKL"} <= set(classes)
    assert imported.names[0] == "torch"
    assert "peft" in imported.names
    assert not set(COMPILER) & set(imported.names)
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    place = folder / "model_index.json"
    place.write_text(place.read_text().replace("ZImagePipeline", "WanPipeline"))
    with pytest.raises(BadModel, match="is not served"):
        importing.import_for(replace(SPEC, folder=str(folder)))
    with pytest.raises(BadModel, match="does not exist"):
        importing.import_for(replace(SPEC, folder=str(folder / "nowhere")))
    assert gc.isenabled()


def test_the_compiler_is_imported_while_the_weights_load(imported: Imported) -> None:
    runner = DiffusionRunner("cpu")
    runner.prepare(COMPILED)  # returns although the compiler's import waits
    before = list(imported.names)
    beats: list[int] = []

    def beat(stage: str, seq: int, step: int, steps: int) -> None:
        beats.append(step)
        if stage == "load" and step == steps:
            assert imported.names == before  # all weights are there, and the import still waits
            imported.may_go.set()

    runner.load(COMPILED, beat)
    assert beats
    assert imported.names == [*before, *COMPILER]
    assert not any(imported.collected)
    stages = [span.stage for span in runner.spans()]
    assert stages[:3] == ["import torch", "import classes", "import compiler"]
    assert len(stages) == len(set(stages))
    runner.unload()


def test_an_import_that_fails_beside_loading_fails_it(imported: Imported) -> None:
    imported.error = ImportError("libfoo.so: cannot open shared object file")
    imported.may_go.set()
    runner = DiffusionRunner("cpu")
    runner.prepare(COMPILED)
    with pytest.raises(ImportError, match=r"libfoo\.so"):
        runner.load(COMPILED, no_beat)
    assert runner.resident == frozenset()
    assert gc.isenabled()


def test_a_worker_tells_the_parts_of_its_imports() -> None:
    said: list[Event] = []
    worker = Worker(WorkerSpec(worker=0, model=SPEC, label="CPU", device="cpu"), said.append, lambda: None)
    assert worker.prepare()
    assert worker.load()
    worker.close()
    (ready,) = (event for event in said if isinstance(event, WorkerReady))
    stages = [span.stage for span in ready.spans]
    assert stages[:3] == ["import", "import torch", "import classes"]
    assert stages.count("load transformer") == 1


def test_a_context_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory on {device}")

    monkeypatch.setattr(importing, "open_device", broken)
    with pytest.raises(torch.OutOfMemoryError, match="cuda:0"):
        importing.import_for(SPEC, "cuda:0")
    assert gc.isenabled()


def test_the_collector_stands_still_until_the_last_of_overlapping_blocks_ends() -> None:
    first, second = collector_paused(), collector_paused()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_a_collector_that_its_user_has_switched_off_stays_off() -> None:
    gc.disable()
    try:
        with collector_paused(), collector_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_in_the_block_lets_the_collector_go_on() -> None:
    with pytest.raises(ZeroDivisionError), collector_paused():
        _ = 1 // 0
    assert gc.isenabled()
