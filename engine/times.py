"""Points in time and durations as text: RFC 3339, and Go's durations.

Pure. Times are nanoseconds since the epoch, durations nanoseconds.
"""

import re
from datetime import UTC, datetime, timedelta

__all__ = ["duration", "moment", "rfc3339"]

_SECOND = 10**9
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MOMENT = re.compile(
    r"(\d{4}-\d\d-\d\d)[Tt](\d\d:\d\d:\d\d)(?:\.(\d{1,9})\d*)?([Zz]|[+-]\d\d:\d\d)\Z", re.ASCII
)
_UNITS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "ms": 10**6,
    "s": _SECOND,
    "m": 60 * _SECOND,
    "h": 3600 * _SECOND,
}
_PART = re.compile(r"(\d{1,18})(?:\.(\d{0,9})\d*)?(ns|us|µs|ms|s|m|h)", re.ASCII)


def rfc3339(nanoseconds: int) -> str:
    """Return a time as RFC 3339, in UTC."""
    seconds, rest = divmod(nanoseconds, _SECOND)
    return f"{_EPOCH + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%S}.{rest:09}Z"


def moment(text: str) -> int | None:
    """Return the time that RFC 3339 text means, None for anything else."""
    found = _MOMENT.match(text)
    if found is None:
        return None
    day, clock, fraction, zone = found.groups()
    try:
        at = datetime.fromisoformat(f"{day}T{clock}{zone.upper()}")
    except ValueError:
        return None
    return (at - _EPOCH) // timedelta(seconds=1) * _SECOND + int((fraction or "").ljust(9, "0"))


def duration(text: str) -> int | None:
    """Return a duration as Go writes it (`1h30m`, `1.5s`, `-5ms`), None for anything else."""
    sign = -1 if text.startswith("-") else 1
    rest = text.removeprefix("-" if sign < 0 else "+")
    if rest == "0":
        return 0
    total = 0
    while rest:
        part = _PART.match(rest)
        if part is None:
            return None
        whole, fraction, unit = part.groups()
        total += (
            int(whole) * _UNITS[unit] + int((fraction or "").ljust(9, "0")) * _UNITS[unit] // _SECOND
        )
        rest = rest[part.end() :]
    return sign * total if text.strip("+-") else None
