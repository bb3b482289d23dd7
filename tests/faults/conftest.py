"""What an unbroken run makes, for the fault suite; its tools and checks are in checks.py."""

from __future__ import annotations

import pytest
from checks import golden_of

from workplace import Workplace

COUNT = 24


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The pixels of an unbroken run of `rows(24)`; those of fewer rows are among them."""
    return golden_of(Workplace(tmp_path_factory.mktemp("golden")), COUNT)
