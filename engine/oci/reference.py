"""Image references: `[host[:port]/]path[:tag][@digest]`, in their full and their familiar form.

Pure. Grammar of the OCI distribution spec; the defaults (`docker.io`, `library/`, `latest`) are
docker's, which podman, nerdctl and the CRI share.
"""

import re
from dataclasses import dataclass

from engine import limits
from engine.errors import InvalidArgument, Refused, printable
from engine.oci.digest import Digest, parse_digest

__all__ = ["Reference", "familiar", "parse_reference"]

_DOMAIN_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"(?:{_DOMAIN_PART}(?:\.{_DOMAIN_PART})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?\Z")
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
_TAG = re.compile(r"[\w][\w.-]{0,127}\Z", re.ASCII)
_DEFAULT_DOMAIN = "docker.io"
_DEFAULT_TAG = "latest"


@dataclass(frozen=True, slots=True)
class Reference:
    """A parsed reference; at least one of tag and digest is set."""

    domain: str
    path: str
    tag: str | None
    digest: Digest | None

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.domain}/{self.path}{tag}{digest}"


def _is_domain(first: str) -> bool:
    return "." in first or ":" in first or first == "localhost" or first != first.lower()


def parse_reference(text: str) -> Reference:
    """Return the reference that `text` means, defaults filled in; InvalidArgument if it is none."""
    name, at, digest_text = text.partition("@")
    domain, slash, path = name.partition("/")
    if not slash or not _is_domain(domain):
        domain, path = _DEFAULT_DOMAIN, name
    path, colon, tag = path.partition(":")
    if domain == _DEFAULT_DOMAIN and "/" not in path:
        path = f"library/{path}"
    valid = (
        len(domain) + 1 + len(path) <= limits.REFERENCE
        and _DOMAIN.match(domain)
        and _PATH.match(path)
        and (not colon or _TAG.match(tag))
    )
    if not valid:
        raise InvalidArgument(
            f"{printable(text)!r} is not an image reference; write [host/]name[:tag][@digest], "
            "the name in lower case"
        )
    try:
        digest = parse_digest(digest_text) if at else None
    except Refused as error:
        raise InvalidArgument(str(error)) from None
    return Reference(domain, path, tag or (None if digest else _DEFAULT_TAG), digest)


def familiar(name: str) -> str:
    """Return the shortest form that people type for a full name and that means the same."""
    path = name.removeprefix(f"{_DEFAULT_DOMAIN}/")
    shorter = (path.removeprefix("library/"), path)
    # `docker.io/localhost/a` without its host would be an image of another host.
    return next((short for short in shorter if str(parse_reference(short)) == name), name)
