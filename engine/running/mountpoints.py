"""Where in a container something of the host's is mounted, its volumes, and the folder it starts in.

Sync; safe from any thread. Each place is made if it is not there, as in docker, and named by its path
without links. What an image calls a volume is a folder of its root file system, with what the image has
there: it goes with the container, counts as its own, and can be written where all else is read-only.
"""

import os
import posixpath
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from engine.errors import InvalidArgument, NotFound, Refused, from_os_error, printable
from engine.oci.runtime_spec import SpecMount
from engine.provision.inside import Inside, Owner, check_no_links, make_file, make_folder, resolve
from engine.running.options import Bind

__all__ = ["Points"]

_OWN = ("/dev/shm", "/sys/fs/cgroup")
"""A container's own in any case; images call them volumes, people mount others there."""
_SYSLOG = "/dev/log"


class Points:
    """The mount points of one container, found and made in its root file system."""

    def __init__(self, root: int, rootfs: Path, owner: Owner) -> None:
        """`root` is a descriptor of `rootfs`; what is made there belongs to `owner`."""
        self._root = root
        self._rootfs = rootfs
        self._owner = owner
        self._sources: dict[str, str] = {}
        self._mounts: list[SpecMount] = []

    @property
    def mounts(self) -> list[SpecMount]:
        """All of them, those above before those below."""
        return sorted(self._mounts, key=lambda mount: mount.destination.count("/"))

    def covers(self, path: str) -> bool:
        """Say whether something is mounted right there."""
        return path in self._sources

    def bind(self, binds: Iterable[Bind]) -> None:
        """Add files and folders of the host's. InvalidArgument, NotFound, Refused."""
        # Those above first: they hide what the image has below.
        for bind in sorted(binds, key=lambda bind: posixpath.normpath(bind.target).count("/")):
            source, is_folder = _source(bind)
            target = self._target(bind, is_folder=is_folder)
            if target in self._sources:
                raise InvalidArgument(f"two mounts have the same target {printable(target)!r}")
            self._sources[target] = source
            self._add(source, target, readonly=bind.readonly)

    def _target(self, bind: Bind, *, is_folder: bool) -> str:
        what = "the mount target"
        if not bind.target.startswith("/") or posixpath.normpath(bind.target).strip("/") == "":
            raise InvalidArgument(f"{what} {printable(bind.target)!r} is not an absolute path below /")
        found = resolve(self._root, bind.target, what, {*self._sources, *_OWN, _SYSLOG})
        if found.path == "/":
            raise Refused(f"{what} {printable(bind.target)!r} is the root folder in the image")
        if found.cover in self._sources and found.path != found.cover:
            self._check_below(found, what)
        elif not found.cover:
            make = make_folder if is_folder else make_file
            make(self._root, found.path, what, self._owner)
        return found.path

    def volumes(self, paths: Sequence[str], *, readonly: bool) -> None:
        """Add the image's own volumes, but where something is mounted. Raises Refused."""
        what = "the volume"
        for path in paths:
            found = resolve(self._root, path, what, {*self._sources, *_OWN})
            if found.cover:
                continue
            if found.path == "/":
                raise Refused(f"{what} {printable(path)!r} is the root folder")
            make_folder(self._root, found.path, what, self._owner)
            if readonly and found.path not in {mount.destination for mount in self._mounts}:
                self._add(f"{self._rootfs}{found.path}", found.path, readonly=False)

    def working_folder(self, path: str) -> str:
        """Return the folder that the process starts in. InvalidArgument, Refused."""
        what = "the working folder"
        if not path.startswith("/"):
            raise InvalidArgument(f"{what} {printable(path)!r} is not an absolute path")
        found = resolve(self._root, path, what, {*self._sources, _OWN[0]})
        if not found.cover:
            make_folder(self._root, found.path, what, self._owner)
        elif found.cover in self._sources:
            self._check_below(found, what)
        return found.path

    def _check_below(self, found: Inside, what: str) -> None:
        rest = posixpath.relpath(found.path, found.cover)
        check_no_links(self._sources[found.cover], rest, what)

    def _add(self, source: str, target: str, *, readonly: bool) -> None:
        # `rro` also makes read-only what is mounted below; a runtime that does not know it ignores it.
        how = ("ro", "rro") if readonly else ("rw",)
        self._mounts.append(
            SpecMount(
                destination=target, type="bind", source=source, options=("rbind", "rprivate", *how)
            )
        )


def _source(bind: Bind) -> tuple[str, bool]:
    """Return the real path of what is to be mounted, and whether it is a folder."""
    if not bind.source.startswith("/"):
        raise InvalidArgument(f"the mount source {printable(bind.source)!r} is not an absolute path")
    try:
        source = os.path.realpath(bind.source)
        source.encode()
        mode = os.stat(source).st_mode
    except FileNotFoundError:
        raise NotFound(
            f"the mount source {printable(bind.source)} is not there; make it first"
        ) from None
    except ValueError:
        raise InvalidArgument(f"{printable(bind.source)!r} is not UTF-8, or has a NUL") from None
    except OSError as error:
        raise from_os_error(error, f"the mount source {printable(bind.source)}") from error
    return source, stat.S_ISDIR(mode)
