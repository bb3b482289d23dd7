"""Places outside the tests: the repository, and data that is not in it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of shared data; the test is skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"needs {DATA}")
    return DATA
