"""Attacks by attributes: overlay's xattrs, capabilities, ACLs, devices, odd modes and owners."""

import struct

from engine.testing.archives import member
from tests.security.harness import (
    D,
    F,
    Fails,
    H,
    Input,
    Row,
    S,
    X,
    file,
    folder,
    link,
    node,
    xattr,
)

__all__ = ["ATTRIBUTES", "CAPABILITY"]

CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)  # version 2: cap_net_bind_service
_VERSION_1 = struct.pack("<3I", 0x01000001, 1 << 10, 0)
_BAD_CAPABILITY = Fails("malformed capabilities")
_TOO_MANY = Fails("too many or too large xattrs")
_OVERLAY = ("redirect", "opaque", "metacopy", "origin", "impure", "upper", "nlink", "whiteouts")


def _capability(root: int) -> bytes:
    return struct.pack("<6I", 0x03000001, 1 << 10, 0, 0, 0, root)


def _with(key: str, value: bytes) -> dict[bytes, bytes]:
    return {xattr(key): value}


_ACCESS, _DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
_OTHERS = ((2, 7, 1234), (4, 7, 0xFFFFFFFF))


def _acl(*named: tuple[int, int, int], owner: int = 6, mask: int | None = 7, other: int = 0) -> bytes:
    """Return an ACL; `named` has users, the group of the file and groups."""
    entries = [(1, owner, 0xFFFFFFFF), *(named or [(4, 4, 0xFFFFFFFF)])]
    entries += [] if mask is None else [(16, mask, 0xFFFFFFFF)]
    entries.append((32, other, 0xFFFFFFFF))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


_BAD_ACL = Fails("malformed ACL")
_GRANTS_ALL = _acl(*_OTHERS, owner=7, mask=7, other=7)


