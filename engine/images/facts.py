"""Images as a runtime sees them (the CRI): one for each config, with all its names; told and removed.

Sync; safe from any thread. Nothing of it is a record: an image is what names lead to. What its
documents say never changes, and is remembered by digest, of so many images; which names it has and what
is there of it is looked up each time, at one moment for each answer.

An image's ID is the digest of its config: manifests with one config, packed in other ways, are one
image. By it an image is found from below, by who mentions what: no listing is read for that.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice

from engine import labels, limits
from engine.accounting import Accounts
from engine.content.image import ResolvedImage
from engine.errors import DataLoss, EngineError, NotFound
from engine.images.states import stands
from engine.kv.environment import Transaction
from engine.kv.schema import BLOBS, IMAGES, SNAPSHOTS, Image
from engine.metadata import ledger
from engine.metadata.nodes import CONTENT, IMAGE, LABEL, TARGET, blob_node
from engine.oci.documents import Descriptor, decode_json
from engine.oci.platform import Platform
from engine.oci.reference import parse_reference
from engine.oci.short import beginnings, the_one
from engine.stores import Stores

__all__ = ["ImageFacts", "ImageSizes", "KnownImage"]

_CANDIDATES = 100  # blobs that begin as an ID that was not given in full
_RELEASE_EVERY = 500  # images read between two calls that give the memory of that back


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownImage:
    """An image with all its names."""

    id: str
    """The digest of its config."""
    target: str
    """What the name means that was asked for, or the first of its names, by digest."""
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size: int
    """Bytes of its blobs as they were fetched, each once."""
    uid: int | None
    """Its user if that is a number, else"""
    username: str
    """his name; neither if its config names none."""
    pinned: bool
    unpacked: tuple[str, ...]
    """The backends that have it."""
    is_ready: bool
    """Whether it can be run: some backend has it, and its documents are here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSizes:
    """What an image takes up, in bytes: its blobs, its layers in each backend.

    Removing it would free `exclusive`; `shared` others keep too.
    """

    blobs: int
    unpacked: dict[str, int]
    exclusive: int
    shared: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Said:
    """What the documents of an image say."""

    id: str
    documents: tuple[str, ...]
    top: str
    size: int
    uid: int | None
    username: str


