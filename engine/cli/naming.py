"""Which container is meant by what somebody typed, and what one is called that nobody names.

Sync.
"""

import re
import secrets

from engine.errors import NotFound
from engine.metadata.containers import Container, ContainerStore
from engine.oci.short import the_one
from engine.stores import Stores

__all__ = ["container_named", "new_name"]

_DIGITS = re.compile(r"[0-9a-f]{4,16}\Z")


def container_named(stores: Stores, word: str) -> Container:
    """Return the container of a name, or the one whose `unique` begins so.

    The name goes first. NotFound, InvalidArgument for digits that begin several.
    """
    containers = ContainerStore(stores.root.meta, stores.namespace)
    try:
        return containers.get(word)
    except NotFound:
        if not _DIGITS.match(word):
            raise
        named = {one.unique: one for one in containers.walk() if one.unique.startswith(word)}
        unique = the_one(named, word, "containers")
        if unique is None:
            raise
        return named[unique]


def new_name() -> str:
    """Return a name that no other container has, as far as chance goes."""
    return f"c-{secrets.token_hex(4)}"
