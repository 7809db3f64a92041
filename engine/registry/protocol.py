"""The words of the distribution protocol: paths that are asked for, and what answers say.

Pure. An answer is another's: each part of it is checked before it is used, and bounded.
"""

import re
from collections.abc import AsyncIterable, Iterable
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
    "received",
    "redirected",
    "referrers_path",
    "referrers_tag",
    "scope_of",
    "stated_digest",
    "upload_place",
    "uploads_path",
]

ACCEPT = ", ".join([*sorted(INDEXES | MANIFESTS), "*/*"])
_SCHEMA_1 = re.compile(r"application/vnd\.docker\.distribution\.manifest\.v1(\+\w+)?\Z")
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)\Z")
_RECEIVED = re.compile(r"(?:bytes=)?0-(\d{1,19})\Z", re.ASCII)
_NEXT = re.compile(r'<([^<>]*)>[^<>,]*;\s*+rel="?next"?')


class BadAnswer(Refused):
    """A host answered what the protocol does not allow: another may do better."""


class NobodyElse(NotFound):
    """There is no host left to ask: all are to be avoided."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a host: below its path, by what `scope` allows, called `what` in messages."""

    path: str
    what: str
    scope: str
    method: str = "GET"
    query: str = ""
    accept: str = "*/*"
    offset: int = 0
    end: int | None = None
    whole: int | None = None
    """Of a document: it is read at once, so many bytes at most, and asked for again if it breaks off."""
    place: str = ""
    """The rest of the URL where the host itself named it: in place of path and query."""
    body: bytes | AsyncIterable[bytes] | None = None
    about_body: tuple[tuple[str, str], ...] = ()
    """Headers that tell of the body."""
    slow: float = 0
    """Seconds that the host may think longer than over others."""

    @property
    def is_write(self) -> bool:
        """Whether it changes something: no redirect takes it elsewhere."""
        return self.method not in {"GET", "HEAD"}

    def url(self, host: Host) -> str:
        """Return the whole URL at a host."""
        if self.place:
            return f"{host.origin}{self.place}"
        namespace = f"ns={quote(host.namespace, safe='')}" if host.namespace else ""
        query = "&".join(filter(None, (self.query, namespace)))
        return f"{host.origin}{host.path}{self.path}{'?' if query else ''}{query}"


def manifest_path(repository: str, reference: str) -> str:
    """Return where a manifest is, by tag or digest."""
    return f"/{repository}/manifests/{reference}"


def blob_path(repository: str, digest: Digest) -> str:
    """Return where a blob is."""
    return f"/{repository}/blobs/{digest}"


def uploads_path(repository: str) -> str:
    """Return where uploads of blobs begin."""
    return f"/{repository}/blobs/uploads/"


def referrers_path(repository: str, digest: Digest) -> str:
    """Return where it is listed what refers to a manifest."""
    return f"/{repository}/referrers/{digest}"


def referrers_tag(digest: Digest) -> str:
    """Return the tag that stands for that list where a host has none (distribution spec, 1.1)."""
    return digest.replace(":", "-")[:128]


def scope_of(repository: str, actions: str = "pull") -> str:
    """Return what a token is to allow: some actions, with commas between, on one repository."""
    return f"repository:{repository}:{actions}"


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
    if isinstance(embedded, str) and 0 < len(embedded) <= limits.MEDIA_TYPE:
        return embedded  # which who parses it holds against what may be
    if members.get("schemaVersion") == 2:
        if "manifests" in members:
            return OCI_INDEX
        if "layers" in members:
            return OCI_MANIFEST
    raise BadAnswer(f"{what} is {printable(answered) or 'of no type'}, not an image manifest or index")


def explained(data: bytes, secrets: Iterable[str]) -> str:
    """Return what the errors in an answer say, "" if that is nothing, or tells one of our secrets."""
    try:
        value = decode_json(data, "error", limits.ERROR_BODY)
    except Refused:
        return ""
    errors = value.get("errors") if isinstance(value, dict) else None
    first = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return ""
    parts = [
        part for part in (first.get("code"), first.get("message")) if isinstance(part, str) and part
    ]
    if any(secret in part for secret in filter(None, secrets) for part in parts):
        return ""  # some answer with the header that they were sent
    return ": ".join(map(printable, parts))


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


def received(text: str | None, sent: int) -> int | None:
    """Return how many bytes a host has of an upload, by its Range, where `sent` were sent at most.

    All of them if it does not say. None if it can't be told: "0-0" is one byte or none.
    """
    if text is None:
        return sent
    found = _RECEIVED.match(text)
    if not found:
        raise BadAnswer(f"its Range is {printable(text)!r}")
    count = int(found[1]) + 1
    return count if 1 < count <= sent else None


def upload_place(origin: Origin, path: str, location: str | None) -> str:
    """Return the rest of the URL of an upload. Raises BadAnswer if it is elsewhere (R-02)."""
    if not location:
        raise BadAnswer("it takes uploads, but does not say where to (no Location)")
    target, rest = redirected(origin, path, location)
    if target != origin:
        raise BadAnswer(
            f"it has the upload go to another host, {printable(str(target))}; "
            "a proxy before it has to pass on by what name and scheme it was asked"
        )
    return rest


def next_page(origin: Origin, path: str, link: str) -> str | None:
    """Return the rest of the URL of the next page of a listing. Raises BadAnswer if it is elsewhere."""
    found = _NEXT.search(link)
    if not found:
        return None
    target, rest = redirected(origin, path, found[1])
    if target != origin:
        raise BadAnswer(f"its next page is at another host, {printable(target.name)}")
    return rest
