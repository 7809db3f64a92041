"""What containers wrote is written down, bounded, and read again."""

import os
from contextlib import closing
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.limits import LOG_LINE
from engine.running.logfile import LogFile
from engine.running.logs import LogFollower, LogLine, read_log
from engine.times import rfc3339
from tests.monitors.monitored import run, shell

_AT = 1_800_000_000_000_000_000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as a monitor is
    return tmp_path


def text(folder, channel="stdout", **options):
    return b"".join(line.data for line in read_log(folder, **options) if line.channel == channel)


def record(data, at=_AT, channel="stdout", tag="F"):
    return f"{rfc3339(at)} {channel} {tag} ".encode() + data + b"\n"


@pytest.mark.root
def test_a_containers_log(bundle):
    one = bundle(*shell("seq 3; printf half >&2; printf 'no end'"))
    run(one)
    lines = list(read_log(one.folder))
    assert [line.data for line in lines if line.channel == "stdout"] == [
        b"1\n",
        b"2\n",
        b"3\n",
        b"no end",
    ]
    assert text(one.folder, "stderr") == b"half"
    assert all(line.at > _AT - 10**18 for line in lines)
    one.delete()


@pytest.mark.root
def test_a_containers_log_is_bounded(bundle):
    """A writer without end takes up two files, and the last that it wrote is there."""
    one = bundle(*shell("seq 100000"), log_limit=1 << 20)
    run(one)
    sizes = [(one.folder / name).stat().st_size for name in ("log", "log.1")]
    assert max(sizes) <= 1 << 20
    assert [line.data for line in read_log(one.folder, tail=2)] == [b"99999\n", b"100000\n"]
    _, *lines = read_log(one.folder)  # the first may be a part
    numbers = [int(line.data) for line in lines]
    assert numbers == list(range(numbers[0], 100001))
    assert len(numbers) > 10000
    one.delete()


@given(st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.binary(min_size=1, max_size=50))))
def test_what_is_written_is_read(tmp_path_factory, pieces):
    folder = tmp_path_factory.mktemp("log")
    before = os.getcwd()
    os.chdir(folder)
    try:
        log = LogFile(1 << 20)
    finally:
        os.chdir(before)
    for channel, data in pieces:
        log.write(channel.encode(), data)
    os.close(log._file)
    for channel in ("stdout", "stderr"):
        assert text(folder, channel) == b"".join(data for where, data in pieces if where == channel)
    for line in read_log(folder):
        assert b"\n" not in line.data[:-1]


def test_a_full_disk_costs_output_and_no_more(folder, monkeypatch):
    log = LogFile(1 << 20)
    log.write(b"stdout", b"first\n")
    write = os.write

    def half(file, data):
        write(file, data[: len(data) // 2])
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "write", half)
    log.write(b"stdout", b"lost\n")
    monkeypatch.setattr(os, "write", write)
    log.write(b"stdout", b"last\n")
    assert text(folder) == b"first\nlast\n"


def test_tail_and_since(folder):
    (folder / "log.1").write_bytes(b"".join(record(b"%d" % n, _AT + n) for n in range(5)))
    (folder / "log").write_bytes(b"".join(record(b"%d" % n, _AT + n) for n in range(5, 10)))
    assert text(folder) == b"".join(b"%d\n" % n for n in range(10))
    assert text(folder, tail=3) == b"7\n8\n9\n"
    assert text(folder, tail=0) == b""
    assert text(folder, tail=100, since=_AT + 4) == b"4\n5\n6\n7\n8\n9\n"
    assert [line.at for line in read_log(folder, tail=1)] == [_AT + 9]


def test_parts_are_joined_up_to_a_bound(folder):
    part = b"x" * 1000
    (folder / "log").write_bytes(
        record(b"a", tag="P")
        + record(b"b", channel="stderr")
        + record(b"c", _AT + 5)
        + record(part, tag="P") * 200
        + record(b"", tag="F")
    )
    lines = list(read_log(folder))
    assert lines[:2] == [LogLine(_AT, "stderr", b"b\n"), LogLine(_AT, "stdout", b"ac\n")]
    assert max(len(line.data) for line in lines) < LOG_LINE + 2000
    assert b"".join(line.data for line in lines[2:]) == part * 200 + b"\n"


def test_torn_and_foreign_records_are_passed_over(folder):
    (folder / "log").write_bytes(
        b"\n2026-11-22T06:42\nno date stdout F x\n"
        + record(b"here")
        + record(b"x", channel="other")
        + b"\0" * (3 << 20)
        + b"\n"
        + record(b"there")
        + b"2026-11"
    )
    assert text(folder).endswith(b"here\nthere\n")


def test_no_log_is_empty(folder):
    assert text(folder) == b""
    with closing(LogFollower(folder)) as follower:
        assert not follower.more()
        (folder / "log").write_bytes(record(b"begun"))
        assert [line.data for line in follower.more()] == [b"begun\n"]


def test_a_log_that_is_just_turned_is_not_empty(folder):
    """Amid a turn there is `log.1` alone; so there is for good if the monitor dies then."""
    (folder / "log.1").write_bytes(record(b"before"))
    assert text(folder) == b"before\n"
    assert text(folder, tail=1) == b"before\n"
    with closing(LogFollower(folder)) as follower:
        assert [line.data for line in follower.more()] == [b"before\n"]
        assert not follower.more()
        (folder / "log").write_bytes(record(b"after"))
        assert [line.data for line in follower.more()] == [b"after\n"]


def test_following_over_rotations(folder):
    """Each line once, in order, however the log turns meanwhile."""
    log = LogFile(4096)
    found = []
    with closing(LogFollower(folder)) as follower:
        for number in range(2000):
            log.write(b"stdout", b"%d\n" % number)
            if number % 7 == 0:
                while lines := follower.more():
                    found += lines
        while lines := follower.more():
            found += lines
    assert [int(line.data) for line in found] == list(range(2000))
    os.close(log._file)


def test_who_follows_too_slowly_misses_the_oldest(folder):
    log = LogFile(4096)
    log.write(b"stdout", b"0\n")
    with closing(LogFollower(folder)) as follower:
        assert [line.data for line in follower.more()] == [b"0\n"]
        for number in range(1, 2000):
            log.write(b"stdout", b"%d\n" % number)
        found = []
        while lines := follower.more():
            found += [int(line.data) for line in lines]
    assert found[-1] == 1999
    assert found == [n for n in range(2000) if n in set(found)]
    assert sum(b - a > 1 for a, b in pairwise(found)) <= 1
    os.close(log._file)


def test_an_unfinished_line_is_seen_and_goes_on(folder):
    log = LogFile(1 << 20)
    with closing(LogFollower(folder, tail=5)) as follower:
        log.write(b"stdout", b"before\nname: ")
        assert [line.data for line in follower.more()] == [b"before\n", b"name: "]
        assert not follower.more()
        log.write(b"stdout", b"me\n")
        assert [line.data for line in follower.more()] == [b"me\n"]
    os.close(log._file)


def test_a_link_is_not_followed(folder, tmp_path):
    (folder / "elsewhere").write_bytes(record(b"secret"))
    (folder / "log").symlink_to("elsewhere")
    with pytest.raises(Exception, match="log"):
        list(read_log(folder))
