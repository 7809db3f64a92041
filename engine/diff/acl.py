"""POSIX ACLs as xattrs: which there are, and whether one is well-formed. Pure.

The form is that of linux/posix_acl_xattr.h, version 2; the order of entries that of posix_acl_valid in
fs/posix_acl.c.
"""

import re
import struct

__all__ = ["ACCESS", "DEFAULT", "as_held", "is_empty", "is_well_formed"]

ACCESS = b"system.posix_acl_access"
"""Who may do what with a file or folder."""
DEFAULT = b"system.posix_acl_default"
"""What new entries of a folder get."""

_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")  # tag, permissions, ID
_TAGS = {0x01: "u", 0x02: "U", 0x04: "g", 0x08: "G", 0x10: "m", 0x20: "o"}
_NAMED = frozenset((0x02, 0x08))
_NOBODY = (1 << 32) - 1
_ORDER = re.compile("u(gm?|U*gG*m)o")  # where there are named users or groups, a mask must be


def is_empty(value: bytes) -> bool:
    """Say whether `value` is an ACL without entries, which means that there is none."""
    return value in {b"", _VERSION}


def is_well_formed(value: bytes) -> bool:
    """Say whether the kernel would take `value` for an ACL."""
    body = value[len(_VERSION) :]
    if not value.startswith(_VERSION) or len(body) % _ENTRY.size:
        return False
    order = ""
    for tag, permissions, number in _ENTRY.iter_unpack(body):
        if permissions > 7 or (tag in _NAMED and number == _NOBODY):
            return False
        order += _TAGS.get(tag, "?")
    return bool(_ORDER.fullmatch(order))


def as_held(key: bytes, value: bytes, mode: int) -> bytes | None:
    """Return what the kernel has of a well-formed ACL once a file has this mode, None for nothing.

    chmod(2) changes an access ACL too, and one that says no more than the mode is not kept
    (posix_acl_chmod and posix_acl_equiv_mode in fs/posix_acl.c).
    """
    entries = list(_ENTRY.iter_unpack(value[len(_VERSION) :]))
    if key == ACCESS and len(entries) == 3:
        return None
    group = 0x10 if any(tag == 0x10 for tag, _, _ in entries) else 0x04
    bits = {0x01: mode >> 6 & 7, group: mode >> 3 & 7, 0x20: mode & 7} if key == ACCESS else {}
    return _VERSION + b"".join(
        _ENTRY.pack(tag, bits.get(tag, permissions), number if tag in _NAMED else _NOBODY)
        for tag, permissions, number in entries
    )
