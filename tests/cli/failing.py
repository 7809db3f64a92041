"""The check that every failing command has to pass: one line, the right code, a store unchanged."""

from pathlib import Path
from typing import Any

from tests.command import dump, lamina

__all__ = ["assert_fails", "assert_one_line"]


def assert_one_line(messages: str, says: str) -> None:
    """Check that a command said one thing, and that it is `says` among other words."""
    lines = messages.splitlines()
    assert len(lines) == 1, messages
    assert lines[0].startswith("lamina: ")
    assert says in lines[0]


def assert_fails(root: Path, *args: object, code: int, says: str, **options: Any) -> None:
    """Run a command that must fail, and compare the store with what it was before."""
    before = dump(root)
    done = lamina(root, *args, code=code, **options)
    assert_one_line(done.stderr, says)
    assert done.stdout == ""
    after = dump(root)
    changed = {table: (before[table], after[table]) for table in after if after[table] != before[table]}
    assert not changed, changed
