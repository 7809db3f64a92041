"""Images: names for manifests and indexes.

Sync; safe from any thread. Names are full references. A name appears only after everything that it
names is in the store.
"""

from collections.abc import Mapping

from engine.errors import AlreadyExists, NotFound
from engine.kv.environment import Environment, Transaction
from engine.kv.schema import BLOBS, IMAGES, Image, now
from engine.kv.table import Damaged
from engine.oci.documents import Descriptor
from engine.oci.reference import familiar, parse_reference

__all__ = ["ImageStore"]


def _absent(full: str) -> NotFound:
    return NotFound(f"no image {familiar(full)}; `lamina images` lists what there is")


class ImageStore:
    """The images of one namespace."""

    def __init__(self, meta: Environment, namespace: str) -> None:
        self._meta = meta
        self._namespace = namespace

    def get(self, name: str) -> Image:
        """Return the image that `name` means, in its full or its familiar form. Raises NotFound."""
        with self._meta.read() as txn:
            return self._get(txn, name)

    def _get(self, txn: Transaction, name: str) -> Image:
        full = str(parse_reference(name))
        image = IMAGES.get(txn, self._namespace, full)
        if image is None:
            raise _absent(full)
        return image

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
            return [self._put(txn, name, target, replace) for name, target in targets.items()]

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

    def _put(self, txn: Transaction, name: str, target: Descriptor, replace: bool) -> Image:
        full = str(parse_reference(name))
        old = self._free(txn, full, target, replace)
        if old is not None and old.target.digest == target.digest:
            return old
        if BLOBS.get(txn, self._namespace, target.digest) is None:
            raise NotFound(f"no blob {target.digest} for image {familiar(full)}")
        at = now()
        image = Image(
            name=full,
            target=target,
            created=old.created if old else at,
            updated=at,
            labels=old.labels if old else {},
        )
        IMAGES.put(txn, image, self._namespace, full)
        return image

    def remove(self, name: str) -> None:
        """Take a name away; what only it kept is garbage. Raises NotFound."""
        with self._meta.write() as txn:
            full = str(parse_reference(name))
            if not IMAGES.delete(txn, self._namespace, full):
                raise _absent(full)
