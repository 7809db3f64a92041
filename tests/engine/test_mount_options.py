"""What mount options mean: flags, refusals, and aufs in pieces of a page."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidArgument, ResourceExhausted
from engine.mounts.options import attributes, aufs_pieces, flags_and_data, parse_options

_NOSUID, _NODEV, _RDONLY = 0x2, 0x4, 0x1


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        (["nosuid", "nodev"], _NOSUID | _NODEV),
        (["nosuid", "nodev", "suid"], _NODEV),
        (["ro", "rw"], 0),
        (["rw", "ro"], _RDONLY),
        (["rbind"], 0x5000),
        (["noatime", "relatime"], 0x200000),
    ],
)
def test_the_last_of_two_options_counts(options: list[str], flags: int):
    assert flags_and_data(options) == (flags, [])


def test_what_is_no_flag_is_for_the_file_system():
    assert flags_and_data(["ro", "lowerdir=/a:/b", "index=off"]) == (
        _RDONLY,
        ["lowerdir=/a:/b", "index=off"],
    )
    assert attributes(flags_and_data(["ro", "nosuid", "noatime"])[0]) == 0x1 | 0x2 | 0x10


def test_options_are_lists_and_may_come_several_times():
    assert parse_options(["noexec,suid", "dev", ""]) == ["noexec", "suid", "dev"]


@pytest.mark.parametrize(
    "option",
    [
        "lowerdir=/",
        "upperdir=/x",
        "workdir=/x",
        "lowerdir+=/x",
        "br:/=rw",
        "append:/",
        "bind",
        "remount",
    ],
)
def test_options_that_could_swap_layers_are_refused(option: str):
    with pytest.raises(InvalidArgument, match="there are ro, rw"):
        parse_options([f"noexec,{option}"])


def _branches(pieces: list[str]) -> list[str]:
    """Return the branches in the order in which the kernel has them after every piece."""
    found: list[str] = []
    for piece in pieces:
        for option in piece.split(","):
            if option.startswith("br:"):
                assert not found
                found += option[3:].split(":")
            elif option.startswith("append:"):
                found.append(option[7:])
    return found


@given(
    st.lists(st.text("abcé/", min_size=1, max_size=300), min_size=1, max_size=127),
    st.integers(700, 4094),
)
def test_aufs_in_pieces_keeps_every_branch_in_order(names: list[str], limit: int):
    branches = [f"/{name}={'rw' if at == 0 else 'ro+wh'}" for at, name in enumerate(names)]
    fixed = ["dio", "xino=/dev/shm/aufs.xino", "dirperm1"]
    pieces = aufs_pieces([*fixed, "br:" + ":".join(branches)], limit)
    assert _branches(pieces) == branches
    assert all(len(piece.encode()) <= limit for piece in pieces)
    assert pieces[0].startswith(",".join(fixed))
    assert not any(option in ",".join(pieces[1:]).split(",") for option in fixed)
    for before, after in pairwise(pieces):
        first = after.split(",")[0]
        assert len(f"{before},{first}".encode()) > limit or before == pieces[0], (
            "a piece more than needed"
        )


def test_a_short_aufs_mount_is_one_piece():
    assert aufs_pieces(["dio", "br:/a=rw:/b=ro+wh"], 4094) == ["dio,br:/a=rw:/b=ro+wh"]


def test_a_path_of_over_a_page_is_told():
    with pytest.raises(ResourceExhausted, match="over a page"):
        aufs_pieces([f"br:/a=rw:/{'x' * 5000}=ro+wh"], 4094)


def test_a_piece_has_no_more_branches_than_aufs_parses_at_once():
    first, *more = aufs_pieces(["br:" + ":".join(f"b{number}" for number in range(200))], 4096)
    counts = [first.count(":"), *(piece.count("append:") for piece in more)]
    assert counts == [64, 64, 64, 8]
