"""What every container gets, and is kept from: mounts, devices, capabilities, system calls.

Pure. As docker and containerd have it, so that an image runs here if it does there; but the list of
system calls names what is denied, of what theirs does not allow without more capabilities.
"""

from engine.oci.runtime_spec import DeviceRule, Seccomp, SpecMount, SyscallArgument, SyscallRule

__all__ = [
    "CAPABILITIES",
    "DEVICES",
    "MASKED",
    "PATH",
    "READONLY",
    "default_mounts",
    "seccomp",
]

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CAPABILITIES = (
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
)

_CHARACTER_DEVICES = (
    (1, 3),  # null
    (1, 5),  # zero
    (1, 7),  # full
    (1, 8),  # random
    (1, 9),  # urandom
    (5, 0),  # tty
    (5, 1),  # console
    (5, 2),  # ptmx
    (136, None),  # pts
)
DEVICES = (
    DeviceRule(allow=False, access="rwm"),
    DeviceRule(allow=True, type="c", access="m"),  # to make one is not to open it
    DeviceRule(allow=True, type="b", access="m"),
    *(
        DeviceRule(allow=True, type="c", major=major, minor=minor, access="rwm")
        for major, minor in _CHARACTER_DEVICES
    ),
)

MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
)
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def default_mounts(*, tty_group: bool, own_sys: bool, cgroup: bool) -> list[SpecMount]:
    """Return what is mounted in each container, in order.

    `tty_group`: group 5 is there to own terminals. `own_sys`: its own view of /sys can be mounted; else
    the host's is shown. `cgroup`: /sys/fs/cgroup shows the container's own.
    """
    strict = ("nosuid", "noexec", "nodev")
    tty = ("gid=5",) if tty_group else ()
    mounts = [
        ("/proc", "proc", "proc", strict),
        ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", *tty),
        ),
        ("/dev/shm", "tmpfs", "shm", (*strict, "mode=1777", "size=65536k")),
        ("/dev/mqueue", "mqueue", "mqueue", strict),
        ("/sys", "sysfs", "sysfs", (*strict, "ro"))
        if own_sys
        else ("/sys", "none", "/sys", ("rbind", *strict, "ro", "rro")),
    ]
    if cgroup:
        mounts.append(("/sys/fs/cgroup", "cgroup", "cgroup", (*strict, "relatime", "ro")))
    return [
        SpecMount(destination=destination, type=kind, source=source, options=options)
        for destination, kind, source, options in mounts
    ]


_DENIED = (
    # other code for the kernel, and a look into it
    ["bpf", "create_module", "delete_module", "finit_module", "init_module", "query_module"],
    ["get_kernel_syms", "kexec_file_load", "kexec_load", "syslog", "nfsservctl", "sysfs", "_sysctl"],
    # the host's clock, power, swap, accounting, quota and terminals
    ["clock_settime", "clock_settime64", "settimeofday", "stime", "reboot", "swapoff", "swapon"],
    ["acct", "file_setattr", "quotactl", "quotactl_fd", "vhangup"],
    # keys, which are in no namespace, and files by their numbers, past all paths
    ["add_key", "keyctl", "request_key", "open_by_handle_at", "lookup_dcookie"],
    # hardware, and what only old programs know
    ["ioperm", "iopl", "vm86", "vm86old", "uselib", "ustat"],
    # what many ways into the kernel began with
    ["io_uring_enter", "io_uring_register", "io_uring_setup"],
    ["fanotify_init", "perf_event_open", "userfaultfd"],
)

# FS_IOC_FSSETXATTR and FS_IOC_SETFLAGS, this also as 32-bit programs have it: root without a user
# namespace takes his files out of their project with them, so that no quota holds them any more
# (`engine.provision.quota`).
_DENIED_IOCTLS = (0x401C5820, 0x40086602, 0x40046602)
_IOCTL_BITS = 0xFFFFFFFF  # of the number the kernel sees no more

_ARCHITECTURES = {
    "amd64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "arm64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
    "s390x": ("SCMP_ARCH_S390X", "SCMP_ARCH_S390"),
}


def seccomp(architecture: str) -> Seccomp:
    """Return which system calls the programs of an architecture may make; others fail with EPERM."""
    number = [
        SyscallArgument(index=1, op="SCMP_CMP_MASKED_EQ", value=_IOCTL_BITS, value_two=ioctl)
        for ioctl in _DENIED_IOCTLS
    ]
    return Seccomp(
        default_action="SCMP_ACT_ALLOW",
        architectures=_ARCHITECTURES.get(architecture, ()),
        syscalls=[
            *(SyscallRule(names=names, action="SCMP_ACT_ERRNO") for names in _DENIED),
            *(SyscallRule(names=["ioctl"], action="SCMP_ACT_ERRNO", args=[one]) for one in number),
        ],
    )
