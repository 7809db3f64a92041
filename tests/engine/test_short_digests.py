"""Digests are told apart by their first digits, and what begins so is found by the order of keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.content.store import ContentStore
from engine.errors import FailedPrecondition, InvalidArgument, NotFound
from engine.kv.schema import BLOBS, IMAGES, SNAPSHOTS, Blob, Image, Snapshot
from engine.metadata.lineage import full_key
from engine.oci.documents import Descriptor
from engine.oci.mediatypes import OCI_MANIFEST
from engine.oci.short import beginnings, short_forms, the_one
from engine.stores import Stores

ONE, TWIN, OTHER = (f"sha256:{digits:0<64}" for digits in ("abcdef0123456", "abcdef0123457", "12"))
LONG = f"sha512:{'abcd9':0<128}"
OF_LETTERS = f"sha256:{'cafe':a<64}"


def _blob(digest: str) -> Blob:
    return Blob(digest=digest, number=1, size=1, created=1, updated=1)


@pytest.fixture
def content(stores: Stores) -> ContentStore:
    with stores.root.meta.write() as txn:
        for digest in (ONE, TWIN, OTHER, LONG, OF_LETTERS):
            BLOBS.put(txn, _blob(digest), "default", digest)
        hidden = f"sha256:{'9999':0<64}"
        BLOBS.put(txn, _blob(hidden), "team", hidden)
    return stores.content


def _image(stores: Stores, name: str, digest: str) -> str:
    target = Descriptor(media_type=OCI_MANIFEST, digest=digest, size=1)
    full = f"docker.io/library/{name}"
    with stores.root.meta.write() as txn:
        image = Image(name=full, target=target, created=1, updated=1)
        IMAGES.put(txn, image, "default", full)
    return full


def _snapshots(stores: Stores, backend: str, *keys: str) -> None:
    (stores.root.snapshots / backend).mkdir()
    with stores.root.meta.write() as txn:
        for number, key in enumerate(keys):
            record = Snapshot(key=key, id=number, kind="committed", parent="", created=1, updated=1)
            SNAPSHOTS.put(txn, record, backend, "default", key)


# -- as text ----------------------------------------------------------------------------------


@given(st.sets(st.text("0123456789abcdef", min_size=64, max_size=64), min_size=1, max_size=20))
def test_short_forms_are_told_apart(digits: set[str]):
    # Neighbours that differ late only, as chance does not make them.
    digits |= {name[:-1] + ("0" if name[-1] != "0" else "1") for name in digits}
    forms = short_forms(f"sha256:{name}" for name in digits)
    for name, form in forms.items():
        assert len(form) >= 12
        assert [other for other in digits if other.startswith(form)] == [name.partition(":")[2]]


def test_short_forms_are_as_short_as_can_be():
    assert short_forms([ONE, TWIN, OTHER, "web"]) == {
        ONE: "abcdef0123456",
        TWIN: "abcdef0123457",
        OTHER: "120000000000",
        "web": "web",
    }


@pytest.mark.parametrize("text", ["abc", "", "ABCDEF", "abcg", "sha1:abcdef", "sha256:", "a" * 129])
def test_what_is_no_beginning_of_a_digest(text: str):
    assert beginnings(text) == []


def test_a_beginning_may_be_of_either_algorithm():
    assert beginnings("abcd") == [("sha256:abcd", 71), ("sha512:abcd", 135)]
    assert beginnings("sha256:abcd") == [("sha256:abcd", 71)]
    assert beginnings("a" * 65) == [(f"sha512:{'a' * 65}", 135)]


def test_several_candidates_are_listed_but_not_without_end():
    names = [f"sha256:{number:064}" for number in range(9)]
    with pytest.raises(InvalidArgument) as caught:
        the_one(names, "0000", "blobs")
    assert str(caught.value).count("sha256:") == 5
    assert "and 4 more" in str(caught.value)


# -- blobs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("abcdef0123456", ONE),
        ("sha256:abcdef0123457", TWIN),
        (ONE, ONE),
        ("1200", OTHER),
        ("abcd9", LONG),
        ("sha512:abcd", LONG),
        (LONG, LONG),
    ],
)
def test_a_blob_is_found(content: ContentStore, text: str, found: str):
    assert content.find(text) == found


@pytest.mark.parametrize("text", ["abcd", "sha256:abcdef", "abcdef012345"])
def test_an_ambiguous_beginning_is_an_error(content: ContentStore, text: str):
    with pytest.raises(InvalidArgument, match="type more digits") as caught:
        content.find(text)
    assert ONE in str(caught.value)


def test_another_namespace_is_not_looked_at(content: ContentStore):
    with pytest.raises(NotFound):
        content.find("9999")


def test_only_neighbours_are_read(content: ContentStore, monkeypatch: pytest.MonkeyPatch):
    seen = []
    items = BLOBS._items

    def counted(txn, start):
        for item in items(txn, start):
            seen.append(bytes(item[0]))
            yield item

    monkeypatch.setattr(BLOBS, "_items", counted)
    assert content.find("1200") == OTHER
    assert len(seen) == 2  # itself, and the one whose key does not tell its name


# -- snapshots --------------------------------------------------------------------------------


def test_a_snapshot_is_found_by_its_chain_id_alone(stores: Stores):
    _snapshots(stores, "overlay", ONE, TWIN, OTHER, "abcdef-mine")
    meta = stores.root.meta
    assert full_key(meta, "overlay", "default", "1200") == OTHER
    assert full_key(meta, "overlay", "default", "abcdef0123457") == TWIN
    assert full_key(meta, "copy", "default", "1200") is None
    with pytest.raises(InvalidArgument, match="snapshots"):
        full_key(meta, "overlay", "default", "abcdef")
    assert stores.find_snapshot("1200") == (stores.snapshotter("overlay"), OTHER)
    assert stores.find_snapshot("abcdef-mine")[1] == "abcdef-mine"
    with pytest.raises(NotFound):
        stores.find_snapshot("abcdef-")


def test_a_snapshot_in_two_backends_needs_a_word_more(stores: Stores):
    for backend in ("overlay", "copy"):
        _snapshots(stores, backend, ONE)
    for text in (ONE, "abcd"):
        with pytest.raises(InvalidArgument, match="say which with --snapshotter"):
            stores.find_snapshot(text)
        assert stores.find_snapshot(text, "copy") == (stores.snapshotter("copy"), ONE)


# -- images -----------------------------------------------------------------------------------


def test_an_image_is_found_by_name_or_digits(stores: Stores):
    full = _image(stores, "app:1", ONE)
    _image(stores, "other:1", OTHER)
    for text in ("app:1", full, "abcdef012345", ONE, "sha256:abcd"):
        assert stores.images.get(text).name == full
    for text in ("abcde0", "cafe", "abc"):
        with pytest.raises(NotFound, match=f"no image {text}:latest"):
            stores.images.get(text)


def test_a_name_goes_before_digits(stores: Stores):
    _image(stores, "other:1", ONE)
    named = _image(stores, "abcdef:latest", OTHER)
    assert stores.images.get("abcdef").name == named
    assert stores.images.remove("abcdef") == [named]
    assert stores.images.get("abcdef").name.endswith("other:1")


def test_digits_of_two_images_are_ambiguous(stores: Stores):
    _image(stores, "app:1", ONE)
    _image(stores, "app:2", TWIN)
    for call in (stores.images.get, stores.images.remove):
        with pytest.raises(InvalidArgument, match="begins 2 images"):
            call("abcdef")


def test_a_digest_of_several_names_is_not_removed_at_once(stores: Stores):
    names = [_image(stores, name, ONE) for name in ("app:1", "app:2")]
    assert stores.images.get("abcdef").name == names[0]
    with pytest.raises(FailedPrecondition, match=r"2 names \(app:1, app:2\)"):
        stores.images.remove("abcdef")
    stores.images.remove("app:2")
    assert stores.images.remove("abcdef") == [names[0]]
    assert stores.images.walk() == []


def test_a_name_that_ends_in_a_digest_is_known_by_its_first_digits(stores: Stores) -> None:
    one, twin = (_image(stores, f"two@{digest}", digest) for digest in (ONE, TWIN))
    for digits in ("abcdef0123456", "sha256:abcdef0123456", ONE[7:-1], ONE):
        assert stores.images.get(f"two@{digits}").name == one
    with pytest.raises(InvalidArgument, match="begins 2 images"):
        stores.images.get("two@abcdef")
    for absent in ("two@0000", "three@abcdef0123456"):
        with pytest.raises(NotFound, match=f"no image {absent}"):
            stores.images.get(absent)
    assert stores.images.remove("two@abcdef0123456") == [one]
    assert [image.name for image in stores.images.walk()] == [twin]


def test_digests_are_found_by_any_beginning_and_no_more_than_asked_for(content: ContentStore):
    short = sorted([ONE, TWIN, OTHER, OF_LETTERS])
    assert content.beginning("", 100) == [*short, LONG]
    assert content.beginning("sha512:a", 100) == [LONG]
    assert content.beginning("sha256:", 2) == short[:2]
    assert content.beginning(ONE[:9], 100) == [ONE, TWIN]
    assert content.beginning(f"{ONE}0", 100) == []
