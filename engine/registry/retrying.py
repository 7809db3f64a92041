"""When a request is tried again, and how long after.

Pure. The wait doubles and is drawn from its upper half, so that many who failed together do not come
back together; a host that says when to come again is obeyed, within bounds.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from engine import limits
from engine.errors import Unavailable

__all__ = ["PASSING", "Busy", "Patience", "parse_retry_after"]

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that the same request may not meet again."""


class Busy(Unavailable):
    """A host could not answer now; in `after` seconds it wants to be asked again, if it said when."""

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a host is waited for, and how often it is asked; times are in seconds."""

    connect: float = limits.CONNECT_S
    answer: float = limits.ANSWER_S
    progress_bytes: int = limits.PROGRESS_BYTES
    """So many of a body have to come, or be taken, in"""
    progress: float = limits.PROGRESS_S
    finish: float = limits.FINISH
    """Bytes a second that a host deals with before it answers to the end of an upload."""
    attempts: int = limits.ATTEMPTS
    first_wait: float = 0.2
    longest_wait: float = 10.0
    longest_asked: float = limits.RETRY_AFTER_S

    def wait(self, failed: int, error: Unavailable, chance: float) -> float | None:
        """Return how long to wait after `failed` attempts, None to give up; `chance` is 0 to 1."""
        after = error.after if isinstance(error, Busy) else None
        if failed >= self.attempts or (after or 0) > self.longest_asked:
            return None
        wait = min(self.first_wait * 2.0 ** (failed - 1), self.longest_wait) * (1 + chance) / 2
        return max(wait, after or 0)


def parse_retry_after(text: str, now: datetime) -> float | None:
    """Return the seconds that a `Retry-After` asks for, None for one that says nothing."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, OverflowError, IndexError):
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - now).total_seconds())
