"""How a container's process ended, and whether somebody watches it, as its folder tells.

Sync; safe from any thread and process.
"""

import os
from pathlib import Path

import msgspec

from engine.errors import os_errors
from engine.fs.locks import locked_byte

__all__ = ["Outcome", "outcome", "parsed"]

_LARGEST = 4096


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a container's process.

    Neither `ended` nor `monitored`: it was never started, or nobody will know its exit code. Whether it
    runs is told by the cgroup of its pid (`engine.running.settling`).
    """

    ended: bool
    monitored: bool = False
    code: int | None = None
    """Its exit code, 128 + n for signal n."""
    at: int = 0
    """When it ended: nanoseconds since the epoch."""
    oom: bool = False
    """Whether something in it was killed because its memory did not suffice."""


class _ExitFile(msgspec.Struct, frozen=True):
    """What a monitor leaves as `exit`."""

    code: int
    at: int
    oom: bool = False


_exits = msgspec.json.Decoder(_ExitFile)


def outcome(folder: Path) -> Outcome:
    """Return what a container's folder tells of its process."""
    with os_errors(str(folder)):
        found = _ended(folder)
        if found is None:
            is_monitored = _is_monitored(folder)
            # Its monitor may have written it and gone between the two looks.
            found = _ended(folder) or Outcome(ended=False, monitored=is_monitored)
        return found


def parsed(data: bytes) -> Outcome | None:
    """Return what an `exit` file says; None for what a power loss made of one."""
    try:
        exited = _exits.decode(data)
    except msgspec.DecodeError:
        return None
    return Outcome(ended=True, code=exited.code, at=exited.at, oom=exited.oom)


def _ended(folder: Path) -> Outcome | None:
    try:
        file = os.open(folder / "exit", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return parsed(os.read(file, _LARGEST))
    finally:
        os.close(file)


def _is_monitored(folder: Path) -> bool:
    try:
        file = os.open(folder / "monitor", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        return locked_byte(file, 0, 1) is not None
    finally:
        os.close(file)
