"""Images: names for manifests and indexes.

Sync; safe from any thread. Names are full references. A name appears only after everything that it
names is in the store.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec

from engine import labels as label_rules
from engine import limits, times
from engine.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Refused
from engine.fieldpaths import change_labels
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, IMAGES, Image, now
from engine.kv.table import Damaged
from engine.labels import Labels
from engine.metadata import ledger
from engine.metadata.nodes import IMAGE, Node, node_of
from engine.oci.documents import Descriptor
from engine.oci.reference import familiar, parse_reference
from engine.oci.short import beginnings, the_one

__all__ = ["ImageStore"]

_SHOWN = 5  # names in a message
_NO_LABELS: Labels = MappingProxyType({})
_TARGET = "target"


def _absent(name: str) -> NotFound:
    return NotFound(f"no image {name}; `lamina images` lists what there is")


class ImageStore:
    """The images of one namespace."""

    def __init__(self, meta: Environment, namespace: str) -> None:
        self._meta = meta
        self._namespace = namespace

    def get(self, name: str) -> Image:
        """Return the image that `name` means: its name, full or familiar, or digits of its digest.

        NotFound, InvalidArgument for what is no name or begins several digests.
        """
        with self._meta.read() as txn:
            return self._named(txn, name) or self._of_digest(txn, name)[0]

    def note_use(self, image: Image) -> None:
        """Note that something was made of an image, if that was not noted just now."""
        at = now()
        if abs(at - image.used) < limits.USE_NOTED_S * 10**9:
            return
        with self._meta.write() as txn:
            found = IMAGES.get(txn, self._namespace, image.name)
            if found is not None:  # else its name went meanwhile
                ledger.put(txn, self._namespace, msgspec.structs.replace(found, used=at))

    def named(self, name: str) -> Image | None:
        """Return the image of that very name, full or familiar, or None."""
        with self._meta.read() as txn:
            return self._named(txn, name)

    def _named(self, txn: Transaction, name: str) -> Image | None:
        return IMAGES.get(txn, self._namespace, str(parse_reference(self._whole(txn, name))))

    def _whole(self, txn: Transaction, name: str) -> str:
        """Return a name that ends in the first digits of a digest in full, others as they are."""
        path, _, digits = name.rpartition("@")
        starts = [start for start in beginnings(digits) if path and len(start.text) < start.size]
        if not starts:
            return name
        wanted = tuple(
            str(parse_reference(f"{path}@{start.text.ljust(start.size, '0')}"))[
                : len(start.text) - start.size
            ]
            for start in starts
        )
        names = [image.name for image in IMAGES.survey(txn, self._namespace)[0]]
        found = the_one((one for one in names if one.startswith(wanted)), name, "images")
        if found is None:
            raise _absent(name)
        return found

    def _of_digest(self, txn: Transaction, text: str) -> list[Image]:
        """Return the images whose digest begins as `text`, by name: one digest, one name or more."""
        starts = tuple(beginning.text for beginning in beginnings(text))
        readable = IMAGES.survey(txn, self._namespace)[0] if starts else []
        found = [image for image in readable if image.target.digest.startswith(starts)]
        if the_one((image.target.digest for image in found), text, "images") is None:
            raise _absent(familiar(str(parse_reference(text))))
        return sorted(found, key=lambda image: image.name)

    def walk(self) -> list[Image]:
        """Return all images whose records can be read, by name."""
        with self._meta.read() as txn:
            return sorted(IMAGES.survey(txn, self._namespace)[0], key=lambda image: image.name)

    def damaged(self) -> list[Damaged]:
        """Return the names whose records cannot be read."""
        with self._meta.read() as txn:
            return IMAGES.survey(txn, self._namespace)[1]

    def put_all(self, targets: Mapping[str, Descriptor], *, replace: bool = False) -> list[Image]:
        """Name images, all or none. AlreadyExists if a name means another, unless `replace`."""
        with self._meta.write() as txn:
            return [self.put(txn, name, target, replace=replace) for name, target in targets.items()]

    def check_all(self, targets: Mapping[str, Descriptor], *, replace: bool = False) -> None:
        """Raise what `put_all` would raise for these names, but for content that is still to come."""
        with self._meta.read() as txn:
            for name, target in targets.items():
                self._free(txn, str(parse_reference(name)), target, replace)

    def _free(self, txn: Transaction, full: str, target: Descriptor, replace: bool) -> Image | None:
        """Return the image that has a name. AlreadyExists if that is another one, unless `replace`."""
        old = IMAGES.get(txn, self._namespace, full)
        if old is not None and old.target.digest != target.digest and not replace:
            raise AlreadyExists(
                f"image {familiar(full)} exists and is another one; "
                "choose another name or pass --replace"
            )
        return old

    def put(
        self, txn: Transaction, name: str, target: Descriptor, *, replace: bool, lasting: bool = True
    ) -> Image:
        """Name an image within a transaction. Raises what `put_all` does.

        A new name that is not `lasting` goes with what it means, once nothing else keeps that; it lasts
        from when it is put again so that it does, or pinned.
        """
        full = str(parse_reference(name))
        old = self._free(txn, full, target, replace)
        lasts = lasting or (old is not None and label_rules.GC_BREF_TARGET not in old.labels)
        about = _lasting(old.labels if old else {}) if lasts else _passing(old, target)
        same = old if old is not None and old.target.digest == target.digest else None
        if same and same.labels == about:
            return same
        if not same:
            self._check_blob(txn, full, target)
        at = now()
        image = Image(
            name=full,
            target=target,
            created=old.created if old else at,
            updated=at,
            labels=about,
            used=same.used if same else 0,
        )
        ledger.put(txn, self._namespace, image)
        return image

    def create(
        self, name: str, target: Descriptor, *, labels: Labels = _NO_LABELS, lease: str = ""
    ) -> Image:
        """Name an image. One that expires joins the lease, if there is one, as in containerd.

        InvalidArgument, AlreadyExists, NotFound for what is not in the store.
        """
        full = str(parse_reference(name))
        _check_target(target)
        at = now()
        image = Image(
            name=full, target=target, created=at, updated=at, labels=label_rules.merge({}, labels)
        )
        with self._meta.write() as txn:
            if IMAGES.any(txn, self._namespace, full):
                raise AlreadyExists(f"image {familiar(full)} exists")
            self._check_blob(txn, full, target)
            ledger.put(txn, self._namespace, image)
            if label_rules.GC_EXPIRE in image.labels:
                ledger.pin(txn, self._namespace, lease, node_of(image))
        return image

    def update(
        self,
        name: str,
        *,
        target: Descriptor | None = None,
        labels: Labels = _NO_LABELS,
        paths: Sequence[str] = (),
    ) -> Image:
        """Change what `paths` name of an image: `target`, `labels`, `labels.KEY`; without any, all.

        NotFound, also for a target that is not in the store, InvalidArgument.
        """
        about = [path for path in paths if path != _TARGET]
        with self._meta.write() as txn:
            image = self._named(txn, name)
            if image is None:
                raise _absent(name)
            if _TARGET in paths or not paths:
                if target is None:
                    raise InvalidArgument(f"image {name} needs a target")
                _check_target(target)
                self._check_blob(txn, image.name, target)
                image = msgspec.structs.replace(image, target=target)
            if about or not paths:
                changed = change_labels(image.labels, labels, about)
                image = msgspec.structs.replace(image, labels=changed)
            image = msgspec.structs.replace(image, updated=now())
            ledger.put(txn, self._namespace, image)
            return image

    def label(self, changes: Labels, *names: str) -> list[Image]:
        """Set labels on images, all or none, deleting those whose new value is empty.

        A name may be digits of a digest. NotFound; FailedPrecondition where that has several names.
        """
        with self._meta.write() as txn:
            found = dict.fromkeys(self._one(txn, name) for name in names)
            return [self._label(txn, full, changes) for full in found]

    def _label(self, txn: Transaction, full: str, changes: Labels) -> Image:
        image = IMAGES.get(txn, self._namespace, full)
        assert image is not None
        merged = label_rules.merge(image.labels, changes)
        if changes.get(label_rules.PINNED):
            merged = _lasting(merged)
        image = msgspec.structs.replace(image, labels=merged, updated=now())
        ledger.put(txn, self._namespace, image)
        return image

    def _check_blob(self, txn: Transaction, full: str, target: Descriptor) -> None:
        if BLOBS.get(txn, self._namespace, target.digest) is None:
            raise NotFound(f"no blob {target.digest} for image {familiar(full)}")

    def remove(self, *names: str, target: Descriptor | None = None) -> list[str]:
        """Take names away, all or none, and return them in full; what only they kept is garbage.

        NotFound, also if they do not mean `target`, where that is given; for digits of a digest that
        has several names FailedPrecondition.
        """
        with self._meta.write() as txn:
            # All are looked up before one goes: fewer would be left to tell digits from.
            found = list(dict.fromkeys(self._one(txn, name) for name in names))
            for full in found:
                if target is not None:
                    self._check_means(txn, full, target)
                ledger.drop(txn, self._namespace, Node(IMAGE, "", full))
            ledger.note_deletion(txn, self._namespace)
            return found

    def drop_all(self, meant: Mapping[str, str]) -> list[str]:
        """Take those away of some names, in full, that mean these digests still; return which."""
        with self._meta.write() as txn:
            now_mean = ((name, IMAGES.get(txn, self._namespace, name)) for name in meant)
            found = [name for name, one in now_mean if one and one.target.digest == meant[name]]
            for name in found:
                ledger.drop(txn, self._namespace, Node(IMAGE, "", name))
            if found:
                ledger.note_deletion(txn, self._namespace)
            return found

    def _check_means(self, txn: Transaction, full: str, target: Descriptor) -> None:
        image = IMAGES.get(txn, self._namespace, full)
        if image is None or image.target.digest != target.digest:
            raise NotFound(f"image {familiar(full)} does not mean {target.digest} any more")

    def _one(self, txn: Transaction, name: str) -> str:
        """Return the one name that is meant, in full, whether or not its record can be read."""
        full = str(parse_reference(self._whole(txn, name)))
        if IMAGES.any(txn, self._namespace, full):
            return full
        found = [image.name for image in self._of_digest(txn, name)]
        if len(found) > 1:
            names = ", ".join(familiar(one) for one in found[:_SHOWN])
            more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise FailedPrecondition(f"image {name} has {len(found)} names ({names}{more}); say which")
        return found[0]


def _lasting(about: Labels) -> dict[str, str]:
    """Return the labels of a name so that it lasts; an expiry that a user set stays."""
    passing = (label_rules.GC_BREF_TARGET, label_rules.GC_EXPIRE)
    lasts = label_rules.GC_BREF_TARGET not in about
    return {key: value for key, value in about.items() if lasts or key not in passing}


def _passing(old: Image | None, target: Descriptor) -> dict[str, str]:
    """Return the labels of a name that is to go with what it means."""
    expired = {label_rules.GC_EXPIRE: times.rfc3339(0), label_rules.GC_BREF_TARGET: target.digest}
    return label_rules.merge(old.labels if old else {}, expired)


def _check_target(target: Descriptor) -> None:
    """Raise InvalidArgument for what no image can be."""
    try:
        target.key  # noqa: B018  checks the digest
    except Refused as error:
        raise InvalidArgument(str(error)) from None
    if target.size <= 0 or not target.media_type:
        raise InvalidArgument(f"an image needs a media type and a size; {target.digest} has none")
