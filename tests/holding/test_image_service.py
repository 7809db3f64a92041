"""Images as the CRI sees them: one for each config, listed once they can be run, removed by rules."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from engine import labels
from engine.errors import InvalidArgument, NotFound, Refused
from engine.images.facts import ImageFacts, KnownImage
from engine.images.occupied import CONTENT
from engine.images.service import ImageService
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform
from engine.progress import Step
from engine.stores import Stores
from engine.testing.fake_registry import respond, response, stall
from tests.engine.image_files import ARM64, INDEX, MANIFEST
from tests.holding.scene import Desk, Scene, assert_complete, assert_empty
from tests.meddling import meddled

pytestmark = pytest.mark.root


async def pull(desk: Desk, tag: str) -> str:
    return await desk.service.pull(desk.scene.name(tag), desk.client)


def test_cri_01_a_name_is_known_in_full(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        await pull(desk, "one")
        target = desk.stores.images.get(scene.name("one")).target
        desk.stores.images.put_all({"busybox": target})
        for text in ("busybox", "busybox:latest", "docker.io/library/busybox"):
            known = await desk.service.status(text)
            assert known
            assert "docker.io/library/busybox:latest" in known.repo_tags

    scene.run(work)


def test_cri_02_what_is_no_name_is_quoted(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        with pytest.raises(InvalidArgument, match="'A B' is not an image reference"):
            await desk.service.pull("A B", desk.client)
        for call in (desk.service.status, desk.service.remove, desk.service.sizes):
            with pytest.raises(InvalidArgument, match="'A B' is not an image reference"):
                await call("A B")

    scene.run(work)


def test_cri_03_an_image_is_its_config(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        image = await pull(desk, "one")
        assert image == scene.ids["one"]
        target = scene.targets["one"]
        asked = (image, image[7:], image[:20], image[7:19], target, target[7:19], scene.name("one"))
        for text in (*asked, f"{scene.registry.name}/a@{target}"):
            known = await desk.service.status(text)
            if "/a@" in text:
                assert known is None  # nobody pulled it by that name
            else:
                assert known
                assert (known.id, known.target) == (image, target)
        # A layer's digest is no image's.
        layers = json.loads(scene.registry.content[f"/a/manifests/{target}"][1])["layers"]
        for text in (layers[0]["digest"], "sha256:" + "0" * 64, "absent", "absent@0123"):
            assert await desk.service.status(text) is None

    scene.run(work)


def test_cri_04_names_are_sets(scene: Scene) -> None:
    """Under a second name it is no second image, and a second time nothing changes."""
    scene.serve("same", "one")

    async def work(desk: Desk) -> None:
        assert await pull(desk, "one") == await pull(desk, "same") == await pull(desk, "one")
        (known,) = await desk.service.walk()
        assert known.repo_tags == (scene.name("one"), scene.name("same"))
        assert known.repo_digests == (f"{scene.registry.name}/a@{scene.targets['one']}",)

    scene.run(work)


def test_cri_04_one_config_in_two_manifests_is_one_image(scene: Scene) -> None:
    scene.serve("packed", "one", compression="zstd")

    async def work(desk: Desk) -> None:
        assert await pull(desk, "one") == await pull(desk, "packed")
        assert scene.targets["one"] != scene.targets["packed"]
        (known,) = await desk.service.walk()
        assert known.repo_tags == (scene.name("one"), scene.name("packed"))
        assert len(known.repo_digests) == 2
        other = await desk.service.status(scene.name("packed"))
        assert other
        assert other.target == scene.targets["packed"]
        # By one's name it loses that, by its ID all.
        assert await desk.service.remove(scene.name("one")) == [scene.name("one")]
        assert (await desk.service.status(known.id) or known).repo_tags == (scene.name("packed"),)
        await pull(desk, "one")
        assert len(await desk.service.remove(known.id)) == 2
        await desk.later()
        assert_empty(desk.stores)

    scene.run(work)


def test_cri_05_by_digest_it_has_no_tag(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        name = f"{scene.registry.name}/a@{scene.targets['one']}"
        assert await desk.service.pull(name, desk.client) == scene.ids["one"]
        (known,) = await desk.service.walk()
        assert (known.repo_tags, known.repo_digests) == ((), (name,))
        await pull(desk, "one")
        (known,) = await desk.service.walk()
        assert (known.repo_tags, known.repo_digests) == ((scene.name("one"),), (name,))
        assert await desk.service.remove(name) == [name]
        (known,) = await desk.service.walk()
        assert known.repo_tags == (scene.name("one"),)

    scene.run(work)


def test_cri_06_12_pulls_and_removals_at_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they come between each other's steps: as if one had been after the other."""

    async def work(desk: Desk) -> None:
        stores, name, outcomes = desk.stores, scene.name("one"), set()
        facts = ImageFacts(stores)
        for moment in range(0, 200, 3):
            if moment % 2:
                await pull(desk, "one")  # else it is pulled for the first time

            def meddle(at: int, moment: int = moment) -> None:
                if at == moment:
                    facts.remove(scene.ids["one"])
                    stores.collect()

            with meddled(monkeypatch, stores.root.meta, meddle) as passed:
                anew = ImageService(desk.engine, "overlay")  # which remembers nothing
                assert await anew.pull(name, desk.client) == scene.ids["one"]
            known = await desk.service.status(name)
            if known:
                assert_complete(stores, known.id)
            outcomes.add(known is not None)
            await desk.service.remove(scene.ids["one"], collect=True)
            assert_empty(stores)
            if moment >= len(passed):
                break
        assert outcomes == {True, False}

    scene.run(work)


