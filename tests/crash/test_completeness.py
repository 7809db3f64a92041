"""Each named failpoint is one at which some test kills a process."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from engine import failpoints

_TESTS = Path(__file__).parents[1]


@cache
def _named() -> tuple[frozenset[str], frozenset[str]]:
    """Return the words of all test modules that kill, and the beginnings by which they choose points."""
    words: set[str] = set()
    beginnings: set[str] = set()
    for path in _TESTS.rglob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        if "=kill" in source and path != Path(__file__):
            for node in ast.walk(ast.parse(source)):
                words.update(_points(node))
                beginnings.update(_beginnings(node))
    return frozenset(words), frozenset(beginnings)


def _points(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value.partition("=")[0]


def _beginnings(node: ast.AST) -> Iterator[str]:
    """Yield what is asked of a failpoint's name as in `for name in NAMES if name.startswith("x.")`."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "name.startswith":
        yield from (one.value for one in node.args if isinstance(one, ast.Constant))


@pytest.mark.parametrize("name", sorted(failpoints.NAMES))
def test_a_process_is_killed_at_every_point(name):
    words, beginnings = _named()
    assert name in words or name.startswith(tuple(beginnings)), f"no test kills a process at {name}"
