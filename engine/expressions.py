"""Regular expressions of callers: none that takes a match for ever, which Python's could.

Pure. RE2, which containerd has, takes time by the length of a text; `re` tries all the ways in which a
repetition can be divided, and holds the interpreter meanwhile. What is refused: repetitions and choices
within a repetition, and what RE2 does not know either (looking around, referring back).
"""

import re
import warnings
from re import _constants as codes  # type: ignore[attr-defined]  # there is no public tree
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

from engine.errors import InvalidArgument, printable

__all__ = ["BadExpression", "expression"]

_Tree = Any  # whose kinds and parts `re` does not type

_REPEATS = {codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT}
_UNKNOWN = {codes.GROUPREF, codes.GROUPREF_EXISTS, codes.ASSERT, codes.ASSERT_NOT, codes.ATOMIC_GROUP}


class BadExpression(InvalidArgument):
    """It does not compile."""


def expression(text: str) -> re.Pattern[str]:
    """Return a compiled expression. Raises BadExpression, InvalidArgument for what is refused."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of what a later Python may read differently
            tree = parser.parse(text)
            compiled = re.compile(text)
    except re.error as error:
        where = "" if error.pos is None else f", character {error.pos + 1}"
        raise BadExpression(f"expression {printable(text)!r}{where}: {error.msg}") from None
    except (OverflowError, RecursionError) as error:
        raise BadExpression(f"expression {printable(text)!r}: {error}") from None
    if wrong := _wrong(tree, is_repeated=False):
        raise InvalidArgument(f"expression {printable(text)!r}: {wrong}")
    return compiled


def _wrong(tree: _Tree, *, is_repeated: bool) -> str:
    """Say what is refused in a part of an expression, "" if nothing is."""
    for code, about in tree:
        if code in _UNKNOWN:
            return "it may not look around or refer back"
        inside = is_repeated
        if code in _REPEATS:
            least, most, _ = about
            if is_repeated and least != most:
                return "a repetition in a repetition may take for ever; write it as one"
            inside = is_repeated or most > 1
        if code is codes.BRANCH and is_repeated:
            return "a choice in a repetition may take for ever; write it without"
        for part in _parts(code, about):
            if wrong := _wrong(part, is_repeated=inside):
                return wrong
    return ""


def _parts(code: _Tree, about: _Tree) -> list[_Tree]:
    if code is codes.BRANCH:
        return list(about[1])
    return [about[-1]] if code in _REPEATS or code is codes.SUBPATTERN else []
