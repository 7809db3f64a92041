"""Brings the images of a folder, an archive or a pipe into the content store.

Sync. First all documents are read, and everything that can be found out without the layers; then blobs
are copied. Naming the images is the caller's last step. A bad image does not keep out those beside it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from engine.archive.choosing import asked_for, for_platform, full_name, full_names, grouped, merged
from engine.archive.contents import Candidate, find_images
from engine.archive.images import Planned, plan
from engine.archive.intake import Follower, Intake
from engine.archive.opening import open_source, title
from engine.content.image import ResolvedImage
from engine.content.store import ContentStore
from engine.errors import EngineError, InvalidArgument, NotFound, Refused
from engine.fs.room import Room
from engine.oci.documents import Descriptor, NotAnImage
from engine.oci.platform import Platform
from engine.progress import Report, Step

__all__ = ["Brought", "FailedImage", "Imported", "PassedOver", "Wanted", "about", "import_images"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is wanted of a source: images for a platform; some of them; one under another name."""

    platform: Platform
    refs: tuple[str, ...] = ()
    name: str | None = None


@dataclass(frozen=True, slots=True)
class PassedOver:
    """Something in a source that is no image; without a name "" as its name."""

    name: str
    digest: str
    reason: str


@dataclass(frozen=True, slots=True)
class FailedImage:
    """An image that could not be brought in, or one of its names."""

    name: str
    digest: str
    error: EngineError


@dataclass(frozen=True, slots=True)
class Imported:
    """An image whose content is in the store, and the names that it shall get."""

    names: tuple[str, ...]
    listed: Candidate
    target: Descriptor
    image: ResolvedImage


@dataclass(frozen=True, slots=True)
class Brought:
    """What came of a source so far; `asked` says that each image was asked for."""

    where: str
    asked: bool
    images: list[Imported] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)
    failed: list[FailedImage] = field(default_factory=list)

    @contextmanager
    def collecting(self, listed: Candidate) -> Iterator[None]:
        """Note what is wrong with one image and go on with the others, unless it was asked for."""
        name = listed.names[0].written if listed.names else ""
        try:
            yield
        except (Refused, NotFound) as error:
            if self.asked:
                raise about(listed, error) from error
            if isinstance(error, NotAnImage):
                self.passed_over.append(PassedOver(name, listed.digest, error.reason))
            else:
                self.failed.append(FailedImage(name, listed.digest, about(listed, error)))

    def check_some(self, images: Sized) -> None:
        """Raise what is wrong if no image is left."""
        if not images and self.failed:
            raise self.failed[0].error
        if not images:
            count = len(self.passed_over)
            more = f", and {count - 1} more that are none" if count > 1 else ""
            reason = self.passed_over[0].reason
            raise Refused(f"{self.where} holds no container image: {reason}{more}")


E = TypeVar("E", bound=EngineError)


def about(listed: Candidate, error: E) -> E:
    """Return an error that names the image.

    A new one: another import may have the same, of work that both share. It has no traceback, which
    would keep alive what was read on the way to it, transactions among it.
    """
    # Not copy.copy, which begins with the constructor, and not all take a message.
    named = type(error).__new__(type(error), f"image {listed.title}: {error}")
    vars(named).update(vars(error))
    return named


def import_images(  # noqa: PLR0913  what an import stands between
    origin: Path | int,
    content: ContentStore,
    wanted: Wanted,
    *,
    spool: Path,
    lease: str,
    report: Report,
    check: Callable[[Sequence[Planned]], None],
    follower: Follower,
) -> Brought:
    """Store the images of a source, a path or an open descriptor.

    `spool` is a folder on the store's disk, for what must be read twice. `follower` hears of layers as
    they come in. `check` may raise once it is known what will come, before it comes. Raises NotFound for
    a file, a platform or an image that is not there, Refused for what is no image or breaks a rule, if
    it was asked for or nothing else came in.
    """
    where = title(origin)
    item = origin.name if isinstance(origin, Path) else where
    with open_source(origin, spool, partial(report, Step.READ, item)) as opened:
        contents = find_images(opened.files, where, opened.stem)
        intake = Intake(contents.files, content, lease, report, Room(spool), follower)
        work = _Import(wanted, opened.stem, Brought(where, asked=bool(wanted.refs)))
        planned = work.named(work.planned(contents.images, intake), len(contents.images))
        check(planned)
        work.store(planned)
        return work.brought


@dataclass(frozen=True, slots=True)
class _Import:
    wanted: Wanted
    stem: str
    brought: Brought

    def planned(self, images: Sequence[Candidate], intake: Intake) -> list[Planned]:
        """Read the documents of all that is wanted."""
        chosen: list[Candidate] = []
        for group in grouped(asked_for(images, self.wanted.refs, self.brought.where)):
            with self.brought.collecting(group[0]):
                chosen += for_platform(group, self.wanted.platform)
        found: list[Planned] = []
        for listed in merged(chosen):
            with self.brought.collecting(listed):
                found.append(plan(listed, intake, self.wanted.platform))
        self.brought.check_some(found)
        return found

    def named(self, images: Sequence[Planned], listed: int) -> list[Planned]:
        """Give images their full names, of `listed` that the source has; some are left without."""
        count = len(images) + len(self.brought.failed)
        if self.wanted.name and count > 1:
            where = self.brought.where
            raise InvalidArgument(f"{where} holds {count} images; choose one with --ref to name it")
        if self.wanted.name:
            return [replace(image, names=(self.wanted.name,)) for image in images]
        is_alone = count == 1 and (listed == 1 or not self.wanted.refs)
        owners = full_names(image.listed for image in images)
        found: list[Planned] = []
        for image in images:
            if image.listed.names:
                names = self._names(image.listed, owners)
            else:
                names = (self.stem,) if is_alone and self.stem else ()
            if names or not image.listed.names:
                found.append(replace(image, names=names))
        self.brought.check_some(found)
        return found

    def _names(self, listed: Candidate, owners: Mapping[str, int]) -> tuple[str, ...]:
        names: list[str] = []
        for name in listed.names:
            with self.brought.collecting(replace(listed, names=(name,))):
                names.append(full_name(name, owners))
        return tuple(names)

    def store(self, images: Sequence[Planned]) -> None:
        """Bring in the blobs of images."""
        for image in images:
            with self.brought.collecting(image.listed):
                target, resolved = image.store()
                names = image.names or (f"{self.stem or 'image'}@{target.digest}",)
                imported = Imported(names, image.listed, target, resolved)
                self.brought.images.append(imported)
        self.brought.check_some(self.brought.images)
