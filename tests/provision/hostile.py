"""A root file system that a stranger made, beside something of the host's that he is after.

Sync. `Host.unharmed` fails if anything outside of the root file system was made or changed.
"""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CANARY", "KINDS", "Host", "fill"]

CANARY = "root:x:4242:4242::/canary:/bin/sh\n"


class Host:
    """`victim`, a folder of the host's, and `rootfs`, in which the stranger may put anything."""

    def __init__(self, folder: Path) -> None:
        self.rootfs = folder / "rootfs"
        self.victim = folder / "victim"
        self.rootfs.mkdir()
        self.victim.mkdir()
        for name in ("passwd", "group", "resolv.conf", "hosts"):
            (self.victim / name).write_text(CANARY)
        os.mkfifo(self.victim / "fifo")
        self._before = self._seen()

    def _seen(self) -> dict[str, object]:
        beside = {path.name for path in self.victim.parent.iterdir()}
        found: dict[str, object] = {"..": beside - {"config.json", "runc"}}  # a bundle's
        for path in (self.victim, *sorted(self.victim.rglob("*"))):
            about = path.lstat()
            found[path.name] = (about.st_mode, about.st_mtime_ns, about.st_ctime_ns, about.st_size)
        return found

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """Fail a block that changes anything of the host's."""
        yield
        assert self._seen() == self._before


def _link(target: str) -> Callable[[Path, Host], None]:
    return lambda path, host: path.symlink_to(target.format(victim=host.victim, name=path.name))


def _sparse(path: Path, _: Host) -> None:
    path.write_text(CANARY)
    os.truncate(path, 1 << 40)


def _socket(path: Path, _: Host) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o666)


def _device(path: Path, _: Host) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # zero: reading it never ends


KINDS: dict[str, Callable[[Path, Host], None]] = {
    "a link to the host": _link("{victim}/{name}"),
    "a link up to the host": _link("../../victim/{name}"),
    "a link far up": _link("../" * 40 + "{victim}/{name}"),
    "a link to a FIFO of the host": _link("{victim}/fifo"),
    "a link to a process": _link("/proc/self/environ"),
    "a link to a root": _link("/proc/1/root/etc/passwd"),
    "a link to itself": _link("{name}"),
    "a link to nothing": _link("nothing"),
    "a FIFO": lambda path, _: os.mkfifo(path),
    "a folder": lambda path, _: path.mkdir(),
    "a socket": _socket,
    "a device": _device,
    "a giant": _sparse,
}


def fill(host: Host, path: str, kind: str) -> None:
    """Put something at a path of the root file system."""
    at = host.rootfs / path
    at.parent.mkdir(parents=True, exist_ok=True)
    KINDS[kind](at, host)
