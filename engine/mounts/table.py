"""The kernel's table of mounts as a value: read once for a command, asked often.

Sync. Whether a folder is in use is answered for every mount namespace of which /proc shows a process,
so the cost of reading grows with the machine's mounts and processes, the cost of a question does not.
A mount is known by its IDs, never by its path: that changes under it, and is another for each root.
Folders are never compared by `st_dev` with the table: on btrfs that is another device than mountinfo's.
"""

import ctypes
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from engine.processes import pid_namespace

__all__ = [
    "MountEntry",
    "MountID",
    "MountTable",
    "Space",
    "here",
    "is_mounted",
    "mount_id",
    "parse",
]

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _DONT_SYNC, _NO_AUTOMOUNT = -100, 0x4000, 0x800
_INO, _MNT_ID, _MNT_ID_UNIQUE = 0x100, 0x1000, 0x4000  # of statx(2): Linux 4.11, 5.8 and 6.8
_MASK_AT, _INO_AT, _ID_AT, _STATX_BYTES = 0, 32, 144, 256  # <linux/stat.h>

_ESCAPED = re.compile(r"\\([0-7]{3})")
_INITIAL_PIDS = 0xEFFFFFFC  # PROC_PID_INIT_INO of <linux/proc_ns.h>


class MountID(NamedTuple):
    """Names a mount: `id` as mountinfo has it, used again later; `unique` never, 0 before Linux 6.8."""

    id: int
    unique: int


class MountEntry(NamedTuple):
    """A line of mountinfo."""

    id: int
    parent: int
    device: str
    root: str
    point: str
    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """A mount namespace, as a process in it sees it: `number` is its inode, `root` that process's."""

    number: int
    root: str
    entries: tuple[MountEntry, ...]


class _Use(NamedTuple):
    """Something that a mount is made of: a path in its namespace or, with a device, in a file system."""

    space: Space
    device: str
    path: str


def parse(table: bytes) -> tuple[MountEntry, ...]:
    """Return the lines of a mountinfo file."""
    # As bytes and by newline alone: the kernel escapes no other line break that a name may hold.
    return tuple(_entry(line) for line in table.split(b"\n") if line)


def _entry(line: bytes) -> MountEntry:
    fields = os.fsdecode(line).split(" ")
    number, parent, device, root, point = fields[:5]
    kind, source, options = fields[-3:]
    return MountEntry(
        id=int(number),
        parent=int(parent),
        device=device,
        root=_unescape(root),
        point=_unescape(point),
        type=kind,
        source=_unescape(source),
        options=tuple(_unescape(option) for option in options.split(",")),
    )


def _unescape(field: str) -> str:
    # proc(5): space, tab, newline and backslash are three octal digits, and commas within options.
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), field) if "\\" in field else field


def mount_id(path: Path | str) -> MountID:
    """Return what names the mount that `path` is on; zeros where that cannot be told."""
    return MountID(_statx(path, _MNT_ID) or _from_fdinfo(path), _statx(path, _MNT_ID_UNIQUE))


def _statx(path: Path | str, wanted: int, at: int = _ID_AT) -> int:
    buffer = ctypes.create_string_buffer(_STATX_BYTES)
    flags = _DONT_SYNC | _NO_AUTOMOUNT
    if _libc.statx(_AT_FDCWD, os.fsencode(path), flags, ctypes.c_uint(wanted), buffer) < 0:
        return 0
    mask = int.from_bytes(buffer.raw[_MASK_AT : _MASK_AT + 4], "little")
    return int.from_bytes(buffer.raw[at : at + 8], "little") if mask & wanted else 0


def _from_fdinfo(path: Path | str) -> int:
    """Return a mount's ID as kernels before 5.8 tell it."""
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        lines = Path(f"/proc/self/fdinfo/{opened}").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("mnt_id:")), 0)
    except OSError:
        return 0
    finally:
        os.close(opened)


def is_mounted(target: Path) -> bool:
    """Say whether something is mounted at `target` itself, a path without symlinks, right now."""
    return mount_id(target).id != mount_id(target.parent).id


def here() -> int:
    """Return the inode of this process's mount namespace."""
    return Path("/proc/self/ns/mnt").stat().st_ino


