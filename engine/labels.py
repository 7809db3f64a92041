"""Every label key that lamina reads or writes, each named once.

Pure. The keys are containerd's own, so that its tools understand our stores
(https://github.com/containerd/containerd/blob/main/docs/garbage-collection.md).

Labels that begin with a reserved prefix steer the engine. No byte of an image (config labels,
descriptor annotations) may ever become one: an image could otherwise pin or free what is not its own.
"""

from collections.abc import Iterator, Mapping

from engine.errors import InvalidArgument, printable

__all__ = [
    "DIFF_ID",
    "DISTRIBUTION_SOURCE",
    "EPHEMERAL",
    "GC",
    "GC_BREF",
    "GC_BREF_TARGET",
    "GC_COND_SNAPSHOT",
    "GC_EXPIRE",
    "GC_FLAT",
    "GC_REF_CONTENT",
    "GC_REF_IMAGE",
    "GC_REF_SNAPSHOT",
    "GC_ROOT",
    "GC_USED_AT",
    "HELD_IMAGE",
    "HELD_NAME",
    "HELD_OWNER",
    "IMAGE_NAME",
    "OCI_REF_NAME",
    "PARENT_CHAIN_ID",
    "PINNED",
    "PINNED_VALUE",
    "PULLED_WITH",
    "PULL_OF",
    "PULL_TARGET",
    "SHAREABLE",
    "SNAPSHOT_REF",
    "UNCOMPRESSED",
    "Labels",
    "check",
    "merge",
    "snapshot_ref",
    "snapshot_refs",
    "sources",
    "with_source",
]

Labels = Mapping[str, str]

GC = "containerd.io/gc."
"""What steers collections begins so."""

GC_ROOT = "containerd.io/gc.root"
"""On content or snapshots, any value: kept whatever else refers to it."""

GC_REF_CONTENT = "containerd.io/gc.ref.content"
"""On any object, with a suffix `.x` or `/x`: keeps the blob whose digest is the value."""

GC_REF_SNAPSHOT = "containerd.io/gc.ref.snapshot."
"""On any object, followed by a backend name: keeps the snapshot named by the value."""

GC_REF_IMAGE = "containerd.io/gc.ref.image"
"""On any object, with a suffix `.x` or `/x`: keeps the image whose name is the value."""

GC_BREF = "containerd.io/gc.bref."
"""On any object, followed by `content`, `image` or `snapshot.<backend>` and perhaps a suffix: kept as
long as the object is that the value names. containerd's `container` is of no kind known here."""

GC_BREF_TARGET = "containerd.io/gc.bref.content.target"
"""On an image whose name does not last: what it means. With an expiry that is over it keeps the name as
long as something else keeps that."""

GC_COND_SNAPSHOT = "containerd.io/gc.cond.snapshot."
"""On content and images, followed by a backend name: keeps a snapshot while a condition holds. The value
is `usedat<DURATION` or `usedat>DURATION`, several with commas between, then `|` and the key of it."""

GC_USED_AT = "containerd.io/gc.cond.value-usedat"
"""On a snapshot: when it was used last (RFC 3339), what `usedat` means of it."""

GC_EXPIRE = "containerd.io/gc.expire"
"""On a lease or an image: when it ends to be one (RFC 3339)."""

GC_FLAT = "containerd.io/gc.flat"
"""On a lease, any value: its members are kept, what their labels refer to is not."""

HELD_OWNER = "lamina.held/owner"
"""On a lease: for whom it holds an image."""

HELD_IMAGE = "lamina.held/image"
"""On such a lease: the image's ID, which is the digest of its config."""

HELD_NAME = "lamina.held/name"
"""On such a lease: the name that it was asked for by, if by one."""

EPHEMERAL = "lamina.container/ephemeral"
"""On a container, any value: who recovers after a restart removes it, whatever else he knows of."""

SHAREABLE = "containerd.io/namespace.shareable"
"""On a namespace, `true`: others may use its blobs, isolated though it or they are."""

PINNED = "io.cri-containerd.pinned"
"""On an image, `PINNED_VALUE`: no policy removes it."""
PINNED_VALUE = "pinned"

UNCOMPRESSED = "containerd.io/uncompressed"
"""On a layer blob: its diff ID, written after it was verified."""

SNAPSHOT_REF = "containerd.io/snapshot.ref"
"""On a snapshot: the chain ID that it holds or is being unpacked for."""

DIFF_ID = "containerd.io/snapshot/diff-id"
"""On a snapshot: the diff ID of its topmost layer."""

PARENT_CHAIN_ID = "containerd.io/snapshot/parent-chain-id"
"""On a snapshot: the chain ID below its topmost layer."""

DISTRIBUTION_SOURCE = "containerd.io/distribution.source."
"""On content, followed by a registry: its repositories that this came from, with commas between."""

PULL_OF = "lamina.pull/reference"
"""On a lease: the name that is being pulled under it, in full."""

PULL_TARGET = "lamina.pull/target"
"""On a lease: what the name meant to the registry, a descriptor in JSON."""

PULLED_WITH = "lamina.pulled-with/"
"""On what an image's name means, followed by a hash of a credential or by `anyone`: when it was last
pulled with that (RFC 3339)."""

IMAGE_NAME = "io.containerd.image.name"
"""Annotation of an index entry: the full image name (containerd and docker write it)."""

OCI_REF_NAME = "org.opencontainers.image.ref.name"
"""Annotation of an index entry: a tag, or a full name."""

_LIMIT = 4096  # containerd: bytes of key and value together


def check(labels: Labels) -> None:
    """Raise InvalidArgument for an empty key or a label over 4096 bytes."""
    for key, value in labels.items():
        if not key:
            raise InvalidArgument("a label needs a key")
        try:
            size = len(key.encode()) + len(value.encode())
        except UnicodeEncodeError:
            raise InvalidArgument(f"label {printable(key[:60])!r} is no text in UTF-8") from None
        if size > _LIMIT:
            raise InvalidArgument(f"label {key[:60]!r} is over {_LIMIT} bytes; shorten its value")


def merge(labels: Labels, changes: Labels) -> dict[str, str]:
    """Return `labels` with `changes` applied; an empty value deletes the key, as in containerd."""
    check(changes)
    merged = {**labels, **changes}
    return {key: value for key, value in merged.items() if value}


def sources(labels: Labels, registry: str) -> list[str]:
    """Return the repositories of a registry that content came from."""
    return [*filter(None, labels.get(DISTRIBUTION_SOURCE + registry, "").split(","))]


def with_source(labels: Labels, registry: str, repository: str) -> dict[str, str]:
    """Return what to change of the labels of content that came from a repository, if anything."""
    known = sources(labels, registry)
    key, value = DISTRIBUTION_SOURCE + registry, ",".join([*known, repository])
    if repository in known or len(key) + len(value) > _LIMIT:
        return {}
    return {key: value}


def snapshot_ref(backend: str) -> str:
    """Return the key that anchors a snapshot of `backend`."""
    return GC_REF_SNAPSHOT + backend


def snapshot_refs(labels: Labels) -> Iterator[tuple[str, str]]:
    """Yield (backend, snapshot name) for each snapshot that these labels keep alive."""
    for key, value in labels.items():
        rest = key.removeprefix(GC_REF_SNAPSHOT)
        if rest != key and value:
            yield rest.partition("/")[0], value
