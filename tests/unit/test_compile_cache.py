"""Where compiled code is kept, and who of several workers compiles."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from imagemill.runners import compile_cache
from imagemill.runners.compile_cache import environment, folder, turn

NAMES = (compile_cache.GRAPHS, compile_cache.KERNELS, *compile_cache.SWITCHES)


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compile_cache, "LOOK_AGAIN", 0.01)


def test_compiled_code_lies_in_the_users_cache_folder_and_is_the_users_alone(tmp_path: Path) -> None:
    place = tmp_path / "imagemill" / "compile"
    assert environment() == {
        "TORCHINDUCTOR_CACHE_DIR": str(place),
        "TRITON_CACHE_DIR": str(place / "triton"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
    }
    assert place.stat().st_mode & 0o777 == 0o700


def test_without_a_cache_home_it_is_the_one_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert folder() == tmp_path / "home" / ".cache" / "imagemill" / "compile"


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
    found = environment()
    assert found["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "mine")
    assert found["TRITON_CACHE_DIR"] == str(tmp_path / "mine" / "triton")
    assert found["TORCHINDUCTOR_FX_GRAPH_CACHE"] == "0"


def test_a_folder_that_cannot_be_made_costs_the_cache_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert environment() == {}
    with turn("work", lambda: None) as first:
        assert first


def test_one_compiles_while_the_others_wait_and_then_enter_together() -> None:
    environment()
    waiting, entered = threading.Semaphore(0), threading.Barrier(3, timeout=20)
    turns: list[bool] = []

    def worker() -> None:
        told = iter([waiting.release])
        with turn("work", lambda: next(told, lambda: None)()) as first:
            turns.append(first)
            entered.wait()

    with turn("work", lambda: None) as first:
        assert first
        others = [threading.Thread(target=worker) for _ in range(2)]
        for other in others:
            other.start()
        assert all(waiting.acquire(timeout=20) for _ in others)
        assert turns == []
    entered.wait()
    for other in others:
        other.join(20)
    assert turns == [False, False]


def test_nobody_waits_for_work_that_was_once_done() -> None:
    environment()
    with turn("work", lambda: None) as first:
        assert first
    with turn("work", lambda: None) as one, turn("work", lambda: pytest.fail("it waited")) as other:
        assert (one, other) == (False, False)


def test_work_that_was_broken_off_is_not_done() -> None:
    environment()
    with pytest.raises(KeyError), turn("work", lambda: None):
        raise KeyError
    with turn("work", lambda: None) as first:
        assert first


def test_other_work_does_not_wait() -> None:
    environment()
    with turn("this", lambda: None), turn("that", lambda: None) as first:
        assert first


def test_whoever_waits_may_be_stopped() -> None:
    class Stopped(BaseException):
        pass

    def stop() -> None:
        raise Stopped

    environment()
    with turn("work", lambda: None), pytest.raises(Stopped), turn("work", stop):
        pytest.fail("it entered")


def test_a_worker_that_dies_in_its_turn_leaves_it_to_the_next() -> None:
    environment()
    code = "from imagemill.runners.compile_cache import turn\nwith turn('work', print):\n print('in', flush=True)\n input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        child.kill()
        child.wait()
    with turn("work", lambda: None) as first:
        assert first
