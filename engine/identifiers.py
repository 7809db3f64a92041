"""Identifiers: what namespaces and leases may be called, as in containerd.

Pure.
"""

import re

from engine.errors import InvalidArgument, printable

__all__ = ["check_identifier"]

_IDENTIFIER = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*\Z")
_LIMIT = 76


def check_identifier(text: str, what: str) -> None:
    """Raise InvalidArgument unless `text` may be what a `what` is called."""
    if len(text) > _LIMIT or not _IDENTIFIER.match(text):
        raise InvalidArgument(
            f"{printable(text)!r} is not a {what}; use letters and digits, with single dots, dashes or "
            f"underscores between them, {_LIMIT} at most"
        )