class ImageFacts:
    """The images of a namespace, of each what is for this machine's platform."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._meta = stores.root.meta
        self._namespace = stores.namespace
        self._said: Callable[[str, str, int], _Said] = lru_cache(limits.KNOWN_IMAGES)(self._read)

    def walk(self) -> list[KnownImage]:
        """Return the images, by ID; without those that are for others, or cannot be read."""
        with self._meta.read() as txn:
            names = IMAGES.survey(txn, self._namespace)[0]
        together: dict[str, tuple[_Said, list[Image]]] = {}
        for at, name in enumerate(names):
            if said := self._sayings(name):
                together.setdefault(said.id, (said, []))[1].append(name)
            if at % _RELEASE_EVERY == 0:
                self._meta.release_pages()
                self._stores.root.blobs.release_pages()
        with self._meta.read() as txn:
            found = [self._known(txn, *together[key]) for key in sorted(together)]
        return [one for one in found if one]

    def find(self, text: str) -> KnownImage | None:
        """Return the image of a name, an ID, a digest or first digits of these; None if there is none.

        InvalidArgument for what is none of these, or begins several IDs.
        """
        names = self._meant(text)
        said = self._sayings(names[0]) if names else None
        if said is None:
            return None
        with self._meta.read() as txn:
            return self._known(txn, said, names)

    def id_of(self, target: Descriptor, platform: Platform | None = None) -> str:
        """Return the ID of what a name means. Raises what `Stores.resolve` does."""
        if platform:
            return self._stores.resolve(target, platform).manifest.config.digest
        return self._said(target.media_type, target.digest, target.size).id

    def sizes(self, text: str) -> ImageSizes:
        """Return what the image that `find` finds takes up. Raises NotFound too."""
        names = self._meant(text)
        if not names or not (said := self._sayings(names[0])):
            raise NotFound(f"no image {text}")
        stores = self._stores
        books = Accounts(stores.root, self._namespace, stores.broken)
        exclusive, shared = books.kept_by(names)
        with self._meta.read() as txn:
            backends = self._backends(txn, said)
            unpacked = {name: self._size_of_chain(txn, name, said.top) for name in backends}
        return ImageSizes(
            blobs=said.size, unpacked=unpacked, exclusive=exclusive.total, shared=shared.total
        )

    def remove(self, text: str) -> list[str]:
        """Take names away, and return them: one by that name, all of an image by its ID or a digest.

        There may be none: it was removed before. What others hold of it stays, without these names.
        """
        named = self._named(text)
        names = [named] if named else self._meant(text)
        return self._stores.images.drop_all({name.name: name.target.digest for name in names})

    # -- names --------------------------------------------------------------------------------

    def _meant(self, text: str) -> list[Image]:
        """Return all names of the one image that is meant, the one first that was asked for."""
        named = self._named(text)
        key = self._key(named) if named else self._begun(text)
        with self._meta.read() as txn:
            names = self._above(txn, key) if key else []
        mine = [name for name in names if self._key(name) == key]
        return sorted(mine, key=lambda name: (name != named, name.name))

    def _named(self, text: str) -> Image | None:
        try:
            return self._stores.images.named(text)
        except NotFound:  # NAME@DIGITS that nothing begins with
            return None

    def _begun(self, text: str) -> str:
        """Return the ID of the image that has one, or is meant by a digest, that begins so."""
        with self._meta.read() as txn:
            starts = [
                BLOBS.beginning(
                    txn, self._namespace, text=start, size=size, name=lambda blob: blob.digest
                )
                for start, size in beginnings(text)
            ]
            found = {digest: self._above(txn, digest) for digest in islice(chain(*starts), _CANDIDATES)}
        keys = (
            self._key(name)
            for digest, names in found.items()
            for name in names
            if digest in self._digests(name)
        )
        return the_one(keys, text, "images") or ""

    def _above(self, txn: Transaction, digest: str) -> list[Image]:
        """Return the names that lead to a blob, by way of manifests and indexes."""
        pending, seen, found = [blob_node(digest)], set(), []
        while pending:
            for mention in ledger.mentioners(txn, self._namespace, pending.pop()):
                if mention.node in seen or mention.how not in {LABEL, TARGET}:
                    continue
                seen.add(mention.node)
                if mention.node.kind == CONTENT:
                    pending.append(mention.node)
                elif mention.node.kind == IMAGE:
                    with suppress(DataLoss):
                        found.append(IMAGES.get(txn, self._namespace, mention.node.key))
        return [image for image in found if image]

    def _key(self, name: Image) -> str:
        """Return what makes names one image: its ID, what they mean where that cannot be read."""
        said = self._sayings(name)
        return said.id if said else name.target.digest

    def _digests(self, name: Image) -> tuple[str, ...]:
        """Return the digests that an image is known by: a layer's is none of them."""
        said = self._sayings(name)
        return said.documents if said else (name.target.digest,)

    # -- what is said, and what is there ------------------------------------------------------

    def _sayings(self, name: Image) -> _Said | None:
        target = name.target
        try:
            return self._said(target.media_type, target.digest, target.size)
        except EngineError:
            return None

    def _read(self, media_type: str, digest: str, size: int) -> _Said:
        image = self._stores.resolve(Descriptor(media_type=media_type, digest=digest, size=size))
        config = image.manifest.config
        parts = {one.digest: one.size for one in (*image.path, config, *image.manifest.layers)}
        uid, username = _user_of(self._user(image))
        return _Said(
            id=config.digest,
            documents=(*(one.digest for one in image.path), config.digest),
            top=image.chain[-1] if image.chain else "",
            size=sum(parts.values()),
            uid=uid,
            username=username,
        )

    def _user(self, image: ResolvedImage) -> str:
        config = image.manifest.config
        data = self._stores.content.read_all(config.key, limits.CONFIG)
        value = decode_json(data, f"config {config.digest}", limits.CONFIG)
        how = value.get("config") if isinstance(value, dict) else None
        user = how.get("User") if isinstance(how, dict) else None
        return user if isinstance(user, str) else ""

    def _known(self, txn: Transaction, said: _Said, names: Sequence[Image]) -> KnownImage | None:
        """Return what there is to say of an image with some names, by those that mean it still."""
        now = ((name, IMAGES.get(txn, self._namespace, name.name)) for name in names)
        left = [name for name, found in now if found and found.target.digest == name.target.digest]
        if not left:
            return None
        parsed = [(name, parse_reference(name.name)) for name in left]
        unpacked = self._backends(txn, said)
        is_whole = all(BLOBS.any(txn, self._namespace, digest) for digest in said.documents)
        return KnownImage(
            id=said.id,
            target=left[0].target.digest,
            repo_tags=_sorted(name.name for name, reference in parsed if not reference.digest),
            repo_digests=_sorted(
                f"{one.domain}/{one.path}@{name.target.digest}" for name, one in parsed
            ),
            size=said.size,
            uid=said.uid,
            username=said.username,
            pinned=any(name.labels.get(labels.PINNED) == labels.PINNED_VALUE for name in left),
            unpacked=unpacked,
            is_ready=is_whole and (bool(unpacked) or not said.top),
        )

    def _backends(self, txn: Transaction, said: _Said) -> tuple[str, ...]:
        """Return the backends that have an image, and keep it with its config."""
        try:
            config = BLOBS.get(txn, self._namespace, said.id)
        except DataLoss:
            return ()
        kept = labels.snapshot_refs(config.labels) if config else ()
        tops = [name for name, key in kept if key == said.top]
        return tuple(sorted(name for name in tops if stands(txn, name, self._namespace, said.top)))

    def _size_of_chain(self, txn: Transaction, backend: str, key: str) -> int:
        size = 0
        while key and (record := SNAPSHOTS.get(txn, backend, self._namespace, key)):
            size, key = size + record.size, record.parent
        return size


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


def _user_of(text: str) -> tuple[int | None, str]:
    """Return the number or else the name of `USER[:GROUP]`, as the CRI tells it."""
    user = text.partition(":")[0]
    is_number = user.isascii() and user.isdecimal() and len(user) < len(str(1 << 63))
    return (int(user), "") if is_number else (None, user)
