"""Free main memory as the kernel and the limits of a container tell it, and how many loads it allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from imagemill import host_memory
from imagemill.host_memory import GIB, parallel_loads


@pytest.mark.parametrize(
    ("asked", "free", "model", "workers", "allowed"),
    [
        (3, 0, 20 * GIB, 8, 3),  # what was asked for stands
        (16, 500 * GIB, 20 * GIB, 8, 8),  # but there are no more workers
        (None, 500 * GIB, 20 * GIB, 8, 8),
        (None, 33 * GIB, 20 * GIB, 8, 3),  # the files once, then 4 GiB a load
        (None, 20 * GIB, 20 * GIB, 8, 1),  # the files do not stay in memory
        (None, 0, 0, 2, 1),  # nobody knows
    ],
)
def test_as_many_workers_load_at_once_as_were_asked_for_or_fit(
    asked: int | None, free: int, model: int, workers: int, allowed: int
) -> None:
    assert parallel_loads(asked, free, model, workers) == allowed


def machine(root: Path, available: int, group: str = "/", **limits: tuple[str, int, int]) -> Path:
    """A tree of `proc` and `sys` with `available` bytes; each limit is a group's (max, current, inactive_file)."""
    for name in ("proc/self", "sys/fs/cgroup"):
        (root / name).mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 9999 kB\nMemAvailable:   {available // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(f"0::{group}\n")
    for name, (most, used, cache) in limits.items():
        place = root / "sys/fs/cgroup" / name.replace("_", "/")
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{most}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return root


def test_without_a_limit_the_kernel_s_word_counts(tmp_path: Path) -> None:
    assert host_memory.free(machine(tmp_path, 8 * GIB)) == 8 * GIB
    assert host_memory.free(tmp_path / "elsewhere") == 0


def test_the_tightest_limit_of_the_groups_above_counts_without_pages_that_can_go(tmp_path: Path) -> None:
    limits = {
        "box": (str(6 * GIB), 5 * GIB, 3 * GIB),
        "box_job": ("max", 2 * GIB, 0),
        "other": (str(GIB), GIB, 0),
    }
    assert host_memory.free(machine(tmp_path, 8 * GIB, "/box/job", **limits)) == 4 * GIB


def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path) -> None:
    root = machine(tmp_path, 8 * GIB, "/gone/from/here")
    for name, text in (("max", str(2 * GIB)), ("current", str(3 * GIB)), ("stat", "anon 1")):
        (root / "sys/fs/cgroup" / f"memory.{name}").write_text(text)
    assert host_memory.free(root) == 0


def test_this_machine_answers() -> None:
    if not Path("/proc/meminfo").is_file():
        pytest.skip("not Linux")
    assert host_memory.free() > 0
