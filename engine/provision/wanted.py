"""What is wanted of a container, and which images that means here.

Sync; safe from any thread.
"""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from engine import labels as label_rules
from engine import limits
from engine.errors import InvalidArgument, NotFound, printable
from engine.identifiers import check_identifier
from engine.kv.schema import Container, Image, MountRecord, now
from engine.labels import Labels
from engine.metadata.containers import ContainerState
from engine.metadata.mounts import MountState
from engine.metadata.provisions import HeldRoot
from engine.mounts.table import here
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform
from engine.oci.reference import parse_reference
from engine.processes import boot_id, pid_namespace
from engine.provision.places import folder_of, mount_keys, target_of
from engine.snapshots import Snapshotter
from engine.stores import Stores

__all__ = ["ContainerWanted", "FoundImage", "ImageChoice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerWanted:
    """A container as it was asked for; names of images are in full."""

    container: str
    image: str
    volumes: Mapping[str, str]
    parent: str
    readonly: bool
    backend: Snapshotter
    is_backend_named: bool
    platform: Platform | None
    quota: int
    labels: Labels
    order: bytes

    def check(self) -> None:
        """Raise InvalidArgument for what no container can be."""
        check_identifier(self.container, "container")
        label_rules.check(self.labels)
        if self.quota < 0:
            raise InvalidArgument("a quota is a number of bytes, 0 for none")
        for path in self.volumes:
            if not path.startswith("/") or path == "/" or os.path.normpath(path) != path:
                raise InvalidArgument(
                    f"{printable(path)!r} is no place for a volume; it begins with a slash"
                )

    @property
    def images(self) -> list[str]:
        """The images by name: that of the root, then those of volumes, by path."""
        return [self.image, *(self.volumes[path] for path in sorted(self.volumes))]

    def is_met_by(self, container: Container) -> bool:
        """Say whether a container was asked for with this, but for what may be changed of one."""
        said = (self.image, self.volumes, self.parent, self.readonly, self._platform)
        known = (
            container.image,
            container.volumes,
            container.parent,
            container.readonly,
            container.platform,
        )
        is_same = said == known and (not self.order or self.order == container.order)
        return is_same and (not self.is_backend_named or container.backend == self.backend.name)

    @property
    def _platform(self) -> str:
        return str(self.platform) if self.platform else ""

    def record(self) -> Container:
        """Return the record that the container begins with."""
        at = now()
        return Container(
            id=self.container,
            unique=secrets.token_hex(8),
            state=ContainerState.PROVISIONING,
            since={str(ContainerState.PROVISIONING): at},
            image=self.image,
            target="",
            backend=self.backend.name,
            created=at,
            boot=boot_id(),
            parent=self.parent,
            platform=self._platform,
            readonly=self.readonly,
            volumes=dict(self.volumes),
            labels=label_rules.merge({}, self.labels),
            quota=self.quota,
            order=self.order,
        )


@dataclass(frozen=True, slots=True)
class FoundImage:
    """An image that is here and unpacked: its ID, and its topmost layer, "" without any."""

    image: Image
    config: str
    top: str


class ImageChoice:
    """Finds the images of containers; what their documents say never changes and is remembered."""

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._said: Callable[[str, str, int, Platform | None], tuple[str, str, int]]
        self._said = lru_cache(limits.KNOWN_IMAGES)(self._read)

    def full_name(self, name: str) -> str:
        """Return the full name of an image, here or not. InvalidArgument."""
        try:
            return self._stores.images.get(name).name
        except NotFound:
            return str(parse_reference(name))

    def find(self, name: str, wanted: ContainerWanted) -> FoundImage | None:
        """Return the image of a full name if it is here and unpacked."""
        image = self._stores.images.named(name)
        try:
            return self.look(image, wanted) if image else None
        except NotFound:  # it is not all here
            return None

    def look(self, image: Image, wanted: ContainerWanted) -> FoundImage:
        """Return what an image means for a container. NotFound if it is not all here, or not unpacked.

        FailedPrecondition if the backend cannot stack so many layers.
        """
        target, backend = image.target, wanted.backend
        config, top, layers = self._said(target.media_type, target.digest, target.size, wanted.platform)
        backend.capabilities.check_layers(backend.name, layers)
        if top:
            backend.stat(top)
        return FoundImage(image, config, top)

    def _read(
        self, media_type: str, digest: str, size: int, platform: Platform | None
    ) -> tuple[str, str, int]:
        target = Descriptor(media_type=media_type, digest=digest, size=size)
        resolved = self._stores.resolve(target, platform)
        chain = resolved.chain
        return resolved.manifest.config.digest, chain[-1] if chain else "", len(chain)

    def roots(self, container: Container, found: Sequence[FoundImage]) -> list[HeldRoot]:
        """Return what a container has to hold and to claim to have these images."""
        folder = folder_of(self._stores.root.path, container.unique)
        boot, space, processes = boot_id(), here(), pid_namespace()
        return [
            HeldRoot(
                mount=MountRecord(
                    key=key,
                    target=str(target_of(folder, number)),
                    backend=container.backend,
                    rw=number == 0 and not container.readonly,
                    image=one.image.name,
                    top=one.top,
                    state=MountState.CHANGING,
                    created=container.created,
                    boot=boot,
                    space=space,
                    processes=processes,
                    container=container.id,
                ),
                config=one.config,
                target=one.image.target.digest,
            )
            for number, (key, one) in enumerate(zip(mount_keys(container), found, strict=True))
        ]
