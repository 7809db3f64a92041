"""Who a container runs as: a name or number, and what the image's own lists of accounts make of it.

Sync; safe from any thread. The lists are read as bytes (`engine.provision.inside`): no library that
looks names up is asked, as it would load code and settings of the image or of the host. The rules are
docker's and containerd's, but that a number is never the name of an account that is all digits.
"""

import re
from collections.abc import Sequence

import msgspec

from engine import limits
from engine.errors import NotFound, Refused, printable
from engine.oci.execution import IDS, split_user
from engine.provision.inside import read_file

__all__ = ["Account", "resolve_user"]

_REST = rb":([0-9]{1,20})(?::[^:\n]*+:([^:\n]*+))?"  # group, comment, home
_GROUP = re.compile(rb"^([^:\n]*+):[^:\n]*+:([0-9]{1,20}):([^\n]*+)$", re.MULTILINE)


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Who a process is: `groups` has all its groups, the first of them `gid`."""

    uid: int
    gid: int
    groups: Sequence[int]
    home: str = "/"


def resolve_user(root: int, text: str) -> Account:
    """Return who `USER[:GROUP]` is in a root file system; who says nothing is root.

    A number need not be in the lists: its group is then 0. Supplementary groups are those that list the
    user, unless a group is given. Raises NotFound for a name that is not there, InvalidArgument for what
    is no user, Refused for lists that are not to be read.
    """
    user, group = split_user(text)
    users = read_file(root, "/etc/passwd", limits.ACCOUNTS)
    groups = read_file(root, "/etc/group", limits.ACCOUNTS)
    name, uid, gid, home = _user(users, user or 0)
    if group != "":
        gid = _group(groups, group)
        return Account(uid=uid, gid=gid, groups=[gid], home=home)
    more = _memberships(groups, name) if name else []
    return Account(uid=uid, gid=gid, groups=list(dict.fromkeys([gid, *more])), home=home)


def _user(users: bytes, user: int | str) -> tuple[bytes, int, int, str]:
    """Return the name (empty if nothing lists it), IDs and home of a user."""
    if isinstance(user, int):
        entry = rb"^([^:\n]++):[^:\n]*+:(0*%d)" % user
    else:
        entry = rb"^(%s):[^:\n]*+:([0-9]{1,20})" % re.escape(user.encode())
    found = re.search(entry + _REST, users, re.MULTILINE)
    if found:
        return found[1], _id(found[2], user), _id(found[3], user), _home(found[4] or b"")
    if isinstance(user, int):
        return b"", user, 0, "/"
    raise NotFound(f"the image has no user {user!r} in /etc/passwd; give a number")


def _group(groups: bytes, group: int | str) -> int:
    if isinstance(group, int):
        return group
    found = re.search(rb"^%s:[^:\n]*+:([0-9]{1,20})" % re.escape(group.encode()), groups, re.MULTILINE)
    if not found:
        raise NotFound(f"the image has no group {group!r} in /etc/group; give a number")
    return _id(found[1], group)


def _memberships(groups: bytes, name: bytes) -> list[int]:
    found = []
    for entry in _GROUP.finditer(groups):
        # Looked for as bytes: a list of millions of names would not fit in memory.
        if b",%s," % name in b",%s," % entry[3].strip():
            found.append(_id(entry[2], entry[1].decode(errors="replace")))
            if len(found) > limits.ACCOUNT_GROUPS:
                raise Refused(f"the image puts a user in over {limits.ACCOUNT_GROUPS} groups")
    return found


def _id(digits: bytes, whose: int | str) -> int:
    number = int(digits)
    if number not in IDS:
        raise Refused(
            f"the image gives {printable(str(whose))!r} the ID {number}; they go up to {IDS[-1]}"
        )
    return number


def _home(path: bytes) -> str:
    text = path.decode(errors="replace")
    return text if text.startswith("/") and text.isprintable() else "/"
