"""The words of the distribution protocol: paths that are asked for, and what answers say.

Pure. An answer is another's: each part of it is checked before it is used, and bounded.
"""

import re
from typing import Any
from urllib.parse import quote, urljoin

import msgspec

from engine import limits
from engine.errors import DigestMismatch, NotFound, Refused, printable
from engine.oci.digest import Digest, hasher, parse_digest
from engine.oci.documents import decode_json
from engine.oci.mediatypes import INDEXES, MANIFESTS, OCI_INDEX, OCI_MANIFEST
from engine.registry.hosts import Host, Origin, parse_url

__all__ = [
    "ACCEPT",
    "BadAnswer",
    "NobodyElse",
    "Request",
    "blob_path",
    "check_digest",
    "content_length",
    "document_type",
    "explained",
    "manifest_path",
    "next_page",
    "part",
    "redirected",
    "referrers_path",
    "stated_digest",
]

ACCEPT = ", ".join([*sorted(INDEXES | MANIFESTS), "*/*"])
_SCHEMA_1 = re.compile(r"application/vnd\.docker\.distribution\.manifest\.v1(\+\w+)?\Z")
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")
_NEXT = re.compile(r'<([^<>]*)>[^<>,]*;\s*+rel="?next"?')


class BadAnswer(Refused):
    """A host answered what the protocol does not allow: another may do better."""


class NobodyElse(NotFound):
    """There is no host left to ask: all are to be avoided."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a host: below its path, for reading `scope`, called `what` in messages."""

    path: str
    what: str
    scope: str
    method: str = "GET"
    query: str = ""
    accept: str = "*/*"
    offset: int = 0
    end: int | None = None

    def url(self, host: Host) -> str:
        """Return the whole URL at a host."""
        namespace = f"ns={quote(host.namespace, safe='')}" if host.namespace else ""
        query = "&".join(filter(None, (self.query, namespace)))
        return f"{host.origin}{host.path}{self.path}{'?' if query else ''}{query}"


def manifest_path(repository: str, reference: str) -> str:
    """Return where a manifest is, by tag or digest."""
    return f"/{repository}/manifests/{reference}"


def blob_path(repository: str, digest: Digest) -> str:
    """Return where a blob is."""
    return f"/{repository}/blobs/{digest}"


def referrers_path(repository: str, digest: Digest) -> str:
    """Return where it is listed what refers to a manifest."""
    return f"/{repository}/referrers/{digest}"


def check_digest(data: bytes, digest: Digest, what: str) -> None:
    """Raise DigestMismatch unless bytes have a digest."""
    running = hasher(digest)
    running.update(data)
    if running.hexdigest() != digest.partition(":")[2]:
        raise DigestMismatch(what, digest, f"{running.name}:{running.hexdigest()}")


def stated_digest(text: str | None) -> Digest | None:
    """Return the digest that an answer says its document has, None if it says none that is known."""
    try:
        return parse_digest(text) if text else None
    except Refused:
        return None


def content_length(text: str | None) -> int | None:
    """Return the bytes that an answer announces, None if it does not."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 19:
        raise BadAnswer("its Content-Length is no number")
    return int(text)


def part(text: str, size: int) -> tuple[int, int]:
    """Return where a part of `size` bytes begins and ends, by its Content-Range."""
    found = _RANGE.match(text)
    if not found:
        raise BadAnswer(f"its Content-Range is {printable(text)!r}")
    start, end, total = int(found[1]), int(found[2]), found[3]
    if not start <= end < size or total not in {"*", str(size)}:
        raise BadAnswer(f"its Content-Range is {printable(text)!r}, of {size} bytes")
    return start, end + 1


def document_type(content_type: str, data: bytes | None, what: str) -> str:
    """Return the media type of a manifest or index: as answered, else by the document itself.

    "" if neither is known, and there is no `data` to look into. Raises Refused for one that is none.
    """
    answered = content_type.partition(";")[0].strip().lower()
    if _SCHEMA_1.match(answered):
        raise Refused(f"{what} is in docker's schema 1, which is no longer used; push it again")
    if answered in INDEXES | MANIFESTS:
        return answered
    if data is None:
        return ""
    try:
        value = decode_json(data, what)
    except Refused as error:
        raise BadAnswer(str(error)) from None
    members: dict[str, Any] = value if isinstance(value, dict) else {}
    embedded = members.get("mediaType")
    if isinstance(embedded, str) and embedded:
        return embedded  # which who parses it holds against what may be
    if members.get("schemaVersion") == 2:
        if "manifests" in members:
            return OCI_INDEX
        if "layers" in members:
            return OCI_MANIFEST
    raise BadAnswer(f"{what} is {printable(answered) or 'of no type'}, not an image manifest or index")


def explained(data: bytes) -> str:
    """Return what the errors in an answer say, "" if that is nothing."""
    try:
        value = decode_json(data, "error", limits.ERROR_BODY)
    except Refused:
        return ""
    errors = value.get("errors") if isinstance(value, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return ""
    parts = (first.get("code"), first.get("message"))
    return ": ".join(printable(part) for part in parts if isinstance(part, str) and part)


def redirected(origin: Origin, path: str, location: str) -> tuple[Origin, str]:
    """Return the origin that a redirect leads to, and the rest of the URL there. Raises BadAnswer."""
    try:
        target, where, query = parse_url(urljoin(f"{origin}{path}", location), "where it redirects to")
    except ValueError:
        raise BadAnswer("it redirects to what is no URL") from None
    except Refused as error:
        raise BadAnswer(str(error)) from None
    if origin.scheme == "https" and target.scheme != "https":
        raise BadAnswer(f"it redirects from https to http, at {printable(target.name)}")
    return target, f"{where or '/'}{'?' if query else ''}{query}"


def next_page(origin: Origin, path: str, link: str) -> str | None:
    """Return the rest of the URL of the next page of a listing. Raises BadAnswer if it is elsewhere."""
    found = _NEXT.search(link)
    if not found:
        return None
    target, rest = redirected(origin, path, found[1])
    if target != origin:
        raise BadAnswer(f"its next page is at another host, {printable(target.name)}")
    return rest
