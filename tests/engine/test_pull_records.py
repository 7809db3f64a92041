"""Records of pulls that did not put their names yet."""

import pytest

from engine.metadata.leases import leased
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.stores import Stores
from tests.conftest import AMD64
from tests.engine.image_files import MANIFEST

NAME = "registry.example/a:1"


def test_of_other_leases_nothing_is_asked(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime may hold many thousands; a pull begins and ends with the writer's lock."""
    asked: list[str] = []
    alive = stores.root.meta.owners.is_alive

    def is_alive(name: str) -> bool:
        asked.append(name)
        return alive(name)

    stores.pulls.begin(f"{NAME}-other")
    with leased(stores.root.meta, stores.namespace):
        monkeypatch.setattr(stores.root.meta.owners, "is_alive", is_alive)
        stores.pulls.leave(stores.pulls.begin(NAME))
    assert not asked


def test_only_the_next_pull_of_the_same_name_goes_on(stores: Stores) -> None:
    with stores.content.ingest("x", lease="") as writer:
        writer.write(b"x")
        blob = writer.commit()
    lease = stores.pulls.begin(NAME)
    stores.pulls.note(lease, Descriptor(media_type=MANIFEST, digest=blob.digest, size=blob.size))
    stores.content.pin([digest_of(b"x")], lease)
    assert stores.pulls.begin(NAME) != lease  # which is at work
    stores.pulls.leave(lease)
    assert Stores(stores.root, "other", AMD64).pulls.begin(NAME) != lease
    assert stores.pulls.begin(f"{NAME}0") != lease
    assert stores.pulls.begin(NAME) == lease
    assert {pull.reference for pull in stores.pulls.walk()} == {NAME, f"{NAME}0"}