@dataclass(frozen=True, eq=False)
class MountTable:
    """All mounts at one moment: of this process's namespace, and of the others that /proc shows.

    Among the others is also this namespace as processes with another root (chroot) see it.
    """

    own: Space
    others: tuple[Space, ...]
    sees_all: bool
    """Whether the processes of every mount namespace are shown here."""

    @classmethod
    def read(cls) -> "MountTable":
        """Read it from /proc."""
        own = _own()
        # 0: of a kernel without pid namespaces, where everyone sees all processes.
        return cls(own, tuple(_others(own.number)), pid_namespace() in {0, _INITIAL_PIDS})

    @classmethod
    def blank(cls) -> "MountTable":
        """Return one that shows nothing: for who knows that what he asks about is not mounted."""
        return cls(Space(0, "", ()), (), sees_all=False)

    @classmethod
    def read_own(cls) -> "MountTable":
        """Read this namespace alone: it says what is mounted where, not whether a folder is in use."""
        return cls(_own(), (), sees_all=False)

    def on_top(self, target: Path) -> MountEntry | None:
        """Return what is mounted at `target` itself, on top of what else is there."""
        entry = self._by_id.get(mount_id(target).id)
        return entry if entry is not None and entry.point == str(target) else None

    def find(self, mount: MountID, device: str) -> MountEntry | None:
        """Return a mount of this namespace, wherever it is by now, if this process's root shows it."""
        entry = self._by_id.get(mount.id)
        return entry if entry is not None and _is_still(mount, device, self.own, entry) else None

    def find_anywhere(self, mount: MountID, device: str) -> MountEntry | None:
        """Return a mount as any namespace or root shows it, but this process's first."""
        elsewhere = (
            entry
            for space, entry in self._elsewhere.get(mount.id, ())
            if _is_still(mount, device, space, entry)
        )
        return self.find(mount, device) or next(elsewhere, None)

    def is_shown(self, space: int) -> bool:
        """Say whether a mount namespace is among those that were read."""
        return space == self.own.number or any(other.number == space for other in self.others)

    def below(self, mount: int) -> list[str]:
        """Return the mount points on a mount."""
        return [entry.point for entry in self.own.entries if entry.parent == mount]

    def uses(self, folder: Path) -> bool:
        """Say whether a mount is made of `folder` or of something in it."""
        if not folder.exists():
            return False
        candidates = self._index.get(_last_two(str(folder)), ())
        return any(self._is(use, folder) for use in candidates)

    def names(self, folder: Path) -> bool:
        """Say whether a mount was made of what stood at the path of `folder`, which may be gone."""
        candidates = self._index.get(_last_two(str(folder)), ())
        return any(use.path.endswith(str(folder)) for use in candidates)

    def is_made_of(self, entry: MountEntry, folder: Path) -> bool:
        """Say whether a mount of this namespace is made of something in `folder`.

        aufs may keep its branches to itself: what someone asks of ours is taken to be ours.
        """
        if entry.type == "aufs":
            return True
        above = [use for whole in _uses_of(self.own, entry) for use in _with_parents(whole)]
        return any(self._is(use, folder) for use in above if use.path.endswith(f"/{folder.name}"))

    # -- how it is found ----------------------------------------------------------------------

    @cached_property
    def _by_id(self) -> dict[int, MountEntry]:
        return {entry.id: entry for entry in self.own.entries}

    @cached_property
    def _elsewhere(self) -> dict[int, list[tuple[Space, MountEntry]]]:
        found: defaultdict[int, list[tuple[Space, MountEntry]]] = defaultdict(list)
        for space in self.others:
            for entry in space.entries:
                found[entry.id].append((space, entry))
        return dict(found)

    @cached_property
    def _index(self) -> dict[tuple[str, str], list[_Use]]:
        """What mounts are made of, by the last two names of each folder on its path."""
        found: defaultdict[tuple[str, str], list[_Use]] = defaultdict(list)
        uses = {use for s in (self.own, *self.others) for e in s.entries for use in _uses_of(s, e)}
        for whole in uses:
            for use in _with_parents(whole):
                found[_last_two(use.path)].append(use)
        return dict(found)

    def _is(self, use: _Use, folder: Path) -> bool:
        if use.device:
            within = self._in_file_system(folder)
            # In a chroot the mount that the store is on may not be shown: then compare the ends.
            return (use.device, use.path) == within if within else use.path.endswith(str(folder))
        if use.space is self.own and use.path == str(folder):
            return True
        same = _same_file(use.space.root + use.path, folder)
        if same is None or (not same and use.space is self.own):
            # Whoever mounted it may have had another root (chroot): one is then the other's end.
            return use.path.endswith(str(folder)) or str(folder).endswith(use.path)
        return same

    def _in_file_system(self, folder: Path) -> tuple[str, str] | None:
        """Return the device and the path within it of a folder; None if its mount is not shown."""
        entry = self._by_id.get(mount_id(folder).id)
        if entry is None or not folder.is_relative_to(entry.point):
            return None
        below = folder.relative_to(entry.point)
        return entry.device, os.path.normpath(os.path.join(entry.root, below))


