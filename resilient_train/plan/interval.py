"""When to persist."""

from __future__ import annotations

AUTO_SECONDS = 30.0
"""Shortest time between two persisted states when the interval is ``"auto"``."""
AUTO_SHARE = 0.1
"""Largest share of the time that writing may take when the interval is ``"auto"``."""


def due(*, auto: bool, seconds: float, since_last: float, last_duration: float) -> bool:
    """Whether the next state is to be persisted.

    Args:
        auto: keep the share of time spent on writing below `AUTO_SHARE`, and at least `AUTO_SECONDS` between writes.
        seconds: otherwise, the interval.
        since_last: seconds since the last write began.
        last_duration: seconds it took.
    """
    interval = max(AUTO_SECONDS, last_duration / AUTO_SHARE) if auto else seconds
    return since_last >= interval


def parse_interval(value: int | str) -> tuple[int, float]:
    """``persist_every`` as (steps, seconds): 0 steps means by time, negative seconds mean ``"auto"``.

    Raises:
        ValueError: for anything but a positive number of steps, ``"auto"``, or seconds like ``"300s"``.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ValueError(f"persist_every must be at least 1 step, got {value}")
        return value, 0.0
    if value == "auto":
        return 0, -1.0
    if isinstance(value, str) and value.endswith("s"):
        try:
            seconds = float(value[:-1])
        except ValueError:
            seconds = 0.0
        if 0 < seconds < float("inf"):
            return 0, seconds
    raise ValueError(f'persist_every must be a number of steps, seconds like "300s", or "auto", got {value!r}')
