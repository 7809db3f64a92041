"""The terminal of whoever typed a command: as it was, however what had it ends."""

import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cli.terminal import DETACH_KEYS, DetachKeys, Size, raw, size_of


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    """A terminal: who looks at it, and what runs on it."""
    both = pty.openpty()
    yield both
    for end in both:
        os.close(end)


def test_raw_passes_on_each_byte_and_is_taken_back(ends: tuple[int, int]):
    leader, follower = ends
    before = termios.tcgetattr(follower)
    with raw(follower):
        os.write(leader, b"a\x03\r")
        assert os.read(follower, 10) == b"a\x03\r"  # no line needed, no signal, no newline
    assert termios.tcgetattr(follower) == before


def test_raw_is_taken_back_after_an_exception(ends: tuple[int, int]):
    before = termios.tcgetattr(ends[1])

    def interrupted() -> None:
        with raw(ends[1]):
            assert termios.tcgetattr(ends[1]) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert termios.tcgetattr(ends[1]) == before


def test_what_was_typed_before_is_not_lost(ends: tuple[int, int]):
    leader, follower = ends
    os.write(leader, b"typed early\n")
    with raw(follower):
        os.write(leader, b"!")
        assert os.read(follower, 100).startswith(b"typed early\n")


def test_what_is_no_terminal_stays_as_it_is(ends: tuple[int, int]):
    reading, writing = os.pipe()
    with raw(reading):
        pass
    os.close(writing)
    os.close(reading)
    with raw(reading):  # nor is what is closed
        pass
    leader, follower = pty.openpty()
    with raw(follower):
        os.close(follower)
    os.close(leader)


def test_sizes(ends: tuple[int, int]):
    leader, follower = ends
    reading, writing = os.pipe()
    assert size_of(reading) is None
    assert size_of(follower) is None  # nobody told it
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    assert size_of(reading, follower) == Size(rows=24, columns=80)
    os.close(writing)
    os.close(reading)


@given(st.lists(st.sampled_from([b"", b"\x10", b"\x11", b"a", b"\x10\x11", b"a\x10b", b"\x10\x10"])))
def test_the_keys_that_leave_are_found_wherever_pieces_end(pieces: list[bytes]):
    keys = DetachKeys()
    passed = b""
    for piece in pieces:
        passed += keys.feed(piece)
        if keys.came:
            break
    before, found, _ = b"".join(pieces).partition(DETACH_KEYS)
    assert keys.came == bool(found)
    assert passed in (before, before[:-1])
    assert passed == before or (not found and before.endswith(b"\x10"))
