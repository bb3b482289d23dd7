"""docs/reliability.md names no test that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text("utf-8")


def names_of_tests() -> set[str]:
    files = (ROOT / "tests").rglob("test_*.py")
    return {
        f"{file.name}::{name}"
        for file in files
        for name in re.findall(r"^def (test_\w+)", file.read_text("utf-8"), re.M)
    }


def test_every_test_named_in_the_page_is_there() -> None:
    named = set(re.findall(r"`(test_\w+\.py::test_\w+)`", PAGE))
    assert len(named) > 20
    assert named - names_of_tests() == set()


def test_every_row_of_the_page_names_a_test() -> None:
    table = PAGE.partition("## What was broken")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    assert len(rows) > 20
    assert [row for row in rows if "`test_" not in row.split(" | ")[-1]] == []


def test_the_bounds_of_the_page_are_those_that_are_measured_against() -> None:
    import million

    assert f"at most {million.MEMORY:.0f} MiB" in PAGE
    assert f"within {million.SCAN:.0f} s a million tasks" in PAGE