def _is_still(mount: MountID, device: str, space: Space, entry: MountEntry) -> bool:
    """Say whether the entry with a mount's ID is that mount."""
    if (device or not mount.unique) and entry.device != device:  # not noted where the ID tells
        return False
    now = mount_id(space.root + entry.point)
    # An ID is soon used again; the one for ever can only be asked of what is on top.
    return now.id != mount.id or not mount.unique or now.unique == mount.unique


def _with_parents(use: _Use) -> Iterator[_Use]:
    """Return a use of a path, and of each folder that it is in."""
    path = use.path
    while path and path != "/":
        yield use._replace(path=path)
        path = path.rpartition("/")[0]


def _last_two(path: str) -> tuple[str, str]:
    above, _, name = path.rpartition("/")
    return above.rpartition("/")[2], name


def _same_file(path: str, folder: Path) -> bool | None:
    try:
        return os.path.samefile(path, folder)
    except OSError:
        return None


def _own() -> Space:
    return Space(here(), "", parse(Path("/proc/self/mountinfo").read_bytes()))


def _others(own: int) -> Iterator[Space]:
    """Read every other namespace once for each root in it, through a process that has that root."""
    # mountinfo leaves out what is not below the reader's root: a chroot has a table of its own.
    seen = {(own, _root_of(Path("/proc/self")))}
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            number = (process / "ns" / "mnt").stat().st_ino
            view = (number, _root_of(process))
            if view not in seen:
                table = (process / "mountinfo").read_bytes()
                seen.add(view)
                yield Space(number, f"{process}/root", parse(table))
        except OSError:  # it ended, or is not ours to look at
            continue


def _root_of(process: Path) -> tuple[int, int]:
    """Return what names the folder that a process has as its root."""
    root = process / "root"
    return mount_id(root).id, _statx(root, _INO, _INO_AT)


def _uses_of(space: Space, entry: MountEntry) -> Iterator[_Use]:
    if entry.root != "/":
        yield _Use(space, entry.device, entry.root)
    if entry.source.startswith("/"):
        yield _Use(space, "", entry.source)
    if entry.type == "overlay":
        for path in _overlay_layers(entry):
            yield _Use(space, "", path)
    elif entry.type == "aufs":
        for path in _aufs_branches(entry):
            yield _Use(space, "", path)


def _overlay_layers(entry: MountEntry) -> Iterator[str]:
    # Where names were relative to save space, the folder that they start from is the source.
    base = entry.source if entry.source.startswith("/") else "/"
    for option in entry.options:
        key, _, value = option.partition("=")
        if key in {"lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir"}:
            for layer in value.split(":") if key == "lowerdir" else (value,):
                yield os.path.normpath(os.path.join(base, layer))


def _aufs_branches(entry: MountEntry) -> Iterator[str]:
    """Return the branches, which aufs tells in sysfs alone (aufs(5), "SYSFS AND MOUNT COMMAND")."""
    for option in entry.options:
        if option.startswith("si="):
            for file in Path("/sys/fs/aufs", option.replace("=", "_")).glob("br[0-9]*"):
                try:
                    yield os.fsdecode(file.read_bytes()).rstrip("\n").rpartition("=")[0]
                except OSError:
                    continue
        elif option.startswith("br:"):
            yield from (branch.rpartition("=")[0] for branch in option[3:].split(":"))
