"""Platforms: names, and the one choice out of an index (attack row M-18)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InvalidArgument
from engine.oci.platform import Platform, choose, matches, normalise, parse_platform


def platform(text: str) -> Platform:
    os, architecture, variant = (*text.split("/"), "")[:3]
    return Platform(os=os, architecture=architecture, variant=variant)


NORMAL = {
    "linux/amd64": "linux/amd64",
    "Linux/X86_64": "linux/amd64",
    "linux/x86-64": "linux/amd64",
    "linux/amd64/v1": "linux/amd64",
    "linux/amd64/v3": "linux/amd64/v3",
    "linux/aarch64": "linux/arm64",
    "linux/arm64/v8": "linux/arm64",
    "linux/arm64/8": "linux/arm64",
    "linux/arm64/V9": "linux/arm64/v9",
    "linux/arm": "linux/arm/v7",
    "linux/arm/6": "linux/arm/v6",
    "linux/armhf": "linux/arm/v7",
    "linux/armel": "linux/arm/v6",
    "linux/i386": "linux/386",
    "linux/riscv64": "linux/riscv64",
}


@pytest.mark.parametrize(("text", "normal"), NORMAL.items())
def test_normal_form(text, normal):
    assert str(normalise(platform(text))) == normal


@pytest.mark.parametrize(
    "text", ["", "linux", "linux/", "/amd64", "linux/amd64/v8/x", "linux/am d64", "lin\u00fcx/a"]
)
def test_not_a_platform(text):
    with pytest.raises(InvalidArgument):
        parse_platform(text)


def test_parsed_is_normal():
    assert parse_platform("linux/aarch64/v8") == platform("linux/arm64")


CHOICES = {
    "M-18 five of the same, the first": ("linux/amd64", ["linux/amd64"] * 5, 0),
    "M-18 highest variant that fits": (
        "linux/arm/v7",
        ["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"],
        1,
    ),
    "M-18 a higher variant does not fit": ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], 1),
    "M-18 no variant is the usual one": ("linux/arm64", ["linux/arm64/v9", "linux/arm64/v8"], 1),
    "M-18 amd64 v3 runs v2": ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v2", "linux/amd64/v4"], 1),
    "M-18 amd64 does not run v2": ("linux/amd64", ["linux/amd64/v2"], None),
    "M-18 nonsense variant": ("linux/amd64", ["linux/amd64/vv", "linux/amd64/v99999999999"], None),
    "M-18 other names of the same": ("linux/amd64", ["linux/arm64", "Linux/x86_64"], 1),
    "M-18 unknown is never ours": ("linux/amd64", ["unknown/unknown"], None),
    "M-18 attestation beside the image": ("linux/amd64", ["unknown/unknown", "linux/amd64"], 1),
    "M-18 missing platform is the last resort": ("linux/amd64", [None, "linux/amd64"], 1),
    "M-18 one missing platform": ("linux/amd64", ["linux/arm64", None], 1),
    "M-18 two missing platforms": ("linux/amd64", [None, None], None),
    "M-18 other system": ("linux/amd64", ["windows/amd64"], None),
    "M-18 nothing": ("linux/amd64", [], None),
}


@pytest.mark.parametrize(("wanted", "offers", "position"), CHOICES.values(), ids=CHOICES)
def test_choice(wanted, offers, position):
    assert choose(platform(wanted), [platform(o) if o else None for o in offers]) == position


def test_m_18_os_version_does_not_matter():
    """It is windows's; on linux the first entry wins whatever it says."""
    old = Platform(os="linux", architecture="amd64", os_version="1")
    assert choose(platform("linux/amd64"), [old, platform("linux/amd64")]) == 0


_PLATFORMS = st.builds(
    Platform,
    os=st.sampled_from(["linux", "Linux", "windows", "unknown"]),
    architecture=st.sampled_from(["amd64", "x86_64", "arm", "armel", "aarch64", "arm64", "386"]),
    variant=st.sampled_from(["", "v1", "v5", "6", "v7", "v8", "V9", "x"]),
)


@given(_PLATFORMS)
def test_normal_form_is_its_own(found):
    assert normalise(normalise(found)) == normalise(found)


@given(_PLATFORMS)
def test_a_platform_runs_its_own_images(found):
    assert matches(normalise(found), normalise(found))


@given(_PLATFORMS, st.lists(st.none() | _PLATFORMS, max_size=6))
def test_choice_is_one_that_fits(wanted, offers):
    position = choose(wanted, offers)
    fitting = [i for i, o in enumerate(offers) if o and matches(normalise(wanted), normalise(o))]
    if fitting:
        assert position in fitting
    elif position is not None:
        assert offers.count(None) == 1
        assert offers[position] is None


@given(_PLATFORMS, st.lists(_PLATFORMS, max_size=5), st.randoms(use_true_random=False))
def test_choice_does_not_depend_on_the_order(wanted, offers, random):
    """Only equals are told apart by their place."""
    shuffled = random.sample(offers, len(offers))
    first, second = choose(wanted, offers), choose(wanted, shuffled)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert normalise(offers[first]) == normalise(shuffled[second])
