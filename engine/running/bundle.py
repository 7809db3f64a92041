"""From what an image says and what whoever runs it wants to an OCI bundle: one specification.

Sync; safe from any thread. Everything that depends on what is in the root file system (users, the
working folder, mount points) is settled here, by descriptor, before a runtime sees it: that is given
numbers, and paths without a link on the way (`engine.provision.inside`).
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.errors import InvalidArgument, NotSupported, os_errors, printable
from engine.oci.execution import IDS, Execution, check_command, check_env
from engine.oci.platform import Platform, matches, normalise
from engine.oci.runtime_spec import (
    VERSION,
    CapabilitySets,
    ConsoleSize,
    ContainerProcess,
    ContainerUser,
    CpuLimit,
    IDMapping,
    LinuxPart,
    LinuxResources,
    MemoryLimit,
    NamespaceEntry,
    PidsLimit,
    RootPart,
    Spec,
    SpecMount,
)
from engine.oci.signals import parse_signal
from engine.provision.inside import check_folders, open_rootfs
from engine.provision.users import Account, resolve_user
from engine.running import cgroups
from engine.running.confinement import (
    CAPABILITIES,
    DEVICES,
    MASKED,
    PATH,
    READONLY,
    default_mounts,
    seccomp,
)
from engine.running.mountpoints import Points
from engine.running.options import Bind, IDMap, Network, Resources, RunOptions

__all__ = ["Setting", "make_spec", "resource_limits", "stop_signal", "write_bundle"]

_HOST_NAMES = ("/etc/resolv.conf", "/etc/hosts")
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,62}[A-Za-z0-9])?")
_PERIOD_US = 100_000
_LEAST_QUOTA_US = 1000  # the kernel takes no less
_LEAST_MEMORY = 6 << 20  # as in docker: with less a runtime cannot start anything


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """Where a container is to run."""

    unique: str
    """Names its cgroup, and its host if nothing else does."""
    rootfs: Path
    """Its root file system, mounted; a real path. Nothing else may write there meanwhile."""
    host: Platform
    parent: int = 0
    """A process whose network, host name and IPC it shares: that of the container it is nested in."""


class _Maps(msgspec.Struct, frozen=True, kw_only=True):
    """User and group IDs; none of either where the container has the host's."""

    users: Sequence[IDMap] = ()
    groups: Sequence[IDMap] = ()

    @property
    def owner(self) -> tuple[int, int] | None:
        """Who the container's root is to the host, where that is not whoever makes its files."""
        if not self.users or os.geteuid():
            return None
        return _outside(self.users), _outside(self.groups)


def make_spec(execution: Execution, options: RunOptions, setting: Setting) -> Spec:
    """Return the specification of a container; make the folders and mount points that it lacks inside.

    Raises InvalidArgument for what the options want and cannot be (no command at all among it), NotFound
    for a bind's source or a user that is not there, NotSupported for an image of another platform, and
    Refused for what the image says or has in its root file system.
    """
    _check_platform(execution.platform, setting.host)
    args = _command(execution, options)
    maps = _maps(options)
    hostname = _hostname(options, setting)
    with open_rootfs(setting.rootfs) as root:
        check_folders(root)
        account = resolve_user(root, options.user or execution.user)
        points = Points(root, setting.rootfs, maps.owner)
        points.bind(_binds(options))
        points.volumes(execution.volumes, readonly=options.readonly)
        cwd = points.working_folder(options.cwd or execution.working_dir or "/")
    return Spec(
        oci_version=VERSION,
        process=ContainerProcess(
            terminal=options.terminal,
            console_size=_console_size(options),
            user=_user(account, maps, rootless=options.rootless),
            args=args,
            env=_env(execution, options, hostname, account.home),
            cwd=cwd,
            capabilities=_capabilities(account),
        ),
        root=RootPart(path=str(setting.rootfs), readonly=options.readonly),
        hostname="" if setting.parent else hostname,
        mounts=[*_mounts(options, maps, points), *points.mounts],
        linux=_linux(options, setting, maps),
    )


def stop_signal(execution: Execution, options: RunOptions) -> int:
    """Return the number of the signal that asks the container to end; SIGTERM if nobody says."""
    return parse_signal(options.stop_signal or execution.stop_signal or "TERM")


