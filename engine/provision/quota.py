"""How much a container may write: its folders are a project of their file system, which has a limit.

Sync; safe from any thread and process. ext4 and xfs count what is in a project, a number that each file
has, and refuse what goes over its limit (EDQUOT, ENOSPC) to whoever writes to it, and to nobody else.
What is made in a folder of a project is of it too, so folders are put in it before they are written to;
all that one overlay writes to in one project, as nothing is renamed from one to another (EXDEV).

Nobody keeps a list of the numbers in use. Others count from 1 (/etc/projid), from 2^20 (kubelet), or on
from that of the folder above (docker, podman); several stores may lie on one file system. So ours are
of a range that none of those uses, one is taken at random, and it is ours if nothing counts for it but
the one folder that was just put in it: of two who take the same at once the later sees both, and takes
another. A project ends with its last file. Its number is free then, whatever limit it still has: so
there is nothing to clear, and nothing that a crash could leave. The range is small as xfs never gives
back the room in which it notes what a number has.

A process that is root outside all user namespaces can take its own files out of a project (ioctl(2) with
FS_IOC_FSSETXATTR or FS_IOC_SETFLAGS): containers may not call that (`engine.running.confinement`).
"""

import errno
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from engine.errors import FailedPrecondition, InvalidArgument, NotSupported, ResourceExhausted, os_errors
from engine.fs.attributes import beneath, folder_descriptor
from engine.fs.kernel import (
    ProjectQuota,
    enforces_project_quotas,
    limit_project,
    open_beneath,
    project_of,
    project_quota,
    put_in_project,
)

__all__ = ["PROJECTS", "change_limit", "check_quotas", "limit", "quota_of"]

PROJECTS = range(1 << 30, (1 << 30) + (1 << 16))
"""The numbers of ours: xfs takes some 9 MB to note what all of them have."""

_TRIES = 100
_LEAST_INODES = 1024  # else a small limit would be one on folders alone


def check_quotas(folder: Path) -> None:
    """Raise NotSupported, with what to do, if what is below a folder of ours cannot have limits."""
    with folder_descriptor(folder) as opened, os_errors(f"quota of {folder}"):
        try:
            above, enforced = project_of(opened), enforces_project_quotas(opened)
        except OSError as error:
            if error.errno in {errno.EPERM, errno.EACCES}:
                raise
            enforced = False
        if not enforced:
            raise NotSupported(
                f"{folder}: the file system has no project quotas; mount it with the option prjquota "
                "(xfs, or ext4 after `tune2fs -O project,quota`), or run without a limit"
            )
        if above:
            raise NotSupported(
                f"{folder} counts for project {above} of its file system, so nothing in it can have a "
                "limit of its own; put the store in a folder of no project (`chattr -p 0`)"
            )


def limit(folders: Sequence[Path], size: int) -> None:
    """Let all that is in some folders of one file system, together, come to so many bytes at most.

    What is in them counts, and of inodes they get as large a share of the file system's. They are not
    written to yet, and lie in a folder of no project. NotSupported where it cannot be had, and
    ResourceExhausted for less than they hold already: each says what to do. Links and special files that
    are there already stay in no project: xfs does not rename those (EXDEV), as if they were elsewhere.
    """
    check_quotas(folders[0].parent)
    with ExitStack() as stack, os_errors(f"quota of {folders[0]}"):
        opened = [stack.enter_context(folder_descriptor(folder)) for folder in folders]
        project = _new_project(opened[0])
        for folder in opened:
            for file in _files(folder):
                put_in_project(file, project)
        _set(opened[0], project, size)


def change_limit(folder: Path, size: int) -> None:
    """Change what `limit` was told of a folder and those with it; 0 is no limit.

    FailedPrecondition for one that was never limited: what was written to it counts for nothing.
    InvalidArgument for what is no number of bytes, and NotSupported as for `limit`.
    """
    if size < 0:
        raise InvalidArgument("a quota is a number of bytes, 0 for none")
    check_quotas(folder.parent)
    with folder_descriptor(folder) as opened, os_errors(f"quota of {folder}"):
        project = project_of(opened)
        if project not in PROJECTS:
            raise FailedPrecondition(
                f"{folder} was made without a limit and cannot get one; make it anew with a limit"
            )
        _set(opened, project, size)


def _set(folder: int, project: int, size: int) -> None:
    has, disk = project_quota(folder, project), os.fstatvfs(folder)
    if 0 < size < has.size:
        raise ResourceExhausted(
            f"a limit of {size} bytes is less than the {has.size} that are there already; give more"
        )
    share = disk.f_files * size // (disk.f_blocks * disk.f_frsize)
    inodes = max(share, has.inodes + _LEAST_INODES)
    limit_project(folder, project, size, inodes if size else 0)


def quota_of(folder: Path) -> ProjectQuota | None:
    """Return what there is in the project of a folder, and may be; None for one without a limit."""
    with folder_descriptor(folder) as opened:
        try:
            project = project_of(opened)
            return project_quota(opened, project) if project in PROJECTS else None
        except OSError:  # a file system that has no projects, or none any more
            return None


def _new_project(folder: int) -> int:
    """Put a folder in a project that nothing else is in, and return that. ResourceExhausted."""
    for _ in range(_TRIES):
        project = random.choice(PROJECTS)
        if project_quota(folder, project).inodes:
            continue
        put_in_project(folder, project)
        if project_quota(folder, project).inodes == 1:
            limit_project(folder, project, 0, 0)  # that of an earlier one
            return project
        put_in_project(folder, 0)  # somebody else took it at the same moment
    raise ResourceExhausted("no project of the file system is free for another limit; remove containers")


def _files(top: int) -> Iterator[int]:
    """Yield descriptors of a folder and of all files and folders in it; other kinds have no project."""
    pending = [b""]
    while pending:
        path = pending.pop()
        with beneath(top, path) as folder:
            yield folder
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(os.path.join(path, name))
                    elif entry.is_file(follow_symlinks=False):
                        with _opened(folder, name) as file:
                            yield file


@contextmanager
def _opened(folder: int, name: bytes) -> Iterator[int]:
    file = open_beneath(folder, name, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield file
    finally:
        os.close(file)
