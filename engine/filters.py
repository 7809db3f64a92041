"""Filters of listings in containerd's language: parse, print, match.

Pure. A list of filters is an OR, the selectors of one are an AND:

    filter   = [selector *("," selector)]              nothing matches everything
    selector = path [("==" | "!=" | "~=") value]       without an operator: is it there
    path     = field *("." field)
    field    = 1*(letter | digit | "_") | quoted
    value    = quoted | 1*(what is printable, but for spaces and commas)

Quoted is `"..."` with the escapes of Go. A regular expression (`~=`) may stand in `/.../` or `|...|`
too, where escapes that Go does not know are the expression's own. Spaces between words mean nothing.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import chain

from engine import limits
from engine.errors import InvalidArgument, printable
from engine.expressions import BadExpression, expression
from engine.labels import Labels

__all__ = [
    "Fields",
    "Filter",
    "Operator",
    "Selector",
    "check_expressions",
    "fields",
    "matches",
    "parse",
    "parse_all",
    "show",
]

Fields = Callable[[tuple[str, ...]], str | None]
"""Returns what an object has under a path, None if nothing."""


class Operator(StrEnum):
    """What a selector asks of a field."""

    PRESENT = ""
    EQUAL = "=="
    UNEQUAL = "!="
    LIKE = "~="


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition on the field that `path` leads to."""

    path: tuple[str, ...]
    operator: Operator = Operator.PRESENT
    value: str = ""


Filter = tuple[Selector, ...]

_SPACES = re.compile(r"\s*")
_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_VALUE = re.compile(r"[^\s,]+")
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)", re.DOTALL)
_NAMED = dict(zip("abfnrtv\\", "\a\b\f\n\r\t\v\\", strict=True))


class _Parser:
    """Reads one filter from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        if len(text) > limits.FILTER:
            raise self._error(f"it is over {limits.FILTER} characters")

    def filter(self) -> Filter:
        """Return the selectors of the whole text."""
        self._skip_spaces()
        if self._at == len(self._text):
            return ()
        selectors = [self._selector()]
        while self._at < len(self._text):
            self._take(",", "a comma")
            selectors.append(self._selector())
        return tuple(selectors)

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._next() == ".":
            self._take(".", "a dot")
            path.append(self._field())
        if self._next() in {"", ","}:
            return Selector(tuple(path))
        start = self._at
        word = self._match(_OPERATOR, "one of == != ~=")
        if word not in {*Operator}:
            self._at = start
            raise self._error("expected one of == != ~=")
        return Selector(tuple(path), Operator(word), self._value(Operator(word)))

    def _field(self) -> str:
        return self._quoted() if self._next() == '"' else self._match(_FIELD, "a field")

    def _value(self, operator: Operator) -> str:
        if self._next() == '"' or (operator is Operator.LIKE and self._next() in {"/", "|"}):
            return self._quoted()
        start = self._at
        value = self._match(_VALUE, "a value")
        if not value.isprintable():
            self._at = start
            raise self._error("expected a value; put this one in quotes")
        return value

    def _quoted(self) -> str:
        start, quote = self._at, self._text[self._at]
        found = re.compile(rf"[{quote}]((?:[^\\{quote}\n]|\\.)*)[{quote}]").match(self._text, start)
        if not found:
            raise self._error("this quote does not end")
        self._at = found.start(1)
        raw = bytearray()
        while self._at < found.end(1):
            raw += self._character(quote)
        self._at = found.end()
        self._skip_spaces()
        return raw.decode("utf-8", "surrogateescape")

    def _character(self, quote: str) -> bytes:
        """Return the next character of a quoted string, in UTF-8: an escape may be a part of one."""
        escape = _ESCAPE.match(self._text, self._at)
        found = escape[1] if escape else self._text[self._at]
        value = self._escaped(found, quote) if escape else found.encode("utf-8", "surrogateescape")
        self._at += len(escape[0]) if escape else 1
        return value

    def _escaped(self, code: str, quote: str) -> bytes:
        if code == quote:
            return quote.encode()
        if code in _NAMED:
            return _NAMED[code].encode()
        if len(code) == 1:
            if quote == '"':
                raise self._error("this escape is unknown")
            return f"\\{code}".encode()
        number = int(code, 8) if code.isdigit() else int(code[1:], 16)
        if code[0] not in "uU" and number < 0x100:
            return bytes([number])
        if code[0] in "uU" and number < 0x110000 and not 0xD800 <= number < 0xE000:
            return chr(number).encode()
        raise self._error("this escape is no character")

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self._text, self._at)
        if not found:
            raise self._error(f"expected {what}")
        self._at = found.end()
        self._skip_spaces()
        return found[0]

    def _take(self, character: str, what: str) -> None:
        if self._next() != character:
            raise self._error(f"expected {what}")
        self._at += 1
        self._skip_spaces()

    def _next(self) -> str:
        return self._text[self._at : self._at + 1]

    def _skip_spaces(self) -> None:
        self._at = _SPACES.match(self._text, self._at).end()  # type: ignore[union-attr]  # may be empty

    def _error(self, what: str) -> InvalidArgument:
        return InvalidArgument(f"filter {printable(self._text)!r}, character {self._at + 1}: {what}")


def parse(text: str) -> Filter:
    """Return the filter in `text`. InvalidArgument tells where it goes wrong."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"filter: character {error.start + 1} is none") from None
    return _Parser(text).filter()