def write_bundle(folder: Path, spec: Spec) -> None:
    """Write `config.json` into a folder; what was there by that name is replaced."""
    file = folder / "config.json"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os_errors(f"bundle {folder}"), os.fdopen(os.open(file, flags, 0o600), "wb") as opened:
        opened.write(msgspec.json.encode(spec))


# -- what is run ----------------------------------------------------------------------------------


def _check_platform(image: Platform, host: Platform) -> None:
    if not matches(normalise(host), normalise(image)):
        raise NotSupported(
            f"the image is for {printable(str(image)) or 'no platform'}, this machine is {host}; "
            "take one for this platform (--platform)"
        )


def _command(execution: Execution, options: RunOptions) -> Sequence[str]:
    """Return the words of the command. As in docker, another entrypoint drops the image's command."""
    if options.entrypoint is None:
        words = [*execution.entrypoint, *(options.args or execution.cmd)]
    else:
        words = [*options.entrypoint, *options.args]
    if not words:
        raise InvalidArgument("the image names no command to run; give one")
    if not words[0]:
        raise InvalidArgument("the name of the command is empty; give one")
    check_command(words)
    return words


def _env(execution: Execution, options: RunOptions, hostname: str, home: str) -> list[str]:
    check_env(options.env)
    env = {"PATH": PATH}
    if hostname:
        env["HOSTNAME"] = hostname
    if options.terminal:
        env["TERM"] = "xterm"
    for line in (*execution.env, *options.env):
        key, _, value = line.partition("=")
        env[key] = value
    env.setdefault("HOME", home)
    return [f"{key}={value}" for key, value in env.items()]


def _console_size(options: RunOptions) -> ConsoleSize | None:
    if not options.terminal or options.terminal_size is None:
        return None
    rows, columns = options.terminal_size
    return ConsoleSize(height=rows, width=columns)


def _hostname(options: RunOptions, setting: Setting) -> str:
    """Return the container's name as a host, empty where another container decides."""
    if setting.parent:
        if options.hostname:
            raise InvalidArgument("a nested container has the host name of the one that it is in")
        return ""
    if options.hostname and not _HOSTNAME.fullmatch(options.hostname):
        raise InvalidArgument(f"{printable(options.hostname)!r} is not a host name")
    own = os.uname().nodename if options.network is Network.HOST else setting.unique[:12]
    return options.hostname or own


def _user(account: Account, maps: _Maps, *, rootless: bool) -> ContainerUser:
    for number, ids, what in ((account.uid, maps.users, "user"), (account.gid, maps.groups, "group")):
        if ids and not _is_inside(ids, number):
            raise InvalidArgument(f"{what} {number} is not among the IDs that the container has")
    # Whoever maps only himself may not set groups (user_namespaces(7)).
    alone = rootless and sum(ids.size for ids in maps.groups) == 1
    groups = [] if alone else account.groups
    return ContainerUser(
        uid=account.uid,
        gid=account.gid,
        additional_gids=[gid for gid in groups if not maps.groups or _is_inside(maps.groups, gid)],
    )


def _capabilities(account: Account) -> CapabilitySets:
    """Return the capabilities of root, which others have only where a program gives them."""
    if account.uid:
        return CapabilitySets(bounding=CAPABILITIES)
    return CapabilitySets(bounding=CAPABILITIES, effective=CAPABILITIES, permitted=CAPABILITIES)


# -- where it is run ------------------------------------------------------------------------------


def _binds(options: RunOptions) -> list[Bind]:
    """Return what of the host's is to be seen in the container."""
    taken = {os.path.normpath(bind.target) for bind in options.binds}
    names = _HOST_NAMES if options.network is Network.HOST else ()
    return [
        *(
            Bind(source=name, target=name, readonly=True)
            for name in names
            if name not in taken and os.path.exists(name)
        ),
        *options.binds,
    ]


