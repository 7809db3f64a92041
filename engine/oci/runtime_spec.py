"""The OCI runtime specification, `config.json`: as much of it as is written here.

Pure. Names and meaning are those of the specification (1.0.2, config.md and config-linux.md), which runc
and crun read; what is left at its default is not written.
"""

from collections.abc import Mapping, Sequence

import msgspec

__all__ = [
    "VERSION",
    "CapabilitySets",
    "ConsoleSize",
    "ContainerProcess",
    "ContainerUser",
    "CpuLimit",
    "DeviceRule",
    "IDMapping",
    "LinuxPart",
    "LinuxResources",
    "MemoryLimit",
    "NamespaceEntry",
    "PidsLimit",
    "RootPart",
    "Seccomp",
    "Spec",
    "SpecMount",
    "SyscallArgument",
    "SyscallRule",
]

VERSION = "1.0.2"


class ContainerUser(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Who the process is, as the container has it."""

    uid: int
    gid: int
    additional_gids: Sequence[int] = ()


class CapabilitySets(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Sets of capabilities by their names, `CAP_CHOWN`."""

    bounding: Sequence[str] = ()
    effective: Sequence[str] = ()
    permitted: Sequence[str] = ()


class ConsoleSize(msgspec.Struct, frozen=True, kw_only=True):
    """What a terminal is when it is made."""

    height: int
    width: int


class ContainerProcess(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What is run."""

    terminal: bool = False
    console_size: ConsoleSize | None = None
    user: ContainerUser
    args: Sequence[str]
    env: Sequence[str]
    cwd: str
    capabilities: CapabilitySets


class RootPart(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """The root file system: a folder of the host's."""

    path: str
    readonly: bool = False


class SpecMount(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What is mounted in a container, in order."""

    destination: str
    type: str
    source: str
    options: Sequence[str] = ()


class NamespaceEntry(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A namespace: of the container's own, or the one at `path`."""

    type: str
    path: str = ""


class IDMapping(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """User or group IDs as the container has them, and as the host does."""

    container_id: int = msgspec.field(name="containerID")
    host_id: int = msgspec.field(name="hostID")
    size: int


class DeviceRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What may be done with devices; None is any number."""

    allow: bool
    type: str = ""
    major: int | None = None
    minor: int | None = None
    access: str


class MemoryLimit(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Bytes."""

    limit: int


class CpuLimit(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Microseconds of processor time in each period of so many."""

    quota: int
    period: int


class PidsLimit(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Processes and threads."""

    limit: int


class LinuxResources(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What the container's cgroup allows."""

    devices: Sequence[DeviceRule] = ()
    memory: MemoryLimit | None = None
    cpu: CpuLimit | None = None
    pids: PidsLimit | None = None


class SyscallArgument(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What an argument of a system call has to be, from 0, for a rule to hold."""

    index: int
    value: int
    value_two: int = 0
    op: str


class SyscallRule(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What becomes of system calls of these names, with these arguments."""

    names: Sequence[str]
    action: str
    args: Sequence[SyscallArgument] = ()


class Seccomp(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Which system calls the kernel lets the container make."""

    default_action: str
    architectures: Sequence[str] = ()
    syscalls: Sequence[SyscallRule] = ()


class LinuxPart(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """What Linux alone has."""

    uid_mappings: Sequence[IDMapping] = ()
    gid_mappings: Sequence[IDMapping] = ()
    resources: LinuxResources | None = None
    cgroups_path: str = ""
    namespaces: Sequence[NamespaceEntry]
    seccomp: Seccomp | None = None
    masked_paths: Sequence[str] = ()
    readonly_paths: Sequence[str] = ()


class Spec(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A container."""

    oci_version: str = msgspec.field(name="ociVersion")
    process: ContainerProcess
    root: RootPart
    hostname: str = ""
    mounts: Sequence[SpecMount] = ()
    linux: LinuxPart
    annotations: Mapping[str, str] = {}