def parse_all(texts: Iterable[str]) -> tuple[Filter, ...]:
    """Return the filters in `texts`. Raises InvalidArgument."""
    return tuple(map(parse, texts))


def show(filter_: Filter) -> str:
    """Return a text that `parse` makes this filter of."""
    return ",".join(map(_show, filter_))


def _show(selector: Selector) -> str:
    path = ".".join(part if _FIELD.fullmatch(part) else _quote(part) for part in selector.path)
    if selector.operator is Operator.PRESENT:
        return path
    return f"{path}{selector.operator}{_quote(selector.value)}"


def _quote(value: str) -> str:
    def escaped(character: str) -> str:
        if character in {'"', "\\"}:
            return f"\\{character}"
        if character.isprintable():
            return character
        return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))

    return f'"{"".join(map(escaped, value))}"'


def fields(values: Mapping[str, str], labels: Labels) -> Fields:
    """Return how filters see an object: `values` by dotted path, where empty is absent, and labels."""

    def found(path: tuple[str, ...]) -> str | None:
        if path[0] == "labels":
            return labels.get(".".join(path[1:]))
        return values.get(".".join(path)) or None

    return found


def matches(filters: Sequence[Filter], of: Fields) -> bool:
    """Say whether one of `filters` is true of an object, or there are none.

    Raises InvalidArgument for an expression that may take for ever.
    """
    return not filters or any(all(_holds(selector, of) for selector in one) for one in filters)


def _holds(selector: Selector, of: Fields) -> bool:
    value = of(selector.path)
    match selector.operator:
        case Operator.PRESENT:
            return value is not None
        case Operator.EQUAL:
            return value == selector.value
        case Operator.UNEQUAL:
            return value != selector.value
        case Operator.LIKE:
            pattern = _compiled(selector.value)
            return value is not None and pattern is not None and pattern.search(value) is not None


@lru_cache
def _compiled(text: str) -> re.Pattern[str] | None:
    """Return a compiled expression, or None: as in containerd, a bad one matches nothing."""
    try:
        return expression(text)
    except BadExpression:
        return None


def check_expressions(filters: Iterable[Filter]) -> None:
    """Raise InvalidArgument for an expression that would match nothing as it does not compile."""
    for selector in chain.from_iterable(filters):
        if selector.operator is Operator.LIKE:
            expression(selector.value)
