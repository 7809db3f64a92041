"""What the options of a mount mean: flags for the kernel, words for the file system, pieces of a page.

Pure. A later option undoes an earlier one, as in mount(8).
"""

from collections.abc import Sequence

from engine.errors import InvalidArgument, ResourceExhausted

__all__ = [
    "BIND",
    "BIND_FLAGS",
    "KEPT_BY_BINDS",
    "RDONLY",
    "REMOUNT",
    "attributes",
    "aufs_pieces",
    "flags_and_data",
    "parse_options",
]

RDONLY, REMOUNT, BIND = 0x1, 0x20, 0x1000
BIND_FLAGS = BIND | 0x4000  # with MS_REC

_NOSUID, _NODEV, _NOEXEC, _NOSYMFOLLOW = 0x2, 0x4, 0x8, 0x100
_NOATIME, _NODIRATIME, _RELATIME, _STRICTATIME = 0x400, 0x800, 0x200000, 0x1000000

_PER_MOUNT: dict[str, tuple[int, int]] = {
    # option: flags to set, flags to clear (mount(2))
    "ro": (RDONLY, 0),
    "rw": (0, RDONLY),
    "nosuid": (_NOSUID, 0),
    "suid": (0, _NOSUID),
    "nodev": (_NODEV, 0),
    "dev": (0, _NODEV),
    "noexec": (_NOEXEC, 0),
    "exec": (0, _NOEXEC),
    "nosymfollow": (_NOSYMFOLLOW, 0),
    "symfollow": (0, _NOSYMFOLLOW),
    "noatime": (_NOATIME, _STRICTATIME | _RELATIME),
    "atime": (0, _NOATIME),
    "nodiratime": (_NODIRATIME, 0),
    "diratime": (0, _NODIRATIME),
    "relatime": (_RELATIME, _NOATIME | _STRICTATIME),
    "strictatime": (_STRICTATIME, _NOATIME | _RELATIME),
}
_FLAGS = _PER_MOUNT | {"bind": (BIND, 0), "rbind": (BIND_FLAGS, 0)}

_ATTRIBUTES = (  # mount flag, attribute of fsmount(2)
    (RDONLY, 0x1),
    (_NOSUID, 0x2),
    (_NODEV, 0x4),
    (_NOEXEC, 0x8),
    (_NOATIME, 0x10),
    (_STRICTATIME, 0x20),
    (_NODIRATIME, 0x80),
    (_NOSYMFOLLOW, 0x200000),
)

KEPT_BY_BINDS = (
    # flag of statvfs(3), mount flag: what a bind mount has from its source and a remount would clear
    (0x1, RDONLY),
    (0x2, _NOSUID),
    (0x4, _NODEV),
    (0x8, _NOEXEC),
    (0x400, _NOATIME),
    (0x800, _NODIRATIME),
    (0x1000, _RELATIME),
    (0x2000, _NOSYMFOLLOW),
)


def flags_and_data(options: Sequence[str]) -> tuple[int, list[str]]:
    """Return the flags that options mean, and those that are the file system's to read."""
    flags, data = 0, []
    for option in options:
        if option in _FLAGS:
            on, off = _FLAGS[option]
            flags = flags & ~off | on
        else:
            data.append(option)
    return flags, data


def attributes(flags: int) -> int:
    """Return the attributes of fsmount(2) that mean the same as flags of mount(2)."""
    return sum(attribute for flag, attribute in _ATTRIBUTES if flags & flag)


def parse_options(texts: Sequence[str]) -> list[str]:
    """Return the options in comma-separated lists. InvalidArgument for all but those of any mount.

    What a file system reads by itself could swap the layers for other folders.
    """
    options = [option for text in texts for option in text.split(",") if option]
    for option in options:
        if option not in _PER_MOUNT:
            raise InvalidArgument(f"mount option {option!r}: there are {', '.join(_PER_MOUNT)}")
    return options


_AUFS_BRANCHES = 64  # in one call: some 84 options fill aufs's page


def aufs_pieces(data: Sequence[str], limit: int) -> list[str]:
    """Return what to mount with, then what to remount with, each of at most `limit` bytes.

    Branches keep their order: `br:` names the first of them, and `append:` adds one at the end
    (aufs(5)). mount(2) reads a page at a time, and aufs parses options into one page of its own.
    """
    fixed = [option for option in data if not option.startswith("br:")]
    branches = [b for option in data if option.startswith("br:") for b in option[3:].split(":")]
    pieces = [",".join([*fixed, f"br:{branches[0]}"])] if branches else [",".join(fixed)]
    held = 1
    for branch in branches[1:]:
        more = f":{branch}" if len(pieces) == 1 else f",append:{branch}"
        if held < _AUFS_BRANCHES and _size(pieces[-1] + more) <= limit:
            pieces[-1] += more
            held += 1
        else:
            pieces.append(f"append:{branch}")
            held = 1
    if any(_size(piece) > limit for piece in pieces):
        raise ResourceExhausted("a branch of this aufs mount has a path of over a page")
    return pieces


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))
