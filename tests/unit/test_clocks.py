"""The clock of a device against the host's, from readings that come late."""

from __future__ import annotations

from imagemill.runners.streams import LAGS, REANCHOR, Drift


def test_savers_that_read_late_now_and_then_move_nothing() -> None:
    drift = Drift()
    assert [drift.by(5.0 if turn % 4 else REANCHOR / 2) for turn in range(3 * LAGS)] == [0.0] * (3 * LAGS)


def test_when_every_reading_is_late_the_least_of_them_is_the_drift() -> None:
    drift = Drift()
    assert [drift.by(0.5 + turn / 100) for turn in range(LAGS)] == [0.0] * (LAGS - 1) + [0.5]
    assert drift.by(0.0) == 0.0


def test_what_was_read_before_it_happened_moves_the_clock_at_once() -> None:
    drift = Drift()
    for _ in range(LAGS - 1):
        drift.by(1.0)
    assert drift.by(-0.25) == -0.25
    assert drift.by(1.0) == 0.0
