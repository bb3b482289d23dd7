"""Numbers as people read them."""

from __future__ import annotations

from datetime import UTC, datetime


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that say something: `85 ms`, `4.2 s`, `2 m 13 s`, `1 h 05 m`, `3 d 4 h`."""
    if seconds is None:
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} m"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def rate(value: float | None) -> str:
    """Pictures a second with three digits that count: `0.0312`, `2.41`, `1,530`."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def number(value: float) -> str:
    """A count with thousands apart, or a strength or scale without trailing zeros."""
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def moment(epoch: float | None) -> str | None:
    """Seconds since the epoch as ISO 8601 in UTC, to the millisecond."""
    if epoch is None:
        return None
    return datetime.fromtimestamp(epoch, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def clock(iso: str | None) -> str:
    """What `moment` gave, for people: `2026-03-01 08:15 UTC`."""
    return f"{iso[:10]} {iso[11:16]} UTC" if iso else "–"


def cut(text: str, limit: int) -> str:
    """The text, with an ellipsis in place of what goes over `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"
