"""Platforms: parse, normalise, and choose one manifest of an index, always the same one. Pure."""

from collections.abc import Sequence

import msgspec

from engine.errors import InvalidArgument, printable

__all__ = ["Platform", "choose", "matches", "normalise", "parse_platform"]


class Platform(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An operating system and a processor (OCI image spec, image-index.md)."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = msgspec.field(default="", name="os.version")
    os_features: tuple[str, ...] = msgspec.field(default=(), name="os.features")

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


_ARCHITECTURES = {
    "x86_64": "amd64",
    "x86-64": "amd64",
    "aarch64": "arm64",
    "i386": "386",
    "i686": "386",
    "armhf": "arm",
    "armv7l": "arm",
    "armel": "arm",
}
_DEFAULT_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}


def normalise(platform: Platform) -> Platform:
    """Return the platform under its usual names; a default variant is left empty (arm keeps it)."""
    architecture = platform.architecture.lower()
    variant = platform.variant.lower()
    if architecture == "armel":
        variant = variant or "v6"
    architecture = _ARCHITECTURES.get(architecture, architecture)
    if variant and not variant.startswith("v"):
        variant = f"v{variant}"
    if architecture == "arm":
        variant = variant or "v7"
    elif variant == _DEFAULT_VARIANTS.get(architecture):
        variant = ""
    return msgspec.structs.replace(
        platform, architecture=architecture, os=platform.os.lower(), variant=variant
    )


def parse_platform(text: str) -> Platform:
    """Return the platform written as `os/architecture[/variant]`."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(part.isascii() and part.isalnum() for part in parts):
        raise InvalidArgument(f"{printable(text)!r} is not a platform; write os/architecture")
    return normalise(Platform(os=parts[0], architecture=parts[1], variant="".join(parts[2:])))


def matches(wanted: Platform, offered: Platform) -> bool:
    """Say whether an image for `offered` runs on `wanted` (both normalised).

    A higher variant runs images of a lower one: arm v7 runs v6, amd64 v3 runs v1.
    """
    same = (wanted.os, wanted.architecture) == (offered.os, offered.architecture)
    return same and _level(offered) <= _level(wanted)


def _level(platform: Platform) -> int:
    variant = platform.variant or _DEFAULT_VARIANTS.get(platform.architecture, "v0")
    digits = variant[1:].partition(".")[0]
    return int(digits) if digits.isdigit() and len(digits) < 4 else 1_000_000


def choose(wanted: Platform, offers: Sequence[Platform | None]) -> int | None:
    """Return the position of the best offer: the highest fitting variant, then the first listed.

    An entry without a platform is taken only when no other fits and it is the only such entry:
    its config is checked afterwards.
    """
    wanted = normalise(wanted)
    fitting = [
        (-_level(offer), position)
        for position, offer in enumerate(map(_normalised, offers))
        if offer and matches(wanted, offer)
    ]
    if fitting:
        return min(fitting)[1]
    silent = [position for position, offer in enumerate(offers) if offer is None]
    return silent[0] if len(silent) == 1 else None


def _normalised(platform: Platform | None) -> Platform | None:
    return normalise(platform) if platform else None
