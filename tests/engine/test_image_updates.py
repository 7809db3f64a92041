"""Names of images: made, changed by field paths, labelled and removed, as containerd has it."""

import pytest

from engine.errors import (
    AlreadyExists,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from engine.metadata.leases import leased
from engine.metadata.resources import Resource
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.stores import Stores
from tests.engine.image_files import MANIFEST, records

FULL = "docker.io/library/a:latest"


def blob(stores: Stores, data: bytes) -> Descriptor:
    with stores.content.ingest(f"put {digest_of(data)}", lease="") as writer:
        writer.write(data)
        writer.commit()
    return Descriptor(media_type=MANIFEST, digest=digest_of(data), size=len(data))


def test_an_image_is_made_once(stores: Stores) -> None:
    one, two = blob(stores, b"one"), blob(stores, b"two")
    image = stores.images.create("a", one, labels={"k": "v", "empty": ""})
    assert (image.name, image.target, image.labels) == (FULL, one, {"k": "v"})
    assert stores.images.get("a") == image
    for target in (one, two):
        with pytest.raises(AlreadyExists):
            stores.images.create("library/a", target)
    assert stores.images.walk() == [image]


@pytest.mark.parametrize(
    ("name", "changes", "error"),
    [
        ("Not A Name", {}, InvalidArgument),
        ("", {}, InvalidArgument),
        ("a", {"digest": "sha256:12"}, InvalidArgument),
        ("a", {"size": 0}, InvalidArgument),
        ("a", {"media_type": ""}, InvalidArgument),
        ("a", {"digest": digest_of(b"absent")}, NotFound),
    ],
)
def test_what_is_no_image_is_not_made(
    stores: Stores, name: str, changes: dict[str, object], error: type[EngineError]
) -> None:
    fields = {"media_type": MANIFEST, "digest": blob(stores, b"one").digest, "size": 3, **changes}
    wrong = Descriptor(**fields)  # type: ignore[arg-type]
    with pytest.raises(error):
        stores.images.create(name, wrong)
    with pytest.raises(InvalidArgument):
        stores.images.create("a", blob(stores, b"one"), labels={"k": "v" * 4096})
    image = stores.images.create("good", blob(stores, b"one"))
    if name == "a":
        with pytest.raises(error):
            stores.images.update("good", target=wrong, paths=["target"])
    assert stores.images.walk() == [image]


def test_an_update_is_of_the_fields_that_are_named(stores: Stores) -> None:
    one, two = blob(stores, b"one"), blob(stores, b"two")
    made = stores.images.create("a", one, labels={"k.x/y": "1", "l": "2"})
    wanted = {"k.x/y": "3", "l": "4", "m": "5"}

    def update(*paths: str) -> tuple[Descriptor, dict[str, str]]:
        image = stores.images.update("a", target=two, labels=wanted, paths=paths)
        assert image == stores.images.get("a")
        assert (image.name, image.created) == (FULL, made.created)
        assert image.updated >= made.updated
        return image.target, image.labels

    assert update("labels.k.x/y") == (one, {"k.x/y": "3", "l": "2"})
    assert update("labels.gone") == (one, {"k.x/y": "3", "l": "2"})
    assert update("target") == (two, {"k.x/y": "3", "l": "2"})
    assert update("labels") == (two, wanted)
    stores.images.update("a", target=one, labels={"k.x/y": ""}, paths=["labels.k.x/y", "labels.m"])
    assert stores.images.get("a").labels == {"l": "4"}
    assert update() == (two, wanted)
    assert stores.images.update("a", target=one).labels == {}
    for paths in (["name"], ["labels."], ["created"], ["target", "x"]):
        with pytest.raises(InvalidArgument, match="cannot be changed"):
            update(*paths)
    with pytest.raises(InvalidArgument, match="needs a target"):
        stores.images.update("a")
    with pytest.raises(NotFound):
        stores.images.update("absent", target=one)
    assert stores.images.get("a").target == one


def test_a_change_of_target_changes_what_is_kept(stores: Stores) -> None:
    one, two = blob(stores, b"one"), blob(stores, b"two")
    stores.images.create("a", one)
    stores.images.update("a", target=two, paths=["target"])
    assert stores.collect().blobs == [one.digest]


def test_labels_of_several_images_are_set_together(stores: Stores) -> None:
    one, two = blob(stores, b"one"), blob(stores, b"two")
    for name, target in (("a", one), ("b", one), ("c", two)):
        stores.images.create(name, target, labels={"drop": "1"})
    digits = two.digest[7:19]
    changed = stores.images.label({"drop": "", "new": "2"}, "a", digits, "library/a")
    assert [(image.name[-8:-7], image.labels) for image in changed] == [
        ("a", {"new": "2"}),
        ("c", {"new": "2"}),
    ]
    before = stores.images.walk()
    with pytest.raises(NotFound):
        stores.images.label({"x": "y"}, "b", "absent")
    with pytest.raises(FailedPrecondition, match=r"has 2 names \(a:latest, b:latest\); say which"):
        stores.images.label({"x": "y"}, one.digest)
    with pytest.raises(InvalidArgument):
        stores.images.label({"x": "y" * 4096}, "b")
    assert stores.images.walk() == before


def test_a_name_is_removed_only_while_it_means_what_was_seen(stores: Stores) -> None:
    one, two = blob(stores, b"one"), blob(stores, b"two")
    for name in ("a", "b"):
        stores.images.create(name, one)
    stores.images.update("b", target=two, paths=["target"])
    with pytest.raises(NotFound, match=f"image b:latest does not mean {one.digest} any more"):
        stores.images.remove("a", "b", target=one)
    assert len(stores.images.walk()) == 2
    stores.images.remove("a", target=one)
    stores.images.remove("b", target=two)
    assert stores.images.walk() == []


def test_a_name_that_expires_joins_the_lease_that_it_is_made_with(stores: Stores) -> None:
    target = blob(stores, b"one")
    expired = {"containerd.io/gc.expire": "2001-01-01T00:00:00Z"}
    with leased(stores.root.meta, "default") as lease:
        stores.images.create("a", target, labels=expired, lease=lease)
        stores.images.create("b", target, lease=lease)
        assert stores.leases.resources(lease) == [Resource("images", FULL)]
        stores.collect()
        assert len(stores.images.walk()) == 2
    stores.collect()
    assert [image.name for image in stores.images.walk()] == ["docker.io/library/b:latest"]
    with pytest.raises(FailedPrecondition):
        stores.images.create("c", target, labels=expired, lease="ended")
    assert len(records(stores)["images"]) == 1
