"""Which of the images that a source lists are brought in, and what they are called.

Pure.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import msgspec

from engine.archive.contents import Candidate, Name
from engine.content.image import is_attestation, may_be_image
from engine.errors import InvalidArgument, NotFound, Refused, printable
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform, choose, normalise
from engine.oci.reference import parse_reference
from engine.oci.short import beginnings, the_one

__all__ = ["asked_for", "for_platform", "full_name", "full_names", "grouped", "merged"]

_SHOWN = 10  # images that a message lists


def asked_for(images: Sequence[Candidate], refs: Iterable[str], where: str) -> list[Candidate]:
    """Return the images that `refs` choose, by name, by tag or by digest; without any, all.

    One that is chosen by name comes with that name only. NotFound for what names none, InvalidArgument
    for digits that several digests begin with.
    """
    return [image for ref in refs for image in _meant(images, ref, where)] or list(images)


def _meant(images: Sequence[Candidate], ref: str, where: str) -> list[Candidate]:
    full = _full(ref)
    found = []
    for image in images:
        names = tuple(
            n for n in image.names if n.written == ref or (full and full == _full(n.reference))
        )
        if names:
            found.append(replace(image, names=names))
    return found or _beginning(images, ref, where)


def _beginning(images: Sequence[Candidate], ref: str, where: str) -> list[Candidate]:
    starts = tuple(beginning.text for beginning in beginnings(ref))
    found = [image for image in images if image.digest.startswith(starts)]
    if not found:
        there = ", ".join(image.title for image in islice(images, _SHOWN))
        more = f" and {len(images) - _SHOWN} more" if len(images) > _SHOWN else ""
        raise NotFound(f"{where} has no image {printable(ref)}; it has {there}{more}")
    the_one((image.digest for image in found), ref, "images")
    return found


def _full(reference: str) -> str:
    try:
        return str(parse_reference(reference))
    except InvalidArgument:
        return ""


def full_names(images: Iterable[Candidate]) -> Counter[str]:
    """Return the references that the names of images stand for, and for how many images each does."""
    return Counter(
        full for image in images for full in {_full(name.reference) for name in image.names} if full
    )


def full_name(name: Name, owners: Mapping[str, int]) -> str:
    """Return the reference that a name stands for; Refused if it is none or stands for two images."""
    full = _full(name.reference)
    if not full:
        raise Refused(
            "its name in the archive is no image reference; give it one with --name "
            "(and choose it with --ref if it is not alone)"
        )
    if owners[full] > 1:
        raise Refused(
            f"{owners[full]} images in the archive have this name; choose one by its digest with --ref "
            "and name it with --name"
        )
    return full


def merged(images: Iterable[Candidate]) -> list[Candidate]:
    """Return each image once, with all names that it is listed under."""
    found: dict[object, list[Candidate]] = {}
    for image in images:
        key: object = image.what
        if isinstance(image.what, Descriptor):
            key = (image.what.digest, image.what.media_type, image.what.size, image.chosen)
        found.setdefault(key, []).append(image)
    return [_one(same) for same in found.values()]


def _one(same: Sequence[Candidate]) -> Candidate:
    names = tuple(dict.fromkeys(name for image in same for name in image.names))
    what = same[0].what
    if len(names) > 1 and isinstance(what, Descriptor):
        what = msgspec.structs.replace(what, annotations={})  # they tell of one name
    return replace(same[0], names=names, what=what)


def grouped(images: Iterable[Candidate]) -> list[list[Candidate]]:
    """Return together what may be one image for several platforms: all of a name, all without."""
    groups: dict[object, list[Candidate]] = {}
    for position, image in enumerate(images):
        key: object = position
        if isinstance(image.what, Descriptor):
            key = tuple(_full(name.reference) or name.written for name in image.names)
        groups.setdefault(key, []).append(image)
    return list(groups.values())


def for_platform(group: Sequence[Candidate], platform: Platform) -> list[Candidate]:
    """Return the one of a group that suits the platform; all, if they are not made for several.

    What cannot be an image stays, to be named by whoever finds out what it is; attestations go, as
    they belong to the images. NotFound if none suits.
    """
    offers: list[Platform | None] = []
    images: list[Candidate] = []
    others: list[Candidate] = []
    for one in group:
        if not isinstance(one.what, Descriptor):
            return list(group)
        if may_be_image(one.what):
            images.append(one)
            offers.append(one.what.platform)
        elif not is_attestation(one.what):
            others.append(one)
    if not images:
        return list(group)
    if len(images) > 1 and _are_variants(offers, is_named=bool(group[0].names)):
        position = choose(platform, offers)
        if position is None:
            raise NotFound(f"there is no single image for {platform}")
        images = [replace(images[position], chosen=True)]
    return [*images, *others]


def _are_variants(offers: Sequence[Platform | None], *, is_named: bool) -> bool:
    """Say whether images are one for several platforms; without a name each must have its own."""
    if is_named:
        return any(offers)
    known = [str(normalise(offer)) for offer in offers if offer]
    return len(set(known)) == len(offers)
