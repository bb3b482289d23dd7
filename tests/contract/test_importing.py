"""What a worker imports before it loads, and what becomes of what fails there."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_model import SPEC, TINY

from imagemill.errors import BadModel
from imagemill.records import Event, Span, Tuning, WorkerReady, WorkerSpec
from imagemill.runners import importing
from imagemill.runners.importing import collector_paused
from imagemill.worker import Worker


class Imported:
    """Stands for `import_module`: notes the names, and whether the collector was on."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.collected: list[bool] = []

    def __call__(self, name: str) -> None:
        self.names.append(name)
        self.collected.append(gc.isenabled())


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Imported:
    stand_in = Imported()
    monkeypatch.setattr(importing, "import_module", stand_in)
    return stand_in


def test_what_tuning_asks_for_is_imported_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = importing.needed_modules(Tuning())
    assert "PIL.PngImagePlugin" in usual
    assert not any("torch" in name for name in usual)
    assert "torch._inductor.compile_fx" in importing.needed_modules(Tuning(compile=True))
    monkeypatch.setattr(importing, "find_spec", lambda name: None)
    assert importing.needed_modules(Tuning(precision="fp8")) == usual
    monkeypatch.setattr(importing, "find_spec", lambda name: name)
    assert importing.needed_modules(Tuning(precision="fp8")) == [*usual, "torchao.quantization"]


def test_preparing_imports_everything_and_refuses_what_loading_would(
    imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classes: list[str] = []
    monkeypatch.setattr(importing.loading, "component_class", lambda *entry: classes.append(entry[1]))
    spans = importing.import_for(replace(SPEC, tuning=Tuning(compile=True)))
    assert [span.stage for span in spans] == ["import torch", "import classes", "import tools"]
    assert {"ZImageTransformer2DModel", "AutoencoderKL"} <= set(classes)
    assert imported.names[0] == "torch"
    assert {"peft", "torch._dynamo"} <= set(imported.names)
    assert not any(imported.collected)
    assert gc.isenabled()
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    place = folder / "model_index.json"
    place.write_text(place.read_text().replace("ZImagePipeline", "WanPipeline"))
    with pytest.raises(BadModel, match="is not served"):
        importing.import_for(replace(SPEC, folder=str(folder)))
    with pytest.raises(BadModel, match="does not exist"):
        importing.import_for(replace(SPEC, folder=str(folder / "nowhere")))
    assert gc.isenabled()


def test_a_worker_tells_the_parts_of_its_imports_and_spares_them_the_collector_while_it_loads() -> None:
    spared: list[int] = []
    said: list[Event] = []
    worker = Worker(
        WorkerSpec(worker=0, model=SPEC, label="CPU", device="cpu"),
        said.append,
        lambda: spared.append(gc.get_freeze_count()),
    )
    assert worker.prepare()
    assert worker.load()
    assert min(spared) > 100_000
    assert gc.get_freeze_count() == 0
    worker.close()
    (ready,) = (event for event in said if isinstance(event, WorkerReady))
    stages = [span.stage for span in ready.spans]
    assert stages[:4] == ["import", "import torch", "import classes", "import tools"]
    assert stages.count("load transformer") == 1


def test_a_context_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str, spans: list[Span]) -> None:
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
