"""Digests: names of bytes, checked before any use.

Pure. Only sha256 and sha512 are known, as in containerd; a digest is `algorithm:lowercase hex` of the
exact length (OCI image spec, descriptor.md). Nothing else ever becomes part of a key or a path.
"""

import hashlib
import re
from typing import TYPE_CHECKING, NewType

from engine.errors import Refused, printable

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["Digest", "digest_of", "hasher", "parse_digest"]

Digest = NewType("Digest", str)

_PATTERN = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")


def parse_digest(text: str) -> Digest:
    """Return `text` as a digest, or raise Refused."""
    if not _PATTERN.match(text):
        raise Refused(f"not a sha256 or sha512 digest: {printable(text)!r}")
    return Digest(text)


def hasher(digest: Digest | None = None) -> "_Hash":
    """Return a fresh hash of the digest's algorithm (sha256 when there is none)."""
    algorithm = digest.partition(":")[0] if digest else "sha256"
    return hashlib.new(algorithm, usedforsecurity=False)


def digest_of(data: bytes) -> Digest:
    """Return the sha256 digest of `data`."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())