def test_cri_07_layers_and_diff_ids_have_to_agree(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        with pytest.raises(Refused, match="names 1 diff IDs, its manifest 2 layers"):
            await pull(desk, "bad")
        assert scene.registry.count("blobs") == 1  # its config
        assert await desk.service.walk() == []

    scene.serve("bad", rootfs={"type": "layers", "diff_ids": ["sha256:" + "0" * 64]})
    scene.run(work)


def test_cri_08_it_is_listed_once_it_can_be_run(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        await desk.engine.pull(scene.name("one"), desk.client)
        assert await desk.service.walk() == []
        assert await desk.service.status(scene.ids["one"]) is None
        assert [known.is_ready for known in ImageFacts(desk.stores).walk()] == [False]
        await desk.engine.unpack(scene.name("one"), snapshotter="overlay")
        (known,) = await desk.service.walk()
        assert known.unpacked == ("overlay",)
        # Somebody removes what it was unpacked into.
        backend = desk.stores.snapshotter("overlay")
        for info in sorted(backend.walk(), key=lambda info: bool(info.parent), reverse=True):
            if info.parent:
                backend.remove(info.key)
        assert await desk.service.walk() == []
        # It may be removed, and pulled anew.
        assert await pull(desk, "one") == known.id
        assert await desk.service.walk() == [known]
        assert await desk.service.remove(known.id) == [scene.name("one")]

    scene.run(work)


def test_cri_08_nothing_is_listed_while_it_is_pulled(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        seen: list[list[KnownImage]] = []
        facts = ImageFacts(desk.stores)

        def report(*_told: Any) -> None:
            seen.append(facts.walk())

        await desk.service.pull(scene.name("one"), desk.client, report=report)
        assert seen
        assert not any(seen)

    scene.run(work)


def test_cri_17_pinned_images(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        await pull(desk, "one")
        desk.stores.images.label({labels.PINNED: labels.PINNED_VALUE}, scene.name("one"))
        (known,) = await desk.service.walk()
        assert known.pinned
        assert await desk.service.remove(known.id)  # only policies leave it alone

    scene.run(work)


def test_cri_09_a_layer_that_is_not_there_fails_the_pull_at_once(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        layers = json.loads(_manifest(scene, "one"))["layers"]
        scene.registry.plan(layers[1]["digest"], respond(response(404)), times=100)
        with pytest.raises(NotFound):
            await pull(desk, "one")
        assert scene.registry.count(layers[1]["digest"]) == 1
        assert await desk.service.walk() == []

    scene.run(work)


def test_cri_10_13_a_pull_that_is_cancelled_leaves_nothing_to_see(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        layers = json.loads(_manifest(scene, "one"))["layers"]
        scene.registry.plan(layers[0]["digest"], stall(10))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, desk, "one")
            await scene.asked(layers[0]["digest"])
            nursery.cancel_scope.cancel()
        assert await desk.service.walk() == []
        assert not desk.stores.images.walk()
        assert await pull(desk, "one") == scene.ids["one"]

    scene.run(work)


def test_cri_11_progress_is_told_for_each_part(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        told: dict[str, tuple[int, int]] = {}

        def report(step: Step, item: str, total: int, done: int) -> None:
            if step is Step.FETCH:
                assert told.get(item, (0, 0))[1] <= done <= total
                told[item] = (total, done)

        await desk.service.pull(scene.name("one"), desk.client, report=report)
        layers = json.loads(_manifest(scene, "one"))["layers"]
        sizes = {layer["digest"]: (layer["size"], layer["size"]) for layer in layers}
        assert {item: told[item] for item in sizes} == sizes

    scene.run(work)


@pytest.mark.parametrize(
    ("user", "uid", "username"),
    [
        (None, None, ""),
        ("", None, ""),
        ("1000", 1000, ""),
        ("0:5", 0, ""),
        ("www-data", None, "www-data"),
        ("www-data:www", None, "www-data"),
        ("9" * 30, None, "9" * 30),
        ("٣", None, "٣"),
        (7, None, ""),
        (["a"], None, ""),
    ],
)
def test_the_user_of_an_image(
    stores: Stores, tmp_path: Path, user: Any, uid: int | None, username: str
) -> None:
    known = _brought_in(stores, {"config": {"User": user}})
    assert (known.uid, known.username) == (uid, username)


def _brought_in(stores: Stores, config: dict[str, Any], name: str = "a") -> KnownImage:
    """Put an image without layers into a store, and return what there is to say of it."""
    value = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers"}, **config}
    about = _put(stores, json.dumps(value).encode(), "application/vnd.oci.image.config.v1+json")
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": about, "layers": []}
    refers = {f"{labels.GC_REF_CONTENT}.config": about["digest"]}
    target = _put(stores, json.dumps(document).encode(), MANIFEST, refers)
    found = Descriptor(media_type=MANIFEST, digest=target["digest"], size=target["size"])
    stores.images.put_all({name: found})
    known = ImageFacts(stores).find(name)
    assert known
    return known


def _put(
    stores: Stores, data: bytes, media_type: str, about: dict[str, str] | None = None
) -> dict[str, Any]:
    with stores.content.ingest(f"test {hash(data)}", lease="") as writer:
        writer.write(data)
        digest = writer.commit(about or {}).digest
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def test_an_image_without_layers_can_be_run_at_once(stores: Stores) -> None:
    known = _brought_in(stores, {})
    assert known.is_ready
    assert known.unpacked == ()
    assert known.size > 0


def test_digits_that_begin_several_are_told(stores: Stores) -> None:
    """Of four digits, some of many images' IDs begin alike."""
    found: dict[str, str] = {}
    for number in range(2000):
        known = _brought_in(stores, {"author": str(number)}, f"a{number}")
        other = found.setdefault(known.id[7:11], known.id)
        if other != known.id:
            break
    facts = ImageFacts(stores)
    with pytest.raises(InvalidArgument, match="begins 2 images"):
        facts.find(known.id[7:11])
    with pytest.raises(InvalidArgument, match="begins 2 images"):
        facts.remove(known.id[7:11])
    assert facts.find(known.id[7:23]) == known


def test_of_an_index_the_image_for_this_machine_counts(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        one, two = (
            {"mediaType": MANIFEST, "digest": scene.targets[tag], "size": size, "platform": platform}
            for tag, size, platform in (
                ("one", len(_manifest(scene, "one")), {"os": "linux", "architecture": "amd64"}),
                ("arm", len(_manifest(scene, "arm")), ARM64),
            )
        )
        index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [one, two]})
        target = scene.registry.put("a", "manifests", index.encode(), INDEX, "many")
        name = scene.name("many")
        await desk.engine.pull(name, desk.client, snapshotter="overlay", all_platforms=True)
        (known,) = await desk.service.walk()
        assert (known.id, known.target) == (scene.ids["one"], target)
        assert await desk.service.status(scene.ids["arm"]) is None
        assert await desk.service.remove(scene.ids["arm"]) == []
        held = await desk.coordinator.acquire(
            name, "a", desk.client, platform=Platform(os="linux", architecture="arm64")
        )
        assert held.image == scene.ids["arm"]

    scene.serve("arm", **ARM64)
    scene.run(work)


def _manifest(scene: Scene, tag: str) -> bytes:
    return bytes(scene.registry.content[f"/a/manifests/{scene.targets[tag]}"][1])


def test_what_a_name_meant_stays_until_it_is_removed(scene: Scene) -> None:
    """Who was told an ID finds it, though the tag has moved since."""

    async def work(desk: Desk) -> None:
        old = await pull(desk, "one")
        under = f"{scene.registry.name}/a@{scene.targets['one']}"
        new = scene.serve("one", "another")
        assert await pull(desk, "one") == new
        await desk.later()
        known = await desk.service.status(old)
        assert known
        assert (known.repo_tags, known.repo_digests) == ((), (under,))
        assert_complete(desk.stores, old)
        assert await desk.service.remove(old) == [under]
        await desk.later()
        assert [one.id for one in await desk.service.walk()] == [new]
        assert await desk.service.remove(old) == []  # again: it is no error
        # What was put for an owner goes with him.
        await desk.service.remove(new, collect=True)
        held = await desk.acquire("two", "a")
        scene.serve("two", "yet another")
        await pull(desk, "two")
        await desk.coordinator.release(held.image, "a")
        await desk.later()
        assert await desk.service.status(held.image) is None

    scene.run(work)


def test_a_removal_takes_only_names(scene: Scene) -> None:
    """What an owner holds of it, or stands on it, is there until he leaves."""

    async def work(desk: Desk) -> None:
        image = await pull(desk, "one")
        await desk.coordinator.hold(image, "a")
        await desk.engine.prepare("root", scene.name("one"), snapshotter="overlay")
        assert await desk.service.remove(image, collect=True) == [scene.name("one")]
        assert await desk.service.walk() == []
        assert_complete(desk.stores, image)
        await desk.coordinator.release(image, "a")
        await desk.later()
        assert len(list(desk.stores.snapshotter("overlay").walk())) == 3
        await desk.engine.release("root")
        await desk.later()
        assert_empty(desk.stores)

    scene.run(work)


def test_sizes(scene: Scene) -> None:
    async def work(desk: Desk) -> None:
        for tag in ("one", "two"):
            await pull(desk, tag)
        one = await desk.service.sizes(scene.ids["one"])
        known = await desk.service.status(scene.ids["one"])
        assert known
        stored = sum(
            blob.size
            for blob in desk.stores.content.walk()
            if blob.digest not in {scene.ids["two"], scene.targets["two"]}
        )
        assert one.blobs == known.size < stored  # the other's own layer
        usage = [
            desk.stores.snapshotter("overlay").usage(info.key).size for info in _layers(desk, "one")
        ]
        assert one.unpacked == {"overlay": sum(usage)}
        assert one.exclusive + one.shared == one.blobs + sum(usage)
        assert one.shared > 0
        # It is what its removal frees.
        await desk.service.remove(scene.ids["one"])
        collected = await desk.engine.collect()
        assert collected.blob_bytes + collected.snapshot_bytes == one.exclusive
        with pytest.raises(NotFound):
            await desk.service.sizes(scene.ids["one"])

    scene.run(work)


def _layers(desk: Desk, tag: str) -> list[Any]:
    backend = desk.stores.snapshotter("overlay")
    found = desk.stores.resolve(desk.stores.images.get(desk.scene.name(tag)).target)
    return [backend.stat(key) for key in found.chain]


def test_p10_filesystems_are_what_du_says(scene: Scene, tmp_path: Path) -> None:
    """Content counts too (cri #881), each backend by itself, and what no record knows."""

    async def work(desk: Desk) -> None:
        await pull(desk, "one")
        await desk.engine.unpack(scene.name("one"), snapshotter="copy")
        (mount,) = await desk.engine.prepare("root", scene.name("one"), snapshotter="copy")
        (Path(mount.source) / "written").write_bytes(b"x" * 100_000)
        (scene.root / "snapshots/copy/999/fs").mkdir(parents=True)
        (scene.root / "snapshots/copy/999/fs/left").write_bytes(b"x" * 50_000)
        found = {place.name: place for place in await desk.service.filesystems()}
        assert found.keys() == {CONTENT, "overlay", "copy"}
        for name in ("overlay", "copy"):
            assert found[name].path == str(scene.root / "snapshots" / name)
            assert _du(Path(found[name].path)) == (found[name].bytes, found[name].inodes)
        size, inodes = _du(scene.root)
        assert sum(place.bytes for place in found.values()) == size
        assert sum(place.inodes for place in found.values()) == inodes
        assert found[CONTENT].bytes > 0

    scene.run(work)


def _du(folder: Path) -> tuple[int, int]:
    def said(*options: str) -> int:
        done = subprocess.run(["du", "-s", *options, folder], capture_output=True, check=True)
        return int(done.stdout.split()[0])

    return said("-B1"), said("--inodes")


def test_a_listing_reads_each_document_once(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """What documents say is remembered, what is there is looked at in one transaction for all."""
    for number in range(30):
        _brought_in(stores, {"author": str(number)}, f"a{number}")
    facts = ImageFacts(stores)
    with meddled(monkeypatch, stores.root.meta, lambda _at: None) as passed:
        first = facts.walk()
        reads = len(passed)
        assert facts.walk() == first
        assert len(passed) == reads + 2
        assert len(first) == 30
        # One of many is found without the others.
        assert facts.find(first[7].id) == first[7]
        assert len(passed) <= reads + 2 + 6
