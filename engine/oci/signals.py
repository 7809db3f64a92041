"""Signals by name and number, as images and users write them. Pure."""

import re
import signal

from engine.errors import InvalidArgument, printable

__all__ = ["parse_signal"]

_LAST = 64
_RELATIVE = re.compile(r"(RTMIN|RTMAX)(?:([+-])([0-9]{1,2}))?")
_RTMIN, _RTMAX = 34, 64  # as every C library counts them; the kernel keeps 32 and 33 for threads
_NAMES = {
    name.removeprefix("SIG"): int(number)
    for name, number in signal.Signals.__members__.items()
    if not name.startswith("SIGRT")
}


def parse_signal(text: str) -> int:
    """Return the number of the signal that is written as `15`, `TERM`, `SIGTERM` or `RTMIN+3`.

    Raises InvalidArgument.
    """
    name = text.upper().removeprefix("SIG")
    relative = _RELATIVE.fullmatch(name)
    number = _NAMES.get(name, 0)
    if text.isascii() and text.isdigit() and len(text) < 4:
        number = int(text)
    elif relative:
        base = _RTMIN if relative[1] == "RTMIN" else _RTMAX
        number = base + int(f"{relative[2]}{relative[3]}") if relative[2] else base
        number = number if _RTMIN <= number <= _RTMAX else 0
    if not 1 <= number <= _LAST:
        raise InvalidArgument(f"{printable(text)!r} is not a signal; write a name (TERM) or a number")
    return number