ATTRIBUTES = (
    Row(
        "X-01",
        "xattrs by which overlay would show other files of the host are left out",
        {
            **{
                name: Input(
                    [
                        [F("d/old", b"old"), F("etc/x")],
                        [
                            D("d", pax=_with(f"trusted.overlay.{name}", b"/etc")),
                            F("f", b"in", pax=_with(f"trusted.overlay.{name}", b"y")),
                        ],
                    ],
                    {
                        "d": folder(),
                        "d/old": file(b"old"),
                        "etc": folder(),
                        "etc/x": file(),
                        "f": file(b"in"),
                    },
                )
                for name in _OVERLAY
            },
            "other-trusted": Input([[X("f", trusted__x=b"y")]], {"f": file()}),
        },
    ),
    Row(
        "X-02",
        "so are their forms for mounts of users and for nested mounts",
        {
            "user": Input(
                [[F("d/old")], [D("d", pax=_with("user.overlay.opaque", b"y")), F("d/new")]],
                {"d": folder(), "d/old": file(), "d/new": file()},
            ),
            "nested": Input(
                [
                    [F("d/old")],
                    [D("d", pax=_with("trusted.overlay.overlay.opaque", b"y")), F("d/new")],
                ],
                {"d": folder(), "d/old": file(), "d/new": file()},
            ),
            "not-overlay": Input([[X("f", user__overlayer=b"y")]], {"f": file(user__overlayer=b"y")}),
        },
    ),
    Row(
        "X-03",
        "setuid files stay as they are: the store's folders are closed to others (tested apart)",
        {
            "bits": Input(
                [
                    [F("u", b"x", mode=0o4755), F("g", b"x", mode=0o2755, gid=5), D("t", 0o1777)],
                    [D("gd", 0o2775, gid=5), F("gd/f"), D("gd/d")],
                ],
                {
                    "u": file(b"x", 0o4755),
                    "g": file(b"x", 0o2755, (0, 5)),
                    "t": folder(0o1777),
                    "gd": folder(0o2775, (0, 5)),
                    "gd/f": file(),
                    "gd/d": folder(),
                },
            ),
            "with-owner-and-capability": Input(
                [
                    [
                        F(
                            "f",
                            b"x" * 5000,
                            mode=0o6711,
                            uid=7,
                            gid=8,
                            pax=_with("security.capability", CAPABILITY),
                        )
                    ]
                ],
                {"f": file(b"x" * 5000, 0o6711, (7, 8), security__capability=CAPABILITY)},
            ),
        },
    ),
    Row(
        "X-04",
        "capabilities are for regular files, and must be some",
        {
            "file": Input(
                [[X("f", b"x", security__capability=CAPABILITY)], [F("other")]],
                {"f": file(b"x", security__capability=CAPABILITY), "other": file()},
            ),
            "owned-file": Input(
                [[F("f", b"x", uid=7, gid=8, pax=_with("security.capability", CAPABILITY))]],
                {"f": file(b"x", 0o644, (7, 8), security__capability=CAPABILITY)},
            ),
            "folder": Input([[D("d", pax=_with("security.capability", CAPABILITY))]], {"d": folder()}),
            "link": Input(
                lambda w: [[S("l", f"{w.victim}/hello", pax=_with("security.capability", CAPABILITY))]],
                lambda w: {"l": link(f"{w.victim}/hello")},
            ),
            "hard-link": Input(
                [[F("f"), H("h", "f", pax=_with("security.capability", CAPABILITY))]],
                {"f": file(links=["h"]), "h": file(links=["f"])},
            ),
            "short": Input([[X("f", security__capability=CAPABILITY[:-1])]], _BAD_CAPABILITY),
            "long": Input([[X("f", security__capability=CAPABILITY + b"x")]], _BAD_CAPABILITY),
            "empty": Input([[X("f", security__capability=b"")]], _BAD_CAPABILITY),
            "version-1": Input([[X("f", security__capability=_VERSION_1)]], _BAD_CAPABILITY),
            "unknown-version": Input(
                [[X("f", security__capability=struct.pack("<5I", 0x04000001, 1, 0, 0, 0))]],
                _BAD_CAPABILITY,
            ),
            "unknown-flag": Input(
                [[X("f", security__capability=struct.pack("<5I", 0x02000002, 1, 0, 0, 0))]],
                _BAD_CAPABILITY,
            ),
            "foreign-root": Input([[X("f", security__capability=_capability(1000))]], {"f": file()}),
            "own-root": Input(
                # The kernel shows it in the form of version 2.
                [[X("f", security__capability=_capability(0))]],
                {"f": file(security__capability=CAPABILITY)},
            ),
        },
    ),
    Row(
        "X-05",
        "labels of the host's security modules are the host's to give",
        {
            name: Input([[F("f", b"in", pax=_with(f"security.{name}", b"x"))]], {"f": file(b"in")})
            for name in ("selinux", "ima", "evm", "SMACK64")
        },
    ),
    Row(
        "X-06",
        "ACLs are kept and checked; the modes are those of the headers, whatever an ACL says",
        {
            "access": Input(
                [[F("f", mode=0o640, pax=_with(_ACCESS, _GRANTS_ALL))]],
                {"f": file(mode=0o640, system__posix_acl_access=_acl(*_OTHERS, mask=4))},
            ),
            "default": Input(
                [[D("d", 0o700, pax=_with(_DEFAULT, _GRANTS_ALL)), F("d/f", mode=0o600), D("d/e")]],
                {
                    "d": folder(0o700, system__posix_acl_default=_GRANTS_ALL),
                    "d/f": file(mode=0o600),
                    "d/e": folder(),
                },
            ),
            "no-more-than-the-mode": Input(
                [[F("f", mode=0o640, pax=_with(_ACCESS, _acl(mask=None)))]], {"f": file(mode=0o640)}
            ),
            "without-entries": Input(
                [[F("f", pax=_with(_ACCESS, struct.pack("<I", 2)))]], {"f": file()}
            ),
            "default-of-a-file": Input([[F("f", pax=_with(_DEFAULT, _GRANTS_ALL))]], {"f": file()}),
            "of-a-link": Input(
                lambda w: [[S("l", f"{w.victim}/hello", pax=_with(_ACCESS, _GRANTS_ALL))]],
                lambda w: {"l": link(f"{w.victim}/hello")},
            ),
            "of-a-fifo": Input(
                [[member("p", "6", pax=_with(_ACCESS, _GRANTS_ALL))]], {"p": node("fifo")}
            ),
            "of-a-hard-link": Input(
                [[F("f"), H("h", "f", pax=_with(_ACCESS, _GRANTS_ALL))]],
                {"f": file(links=["h"]), "h": file(links=["f"])},
            ),
            "of-the-root": Input([[D("./", pax=_with(_DEFAULT, _GRANTS_ALL)), F("f")]], {"f": file()}),
            "as-star-writes-them": Input(
                [[F("f", mode=0o640, pax={b"SCHILY.acl.access": b"user::rw-,user:7:rwx"})]],
                {"f": file(mode=0o640)},
            ),
            **{
                f"malformed-{name}": Input([[F("f", pax=_with(_ACCESS, value))]], _BAD_ACL)
                for name, value in {
                    "version": struct.pack("<I", 1) + _GRANTS_ALL[4:],
                    "short": _GRANTS_ALL[:-1],
                }.items()
            },
        },
    ),
    Row(
        "X-07",
        "xattrs are bounded in number, size and name (what a file system cannot hold is tested apart)",
        {
            "value": Input([[X("f", user__x=b"v" * 65536)]], _TOO_MANY),
            "many": Input([[F("f", pax={xattr(f"user.{n}"): b"" for n in range(129)})]], _TOO_MANY),
            "together": Input(
                [[F("f", pax={xattr(f"user.{n}"): b"v" * 1000 for n in range(66)})]], _TOO_MANY
            ),
            "those-left-out-count": Input(
                [[F("f", pax={xattr(f"trusted.{n}"): b"" for n in range(129)})]], _TOO_MANY
            ),
            "ten-thousand": Input(
                [[F("f", pax={xattr(f"user.{n}"): b"" for n in range(10_000)})]], _TOO_MANY
            ),
            "as-many-as-may-be": Input(
                [[F("f", pax={xattr(f"user.{n}"): b"" for n in range(128)})]],
                {"f": file(**{f"user__{n}": b"" for n in range(128)})},
            ),
            "long-key": Input(
                [[F("f", pax=_with("user." + "k" * 251, b""))]], Fails("malformed xattr name")
            ),
            "longest-key": Input(
                [[F("f", pax=_with("user." + "k" * 250, b"v"))]],
                {"f": file(**{"user__" + "k" * 250: b"v"})},
            ),
            "empty-key": Input([[F("f", pax=_with("", b"v"))]], Fails("malformed xattr name")),
            "bare-prefix": Input([[F("f", pax=_with("user.", b"v"))]], {"f": file()}),
            "nul-in-key": Input([[F("f", pax=_with("user.a\0b", b"v"))]], Fails("a NUL")),
            "equals-ends-the-key": Input(
                [[F("f", pax=_with("user.a=b", b"v"))]], {"f": file(user__a=b"b=v")}
            ),
            "any-value": Input([[X("f", user__x=b"\0\xff\n=")]], {"f": file(user__x=b"\0\xff\n=")}),
        },
    ),
    Row(
        "X-08",
        "devices are made, never opened, and their numbers are in range",
        {
            "made": Input(
                [
                    [
                        member("sda", "4", device=(8, 0), mode=0o660),
                        member("mem", "3", device=(1, 1), mode=0o640),
                        member("kmsg", "3", device=(1, 11)),
                        member("ptmx", "3", device=(5, 2), mode=0o666),
                        member("last", "3", device=(4095, 1048575)),
                    ],
                    [F("other")],
                ],
                {
                    "sda": node("block", "8:0", 0o660),
                    "mem": node("char", "1:1", 0o640),
                    "kmsg": node("char", "1:11"),
                    "ptmx": node("char", "5:2", 0o666),
                    "last": node("char", "4095:1048575"),
                    "other": file(),
                },
            ),
            "major": Input([[member("x", "3", device=(4096, 0))]], Fails("numbers out of range")),
            "minor": Input([[member("x", "4", device=(0, 1 << 20))]], Fails("numbers out of range")),
            "huge": Input(
                [[member("x", "3", fields={329: b"\x80\0\0\0\x7f\xff\xff\xff"})]],
                Fails("numbers out of range"),
            ),
            "negative": Input(
                [[member("x", "3", fields={337: b"\xff" * 8})]], Fails("device number out of range")
            ),
            "not-a-number": Input(
                [[member("x", "3", fields={329: b"99\0"})]], Fails("malformed device number")
            ),
            "written-through": Input(
                # The second entry replaces the device; it never goes to it.
                [[member("null", "3", device=(1, 3)), F("null", b"in")]],
                {"null": file(b"in")},
            ),
            "numbers-of-a-file": Input([[F("x", fields={329: b"99\0"})]], {"x": file()}),
        },
    ),
    Row(
        "X-09",
        "a fifo is never opened, and nothing waits for one",
        {
            "replaced": Input([[member("f", "6"), F("f", b"in")]], {"f": file(b"in")}),
            "in-two-layers": Input(
                [[member("f", "6"), member("g", "6")], [F("f", b"in"), F("other")]],
                {"f": file(b"in"), "g": node("fifo"), "other": file()},
            ),
            "hard-linked": Input(
                [[member("f", "6"), H("g", "f")], [F("other")]],
                {
                    "f": ("fifo", "", 0o644, (0, 0), (b"g",), ()),
                    "g": ("fifo", "", 0o644, (0, 0), (b"f",), ()),
                    "other": file(),
                },
            ),
        },
    ),
    Row(
        "X-10",
        "of a mode the lower twelve bits count, and no mode stops the next entry",
        {
            "type-bits": Input([[F("f", mode=0o104755)]], {"f": file(mode=0o4755)}),
            "other-type": Input([[F("f", mode=0o120755)]], {"f": file(mode=0o755)}),
            "negative": Input([[F("f", fields={100: b"\xff" * 8})]], {"f": file(mode=0o7777)}),
            "base-256": Input(
                [[F("f", fields={100: b"\x80" + (0o755).to_bytes(7, "big")})]], {"f": file(mode=0o755)}
            ),
            "minus": Input([[F("f", fields={100: b"-000755\0"})]], Fails("malformed mode")),
            "closed-folder": Input(
                [[D("d", 0), F("d/f", b"in", mode=0), D("d/e", 0), F("d/e/f")], [F("d/g")]],
                {
                    "d": folder(0),
                    "d/f": file(b"in", 0),
                    "d/e": folder(0),
                    "d/e/f": file(),
                    "d/g": file(),
                },
            ),
            "owner": Input([[F("f", pax={b"uid": b"4294967294"})]], {"f": file(owner=(2**32 - 2, 0))}),
            "group-that-means-none": Input(
                [[F("f", pax={b"gid": b"4294967295"})]], Fails("owner out of range")
            ),
            "owner-that-means-none": Input(
                [[F("f", pax={b"uid": b"4294967295"})]], Fails("owner out of range")
            ),
            "owner-of-a-link": Input(
                # To a victim, to nothing, with two names; copied to the second layer, replaced there.
                lambda w: [
                    [
                        S("l", f"{w.victim}/hello", uid=7, gid=8, mtime=9),
                        H("same", "l", uid=3),
                        S("d", f"{w.victim}", mode=0o4777, uid=7),
                        S("none", "nowhere", gid=8),
                        S("again", f"{w.victim}/hello", uid=7),
                    ],
                    [F("other"), S("again", f"{w.victim}/hello", gid=5), H("twice", "again")],
                ],
                lambda w: {
                    "l": link(f"{w.victim}/hello", ["same"], (7, 8)),
                    "same": link(f"{w.victim}/hello", ["l"], (7, 8)),
                    "d": link(f"{w.victim}", owner=(7, 0)),
                    "none": link("nowhere", owner=(0, 8)),
                    "again": link(f"{w.victim}/hello", ["twice"], (0, 5)),
                    "twice": link(f"{w.victim}/hello", ["again"], (0, 5)),
                    "other": file(),
                },
            ),
            "owner-of-nodes": Input(
                [
                    [
                        member("p", "6", mode=0o6711, uid=7, gid=8),
                        member("c", "3", device=(1, 3), mode=0o2666, gid=8),
                    ],
                    [F("other")],
                ],
                {
                    "p": ("fifo", "", 0o6711, (7, 8), (), ()),
                    "c": ("char", "1:3", 0o2666, (0, 8), (), ()),
                    "other": file(),
                },
            ),
            "negative-owner": Input([[F("f", fields={108: b"\xff" * 8})]], Fails("uid out of range")),
        },
    ),
    Row(
        "X-13",
        "the umask of whoever asks does not show (tested apart, with a worker)",
        {
            "open-modes": Input(
                [[F("f", mode=0o666), D("d", 0o777), F("d/e/f", mode=0o777)], [F("d/e/g", mode=0o666)]],
                {
                    "f": file(mode=0o666),
                    "d": folder(0o777),
                    "d/e": folder(),
                    "d/e/f": file(mode=0o777),
                    "d/e/g": file(mode=0o666),
                },
            ),
        },
    ),
    Row(
        "X-14",
        "a root entry's attributes are ignored (the root itself is looked at apart)",
        {
            "first-layer": Input(
                [[D("./", 0o700, uid=1000, pax=_with("user.x", b"y")), F("f")], [F("g")]],
                {"f": file(), "g": file()},
            ),
            "second-layer": Input(
                [[F("f")], [D("./", 0, uid=1000), F("g")]], {"f": file(), "g": file()}
            ),
        },
    ),
    Row(
        "X-16",
        "holes of a file stay holes where it is copied (tested apart: a layer cannot hold any)",
        {
            "zeros": Input(
                [[F("f", bytes(100_000) + b"end")], [F("g")]],
                {"f": file(bytes(100_000) + b"end"), "g": file()},
            )
        },
    ),
    Row(
        "X-17",
        "hard links are counted like other entries (the file system's limit is tested apart)",
        {
            "many": Input(
                [[F("f"), *(H(f"l{n}", "f") for n in range(3))], [F("g")]],
                {
                    name: file(links=sorted({"f", "l0", "l1", "l2"} - {name}))
                    for name in ("f", "l0", "l1", "l2")
                }
                | {"g": file()},
            ),
            "over-the-budget": Input(
                [[F("f"), *(H(f"l{n}", "f") for n in range(50))]],
                Fails("over 50 entries"),
                limits={"LAYER_ENTRIES": 50},
            ),
        },
    ),
)