def _mounts(options: RunOptions, maps: _Maps, points: Points) -> list[SpecMount]:
    mounts = default_mounts(
        tty_group=not maps.groups or _is_inside(maps.groups, 5),
        # The kernel shows a user namespace only a /sys of its own network.
        own_sys=not maps.users or options.network is not Network.HOST,
        cgroup=not options.rootless,
    )
    return [mount for mount in mounts if not points.covers(mount.destination)]


def _linux(options: RunOptions, setting: Setting, maps: _Maps) -> LinuxPart:
    resources = None
    if options.rootless:
        if options.resources != Resources():
            raise NotSupported("limits of memory, processors and processes need root")
    else:
        limited = resource_limits(options.resources)
        resources = msgspec.structs.replace(limited, devices=DEVICES)
    return LinuxPart(
        uid_mappings=_mappings(maps.users),
        gid_mappings=_mappings(maps.groups),
        resources=resources,
        cgroups_path="" if options.rootless else cgroups.name_of(setting.unique),
        namespaces=list(_namespaces(options, setting, maps)),
        seccomp=seccomp(setting.host.architecture),
        masked_paths=MASKED,
        readonly_paths=READONLY,
    )


def _namespaces(options: RunOptions, setting: Setting, maps: _Maps) -> list[NamespaceEntry]:
    own = ["pid", "mount"]
    if os.path.exists("/proc/self/ns/cgroup"):
        own.append("cgroup")
    shared = [("ipc", "ipc"), ("uts", "uts")]
    if setting.parent:
        shared.append(("network", "net"))
    elif options.network is not Network.HOST:
        own.append("network")
    if maps.users:
        shared.append(("user", "user"))
    at = f"/proc/{setting.parent}/ns" if setting.parent else ""
    return [
        *(NamespaceEntry(type=kind) for kind in own),
        *(NamespaceEntry(type=kind, path=at and f"{at}/{name}") for kind, name in shared),
    ]


def resource_limits(resources: Resources) -> LinuxResources:
    """Return what a cgroup is told, devices left out: for a start and for an update. InvalidArgument."""
    memory, cpus, pids = resources.memory, resources.cpus, resources.pids
    quota = math.ceil(cpus * _PERIOD_US) if math.isfinite(cpus) else -1
    if memory and memory < _LEAST_MEMORY:
        raise InvalidArgument(f"{memory} bytes of memory are too few; give at least {_LEAST_MEMORY}")
    if quota and quota < _LEAST_QUOTA_US:
        raise InvalidArgument(f"{cpus} processors are too few; give at least 0.01")
    if pids < 0:
        raise InvalidArgument(f"{pids} is not a number of processes")
    return LinuxResources(
        memory=MemoryLimit(limit=memory) if memory else None,
        cpu=CpuLimit(quota=quota, period=_PERIOD_US) if quota else None,
        pids=PidsLimit(limit=pids) if pids else None,
    )


# -- IDs ------------------------------------------------------------------------------------------


def _maps(options: RunOptions) -> _Maps:
    """Return the ID maps; without root each is his own container's root, and nobody else."""
    if options.id_maps:
        for ids in options.id_maps:
            for first in (ids.inside, ids.outside):
                if ids.size < 1 or first not in IDS or first + ids.size - 1 not in IDS:
                    raise InvalidArgument(f"no IDs are mapped by {ids.inside}:{ids.outside}:{ids.size}")
        if not _is_inside(options.id_maps, 0):
            raise InvalidArgument("the ID maps leave out 0, which sets a container up; map it")
        return _Maps(users=options.id_maps, groups=options.id_maps)
    if options.rootless:
        return _Maps(
            users=[IDMap(inside=0, outside=os.geteuid(), size=1)],
            groups=[IDMap(inside=0, outside=os.getegid(), size=1)],
        )
    return _Maps()


def _is_inside(maps: Sequence[IDMap], number: int) -> bool:
    return any(ids.inside <= number < ids.inside + ids.size for ids in maps)


def _outside(maps: Sequence[IDMap]) -> int:
    """Return what 0 is to the host."""
    return next(ids.outside - ids.inside for ids in maps if _is_inside([ids], 0))


def _mappings(maps: Sequence[IDMap]) -> list[IDMapping]:
    return [IDMapping(container_id=ids.inside, host_id=ids.outside, size=ids.size) for ids in maps]
