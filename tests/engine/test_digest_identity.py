"""Digests and chain IDs: the names that everything is found by (attack row M-06)."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import Refused
from engine.oci.digest import digest_of, hasher, parse_digest
from engine.oci.identity import chain_ids
from engine.oci.mediatypes import Compression, layer_compression

REFUSED = {
    "M-06 nothing": "",
    "M-06 no algorithm": "a" * 64,
    "M-06 md5": "md5:" + "a" * 32,
    "M-06 sha1": "sha1:" + "a" * 40,
    "M-06 sha384": "sha384:" + "a" * 96,
    "M-06 sha3": "sha3-256:" + "a" * 64,
    "M-06 upper case digits": "sha256:" + "A" * 64,
    "M-06 upper case algorithm": "SHA256:" + "a" * 64,
    "M-06 short": "sha256:" + "a" * 63,
    "M-06 long": "sha256:" + "a" * 65,
    "M-06 sha512 of 64": "sha512:" + "a" * 64,
    "M-06 newline": "sha256:" + "a" * 64 + "\n",
    "M-06 blank before": " sha256:" + "a" * 64,
    "M-06 NUL": "sha256:" + "a" * 63 + "\0",
    "M-06 other digits": "sha256:" + "\u0661" * 64,
    "M-06 path": "sha256:../" + "a" * 61,
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_not_a_digest(text):
    with pytest.raises(Refused):
        parse_digest(text)


@given(st.binary(max_size=200))
def test_digest_is_that_of_the_tools(data):
    assert digest_of(data) == "sha256:" + hashlib.sha256(data).hexdigest()
    assert parse_digest(digest_of(data)) == digest_of(data)


def test_hash_follows_the_algorithm_of_the_digest():
    assert hasher().name == "sha256"
    assert hasher(parse_digest("sha512:" + "a" * 128)).name == "sha512"


def test_up_04_chain_ids_of_the_specification():
    """ChainID(L0|L1) is the digest of `ChainID(L0) DiffID(L1)`; that of one layer is its diff ID."""
    first, second, third = (digest_of(name) for name in (b"1", b"2", b"3"))
    over = "sha256:" + hashlib.sha256(f"{first} {second}".encode()).hexdigest()
    top = "sha256:" + hashlib.sha256(f"{over} {third}".encode()).hexdigest()
    assert chain_ids([first, second, third]) == [first, over, top]
    assert chain_ids([]) == []


_STACKS = st.lists(st.sampled_from([digest_of(bytes([n])) for n in range(3)]), min_size=1, max_size=6)


@given(_STACKS, _STACKS, _STACKS)
def test_chain_ids_are_equal_exactly_for_equal_stacks(same, one, other):
    one, other = same + one, same + other
    for position, (a, b) in enumerate(zip(chain_ids(one), chain_ids(other), strict=False), start=1):
        assert (a == b) == (one[:position] == other[:position])


@given(_STACKS, _STACKS)
def test_chain_ids_of_a_prefix_are_a_prefix(below, above):
    assert chain_ids(below + above)[: len(below)] == chain_ids(below)


@pytest.mark.parametrize(
    ("media_type", "compression"),
    [
        ("application/vnd.oci.image.layer.v1.tar", Compression.NONE),
        ("application/vnd.oci.image.layer.v1.tar+gzip", Compression.GZIP),
        ("application/vnd.oci.image.layer.v1.tar+zstd", Compression.ZSTD),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression.GZIP),
        ("application/vnd.docker.image.rootfs.diff.tar", Compression.ANY),
    ],
)
def test_compression_of_media_types(media_type, compression):
    assert layer_compression(media_type) is compression


@pytest.mark.parametrize(
    "media_type",
    [
        "",
        "application/vnd.oci.image.layer.v1.tar+xz",
        "text/plain",
        "application/vnd.oci.image.layer.v1.TAR",
    ],
)
def test_other_layer_types_are_refused(media_type):
    with pytest.raises(Refused):
        layer_compression(media_type)
