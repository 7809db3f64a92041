"""Records of a pax extended header, `length key=value newline`: which count, and what they say.

Pure. A malformed record is refused, also one that means nothing here.
"""

import re
from collections.abc import Mapping

from engine.diff import acl, sparse
from engine.errors import Refused, printable

__all__ = ["LARGEST", "NONE", "Records", "number", "read_records", "time", "xattrs"]

Records = Mapping[bytes, bytes]

NONE: dict[bytes, bytes] = {}
LARGEST = (1 << 63) - 1
"""The largest number that a header may give."""

_XATTR = b"SCHILY.xattr."
_ACL_TEXT = b"SCHILY.acl."  # as star and bsdtar write ACLs: named like xattrs, to be counted as left out
_READ = frozenset((b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime")) | sparse.KEYS
_RECORD = re.compile(rb"([1-9][0-9]{0,19}) ([^=]+)=")
# A run of well-formed short records that mean nothing here. Short, so that the length can be part of
# the pattern: one by one they would cost fifteen times as much as any other bytes of an archive.
_PASSED_OVER = re.compile(
    rb"(?:%s)++"
    % b"|".join(
        rb"%d (?!(?:path|linkpath|size|uid|gid|mtime)=|SCHILY\.(?:xattr|acl)\.|GNU\.sparse\.)"
        rb"(?=[^=\0]{1,%d}=)[^\0]{%d}\n" % (length, rest - 1, rest)
        for length in range(5, 32)
        if (rest := length - len(b"%d \n" % length))
    )
)


def read_records(body: bytes, into: dict[bytes, bytes]) -> int:
    """Check the records of a header. Those that mean something here go `into` a dictionary.

    The last of a key wins. Returns how many were not passed over at once.
    """
    size, has_nul = len(body), b"\0" in body
    alone = b"%d mtime=" % size
    if body.startswith(alone) and body.find(b"\n") == size - 1 and not has_nul:
        into[b"mtime"] = body[len(alone) : -1]  # all that GNU tar writes for most files
        return 1
    count = at = 0
    pairs: list[tuple[bytes, bytes]] = []
    while at < size:
        found = _RECORD.match(body, at)
        end = at + int(found[1]) if found else 0
        if not found or end > size or found.end() >= end or body[end - 1] != 0x0A:
            raise Refused("archive has a malformed pax record")
        key = found[2]
        is_xattr = key.startswith(_XATTR)
        if has_nul and (b"\0" in key or (not is_xattr and body.find(b"\0", at, end) >= 0)):
            raise Refused("archive has a NUL in a pax record")
        if is_xattr or key in _READ or key.startswith(_ACL_TEXT):
            into[key] = body[found.end() : end - 1]
        elif key in sparse.PAIR:
            pairs.append((key, body[found.end() : end - 1]))
        elif run := _PASSED_OVER.match(body, at):
            at = run.end()
            continue
        at = end
        count += 1
    if pairs:
        into[sparse.MAP] = sparse.joined(pairs)
    return count


def number(records: Records, key: bytes, otherwise: int) -> int:
    """Return the number that `records` give for a key."""
    text = records.get(key)
    if not text:
        return otherwise
    if not text.isdigit() or len(text) > 19 or int(text) > LARGEST:
        raise Refused(f"archive has a malformed pax {key.decode()}: {printable(text)!r}")
    return int(text)


def time(text: bytes) -> int:
    """Return a time in nanoseconds; what is finer is cut off."""
    negative = text.startswith(b"-")
    seconds, _, fraction = text[negative:].partition(b".")
    if not (seconds + fraction).isdigit() or len(seconds) > 19:
        raise Refused(f"archive has a malformed pax time: {printable(text)!r}")
    nanoseconds = int(seconds + fraction[:9].ljust(9, b"0"))
    return -nanoseconds if negative else nanoseconds


def xattrs(records: Records) -> dict[bytes, bytes]:
    """Return the extended attributes, an ACL as text only where there is none in binary."""
    found = {key[len(_XATTR) :]: value for key, value in records.items() if key.startswith(_XATTR)}
    if acl.ACCESS not in found and acl.DEFAULT not in found:
        found |= {key: value for key, value in records.items() if key.startswith(_ACL_TEXT)}
    return found or NONE
