"""Pushes and copies: all of an image or nothing that has its name, and only what is not there."""

import json
import random
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from engine.app import Engine, open_engine
from engine.copying import copy_image
from engine.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Refused,
)
from engine.oci.digest import digest_of
from engine.oci.platform import Platform
from engine.oci.reference import parse_reference
from engine.progress import Step
from engine.registry.client import Access, open_client
from engine.registry.hosts import Capability, Host, Origin
from engine.registry.sending import Pushed
from engine.registry.uploading import Way
from engine.testing.archives import archive, member
from engine.testing.fake_registry import Asked, FakeRegistry, cut, reset, respond, response, stall
from engine.testing.taking_registry import TakingRegistry
from tests.command import LAMINA, lamina, lamina_json
from tests.engine.image_files import AMD64, ARM64, LAYER, MANIFEST, Document, Files
from tests.registry.asking import QUICK, with_client

HELLO = archive(member("hello", data=b"hello\n"))
BIG = archive(member("big", data=random.Random("big").randbytes(3 << 20)))
SOURCE = "source/app"


@pytest.fixture
def registry() -> Iterator[TakingRegistry]:
    with TakingRegistry().running() as running:
        yield running


@pytest.fixture
def source() -> Iterator[FakeRegistry]:
    with FakeRegistry().running() as running:
        yield running


def publish(registry: FakeRegistry, files: Files, entry: Document, repository: str = SOURCE) -> None:
    """Put the files of a layout into a repository, and tag one of them."""
    for name, data in files.files.items():
        if not name.startswith("blobs/"):
            continue
        kind, media_type = "blobs", "application/octet-stream"
        if data[:1] == b"{":
            document = json.loads(data)
            if {"manifests", "layers"} & document.keys():
                kind, media_type = "manifests", document.get("mediaType", MANIFEST)
        tag = "1" if digest_of(data) == entry["digest"] else ""
        registry.put(repository, kind, data, media_type, tag)


def in_store(root: Path, work: Callable[[Engine, Any], Any]) -> Any:
    async def run() -> Any:
        async with open_engine(root) as engine, open_client(Access(patience=QUICK)) as client:
            return await work(engine, client)

    return trio.run(run)


@pytest.fixture
def pull(tmp_path: Path, source: FakeRegistry) -> Callable[..., str]:
    """Pull what `source` has into the store, and return its name."""

    def pull(**options: Any) -> str:
        name = f"{source.name}/{SOURCE}:1"
        options = {"platform": Platform(**AMD64), **options}
        in_store(tmp_path / "root", lambda engine, client: engine.pull(name, client, **options))
        return name

    return pull


@pytest.fixture
def push(tmp_path: Path, registry: TakingRegistry) -> Callable[..., Pushed]:
    """Push from the store into the repository `team/app`."""

    def push(name: str, to: str = "team/app:1", **options: Any) -> Pushed:
        reference = f"{registry.name}/{to}"
        pushed = in_store(
            tmp_path / "root",
            lambda engine, client: engine.push(name, client, reference, **options),
        )
        assert isinstance(pushed, Pushed)
        return pushed

    return push


@pytest.fixture
def image(source: FakeRegistry, pull: Callable[..., str]) -> str:
    """The name of an image of two layers that is here."""
    files = Files()
    publish(source, files, files.image((HELLO, BIG), compression="gzip"))
    return pull()


def taken(registry: FakeRegistry, repository: str) -> dict[str, bytes]:
    """Return what a repository has, by its names within."""
    prefix = f"/{repository}/"
    found = registry.content.items()
    return {path.removeprefix(prefix): data for path, (_, data) in found if path.startswith(prefix)}


def asked(registry: FakeRegistry) -> list[str]:
    return [f"{one.method} {one.path}" for one in registry.asked]


def test_an_image_is_pushed_once(
    image: str, push: Callable[..., Pushed], registry: TakingRegistry, source: FakeRegistry
) -> None:
    steps: dict[str, list[int]] = {}

    def report(step: Step, item: str, _total: int, done: int) -> None:
        assert step is Step.PUSH
        steps.setdefault(item, []).append(done)

    pushed = push(image, report=report)
    assert taken(registry, "team/app") == taken(source, SOURCE)
    assert set(pushed.ways.values()) == {Way.SENT}
    assert pushed.bytes_sent == sum(map(len, taken(registry, "team/app").values())) - pushed.target.size
    assert all(done == sorted(done) and done[0] == 0 for done in steps.values())
    assert len(steps) == 3
    names = [name.rpartition("/")[2] for name in asked(registry) if name.startswith("PUT")]
    assert names[-1] == "1"  # the tag is put last
    assert asked(registry)[-2:] == ["HEAD /v2/team/app/manifests/1", "PUT /v2/team/app/manifests/1"]
    for _ in range(10):
        registry.asked.clear()
        assert set(push(image).ways.values()) == {Way.THERE}
        assert {one.method for one in registry.asked} == {"HEAD"}
        assert len(registry.asked) == 4


STAGES = ["HEAD .*/blobs/", "POST .*/uploads", "PATCH .*/uploads", "PUT .*/uploads", "PUT .*/manifests"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_push_that_fails_moves_no_tag_and_the_next_sends_the_rest(
    stage: str, image: str, push: Callable[..., Pushed], registry: TakingRegistry, tmp_path: Path
) -> None:
    before = ("x", b"what the tag meant before")
    registry.content["/team/app/manifests/1"] = before
    registry.plan(stage, respond(response(403)))
    with pytest.raises(PermissionDenied):
        push(image)
    assert registry.content["/team/app/manifests/1"] == before
    there = {path for path in taken(registry, "team/app") if path.startswith("blobs")}
    pushed = push(image)
    assert {f"blobs/{key}" for key, way in pushed.ways.items() if way is Way.THERE} == there
    assert registry.content["/team/app/manifests/1"][0] == MANIFEST
    assert lamina_json(tmp_path / "root", "leases", "ls") == []


def test_what_is_on_its_way_is_kept(
    image: str, push: Callable[..., Pushed], registry: TakingRegistry, tmp_path: Path
) -> None:
    def meanwhile(connection: socket.socket, _asked: Asked, _good: bytes) -> bool:
        collected = in_store(
            tmp_path / "root", lambda engine, _: engine.remove_image(image, collect=True)
        )
        assert not collected.blobs
        return reset()(connection, _asked, _good)

    registry.plan("PATCH", meanwhile)
    assert Way.SENT in push(image).ways.values()
    lamina(tmp_path / "root", "gc")
    assert lamina_json(tmp_path / "root", "content", "ls") == []


def test_a_digest_in_place_of_a_tag(
    image: str, push: Callable[..., Pushed], registry: TakingRegistry
) -> None:
    with pytest.raises(InvalidArgument, match="another digest"):
        push(image, f"team/app@{digest_of(b'another')}")
    assert not registry.asked
    target = push(image, "team/other:1").target
    push(image, f"team/app@{target.digest}")
    there = [name for name in taken(registry, "team/app") if name.startswith("manifests")]
    assert there == [f"manifests/{target.digest}"]


def test_a_host_that_names_another_digest_for_a_manifest(
    image: str, push: Callable[..., Pushed], registry: TakingRegistry
) -> None:
    wrong = {"Docker-Content-Digest": digest_of(b"another")}
    registry.plan("PUT .*/manifests", respond(response(201, headers=wrong)))
    with pytest.raises(Refused, match=r"where .* was sent"):
        push(image)
    registry.plan("PUT .*/manifests", respond(response(200, b"<html>")))
    with pytest.raises(Refused, match="not that it took it"):
        push(image)


# -- of several platforms ---------------------------------------------------------------------


@pytest.fixture
def index(source: FakeRegistry) -> Document:
    files = Files()
    one, other = files.image((HELLO,)), files.image((BIG,), config={**ARM64, "rootfs": _rootfs(BIG)})
    entries = [{**one, "platform": AMD64}, {**other, "platform": ARM64}]
    root = files.index(*entries, files.attestation(one))
    publish(source, files, root)
    return root


def _rootfs(layer: bytes) -> Document:
    return {"type": "layers", "diff_ids": [digest_of(layer)]}


def test_an_index_goes_whole(
    index: Document,
    pull: Callable[..., str],
    push: Callable[..., Pushed],
    registry: TakingRegistry,
    source: FakeRegistry,
) -> None:
    pushed = push(pull(all_platforms=True))
    assert pushed.target.digest == index["digest"]
    assert taken(registry, "team/app") == taken(source, SOURCE)


def test_of_an_index_that_is_here_in_part_one_platform_goes(
    index: Document, pull: Callable[..., str], push: Callable[..., Pushed], registry: TakingRegistry
) -> None:
    name = pull()
    with pytest.raises(FailedPrecondition, match=r"not here, linux/arm64, unknown/unknown; push one"):
        push(name)
    with pytest.raises(NotFound):
        push(name, platform=Platform(**ARM64))
    assert not registry.asked
    pushed = push(name, platform=Platform(**AMD64))
    assert pushed.target.digest != index["digest"]
    assert registry.content["/team/app/manifests/1"][0] == MANIFEST


def test_an_image_whose_layers_were_dropped(
    image: str, push: Callable[..., Pushed], registry: TakingRegistry, tmp_path: Path
) -> None:
    blobs = lamina_json(tmp_path / "root", "content", "ls")
    layer = max(blobs, key=lambda blob: blob["size"])["digest"]

    async def drop(engine: Engine, _client: Any) -> None:
        engine.stores.content.delete(layer)

    in_store(tmp_path / "root", drop)
    with pytest.raises(FailedPrecondition, match=f"not here whole .no blob {layer}.*--keep-blobs"):
        push(image)
    assert not registry.asked


def test_layers_that_are_not_to_be_distributed_stay(
    source: FakeRegistry, pull: Callable[..., str], push: Callable[..., Pushed], registry: TakingRegistry
) -> None:
    files = Files()
    (layer,) = files.layers((HELLO,))
    foreign = {
        **layer,
        "mediaType": LAYER.replace("layer.v1", "layer.nondistributable.v1"),
        "urls": ["https://owner.example/layer"],
    }
    publish(source, files, files.image((HELLO,), layers=[foreign]))
    pushed = push(pull())
    assert [one.digest for one in pushed.left_out] == [layer["digest"]]
    assert layer["digest"] not in pushed.ways
    assert f"blobs/{layer['digest']}" not in taken(registry, "team/app")


# -- mounts -----------------------------------------------------------------------------------


def test_what_the_registry_has_elsewhere_is_mounted(
    image: str, push: Callable[..., Pushed], registry: TakingRegistry, tmp_path: Path
) -> None:
    push(image, "team/base:1")
    push(image, "other/base:1")
    labels = [row["labels"] for row in lamina_json(tmp_path / "root", "content", "ls")]
    key = f"containerd.io/distribution.source.{registry.name}"
    assert [one.get(key) for one in labels] == ["team/base,other/base"] * 4
    registry.asked.clear()
    ways = push(image, "team/app:1").ways
    assert [*ways.values()].count(Way.MOUNTED) == 3
    assert registry.count("mount=.*&from=team/base$") == 3  # the nearest
    assert registry.count("PATCH|PUT .*/blobs") == 0


def test_what_was_pulled_is_mounted_in_the_same_registry(
    tmp_path: Path, registry: TakingRegistry, push: Callable[..., Pushed]
) -> None:
    files = Files()
    publish(registry, files, files.image((HELLO,)), "library/base")
    name = f"{registry.name}/library/base:1"
    in_store(tmp_path / "root", lambda engine, client: engine.pull(name, client))
    assert Way.SENT not in {*push(name).ways.values()} - {Way.MOUNTED} or registry.count("PATCH") == 0
    assert registry.count("mount=.*&from=library/base$") == 2


# -- what refers to it ------------------------------------------------------------------------


def signed(source: FakeRegistry) -> tuple[Document, Document]:
    """Publish an image and what refers to it; return the descriptors of both."""
    files = Files()
    subject = files.image((HELLO,))
    publish(source, files, subject)
    more = {
        "subject": subject,
        "artifactType": "example/signature",
        "annotations": {"by": "me"},
    }
    payload = [files.blob(b"signature", "example/payload")]
    signature = files.image(config={}, layers=payload, **more)
    publish(source, files, signature)
    tagged = json.dumps({"schemaVersion": 2, "manifests": [signature]}).encode()
    tag = subject["digest"].replace(":", "-")
    source.put(SOURCE, "manifests", tagged, "application/vnd.oci.image.index.v1+json", tag)
    publish(source, Files(), subject)
    source.content[f"/{SOURCE}/manifests/1"] = source.content[f"/{SOURCE}/manifests/{subject['digest']}"]
    return subject, signature


def copy(source: FakeRegistry, registry: FakeRegistry, to: str = "team/app:1", **options: Any) -> Pushed:
    here, there = f"{source.name}/{SOURCE}:1", f"{registry.name}/{to}"
    copied = with_client(lambda client: copy_image(client, here, there, **options))
    assert isinstance(copied, Pushed)
    return copied


@pytest.mark.parametrize("lists", [True, False])
def test_what_refers_to_an_image_is_copied_with_it(
    lists: bool, source: FakeRegistry, registry: TakingRegistry
) -> None:
    registry.lists_referrers = lists
    subject, signature = signed(source)
    copied = copy(source, registry, referrers=True)
    assert copied.target.digest == subject["digest"]
    assert signature["digest"] in copied.ways
    puts = [name.rpartition("/")[2] for name in asked(registry) if "PUT /v2/team/app/manifests" in name]
    tag = subject["digest"].replace(":", "-")
    assert puts == [subject["digest"], signature["digest"], *([] if lists else [tag]), "1"]
    there = parse_reference(f"{registry.name}/team/app:1")
    (listed,) = with_client(lambda client: client.referrers(there, subject["digest"]))
    assert listed.digest == signature["digest"]
    if not lists:
        assert (listed.artifact_type, listed.annotations) == ("example/signature", {"by": "me"})
    registry.asked.clear()
    assert set(copy(source, registry, referrers=True).ways.values()) == {Way.THERE}
    assert {one.method for one in registry.asked} == {"HEAD", "GET"}


def test_the_list_of_a_tag_is_added_to(source: FakeRegistry, registry: TakingRegistry) -> None:
    registry.lists_referrers = False
    subject, signature = signed(source)
    there = registry.put("team/app", "manifests", b"{}", MANIFEST)
    other = {"mediaType": MANIFEST, "digest": there, "size": 2, "artifactType": "b/c"}
    listed = json.dumps({"schemaVersion": 2, "manifests": [other]}).encode()
    tag = subject["digest"].replace(":", "-")
    registry.put("team/app", "manifests", listed, "application/vnd.oci.image.index.v1+json", tag)
    copy(source, registry, referrers=True)
    after = json.loads(registry.content[f"/team/app/manifests/{tag}"][1])["manifests"]
    assert after[0] == other
    assert [one["digest"] for one in after] == [other["digest"], signature["digest"]]


# -- copies -----------------------------------------------------------------------------------


def test_a_copy_is_the_same_and_made_once(
    index: Document, source: FakeRegistry, registry: TakingRegistry
) -> None:
    assert copy(source, registry).target.digest == index["digest"]
    assert taken(registry, "team/app") == taken(source, SOURCE)
    source.asked.clear()
    registry.asked.clear()
    assert set(copy(source, registry).ways.values()) == {Way.THERE}
    assert {one.method for one in registry.asked} == {"HEAD"}
    assert source.count("blobs") == 0


def test_a_copy_of_one_platform(index: Document, source: FakeRegistry, registry: TakingRegistry) -> None:
    copied = copy(source, registry, platform=Platform(**ARM64))
    assert copied.target.digest != index["digest"]
    assert f"blobs/{digest_of(HELLO)}" not in taken(registry, "team/app")
    with pytest.raises(NotFound, match="nothing for linux/s390x"):
        copy(source, registry, platform=Platform(os="linux", architecture="s390x"))


def test_a_copy_within_a_registry_moves_no_byte(registry: TakingRegistry) -> None:
    files = Files()
    publish(registry, files, files.image((HELLO, BIG)))
    copied = copy(registry, registry)
    assert [*copied.ways.values()].count(Way.MOUNTED) == 3
    assert registry.count("GET .*/blobs") == 0


def test_a_copy_goes_on_whoever_breaks_off(source: FakeRegistry, registry: TakingRegistry) -> None:
    files = Files()
    publish(source, files, files.image((BIG,)))
    layer = digest_of(BIG)
    source.plan(f"GET .*/blobs/{layer}", cut(100_000), times=3)
    registry.kept = 1 << 20
    registry.plan("PATCH", reset())
    copy(source, registry)
    assert registry.content[f"/team/app/blobs/{layer}"][1] == BIG


def test_a_copy_of_what_lies_has_no_name(source: FakeRegistry, registry: TakingRegistry) -> None:
    files = Files()
    publish(source, files, files.image((BIG,)))
    media_type, _ = source.content[f"/{SOURCE}/blobs/{digest_of(BIG)}"]
    source.content[f"/{SOURCE}/blobs/{digest_of(BIG)}"] = (media_type, BIG[:-1] + b"x")
    with pytest.raises(Refused, match="DIGEST_INVALID"):
        copy(source, registry)
    assert "manifests/1" not in taken(registry, "team/app")
    assert registry.count("PUT .*/manifests") == 0


def test_a_copy_of_an_index_with_holes(
    index: Document, source: FakeRegistry, registry: TakingRegistry
) -> None:
    arm = next(
        path
        for path, (_, data) in source.content.items()
        if "/manifests/sha256" in path and digest_of(BIG).encode() in data
    )
    del source.content[arm]
    with pytest.raises(NotFound, match="lists linux/arm64, which is not there"):
        copy(source, registry)
    assert not registry.asked
    copy(source, registry, platform=Platform(**AMD64))


def test_what_is_no_image_is_copied_too(source: FakeRegistry, registry: TakingRegistry) -> None:
    files = Files()
    chart = files.chart()
    publish(source, files, chart)
    assert copy(source, registry).target.digest == chart["digest"]


def test_the_host_that_takes_pushes(source: FakeRegistry, registry: TakingRegistry) -> None:
    files = Files()
    publish(source, files, files.image((HELLO,)))
    mirror, own = (Origin("http", "127.0.0.1", port) for port in (source.port, registry.port))
    reads = frozenset({Capability.PULL, Capability.RESOLVE})
    hosts = [Host(origin=mirror, capabilities=reads), Host(origin=own)]

    def pushed(hosts: list[Host]) -> None:
        access = Access(hosts=lambda _domain: hosts, patience=QUICK)
        words = ("example.org/source/app:1", "example.org/team/app:1")
        with_client(lambda client: copy_image(client, *words), access)

    pushed(hosts)
    assert {one.method for one in source.asked} == {"HEAD", "GET"}
    assert "manifests/1" in taken(registry, "team/app")
    with pytest.raises(FailedPrecondition, match=r"no host of example.org may be asked to push"):
        pushed(hosts[:1])


def test_a_push_that_is_cancelled_leaves_nothing_held(
    image: str, registry: TakingRegistry, tmp_path: Path
) -> None:
    async def work(engine: Engine, client: Any) -> None:
        token = trio.lowlevel.current_trio_token()

        def cancel(connection: socket.socket, asked: Asked, good: bytes) -> bool:
            token.run_sync_soon(scope.cancel)
            return stall()(connection, asked, good)

        registry.plan("PATCH", cancel)
        with trio.CancelScope() as scope:
            await engine.push(image, client, f"{registry.name}/team/app:1")
        assert scope.cancelled_caught
        assert not engine.stores.leases.walk()

    in_store(tmp_path / "root", work)
    assert "manifests/1" not in taken(registry, "team/app")


def test_a_push_that_is_killed_leaves_nothing_held(
    image: str, registry: TakingRegistry, tmp_path: Path
) -> None:
    root, there = tmp_path / "root", f"{registry.name}/team/app:1"
    children: list[subprocess.Popen[bytes]] = []

    def kill(_connection: socket.socket, _asked: Asked, _good: bytes) -> bool:
        children[0].kill()
        return False

    registry.plan("PATCH", kill)
    command = [*LAMINA, "--root", root, "push", image, there]
    children.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
    assert children[0].wait() == -signal.SIGKILL
    lamina(root, "image", "rm", "--gc", image)
    assert lamina_json(root, "content", "ls") == []
    assert "manifests/1" not in taken(registry, "team/app")


# -- the commands -----------------------------------------------------------------------------


def test_the_commands(image: str, tmp_path: Path, registry: TakingRegistry) -> None:
    root = tmp_path / "root"
    there = f"{registry.name}/team/app"
    done = lamina(root, "push", image, f"{there}:1")
    assert done.stdout == ""
    assert done.stderr.startswith(f"pushed {there}:1 (")
    assert done.stderr.endswith("): 4 sent, 3.1 MB\n")
    lamina(root, "image", "tag", image, f"{there}:2")
    assert lamina(root, "push", f"{there}:2").stderr.endswith("): 1 sent, 582 B, 3 there\n")
    shown = lamina_json(root, "push", f"{there}:2")
    assert (shown["name"], shown["bytes_sent"]) == (f"{there}:2", 0)
    assert {part["way"] for part in shown["parts"]} == {"there"}
    nowhere = tmp_path / "nowhere"
    done = lamina(nowhere, "copy", f"{there}:1", f"{registry.name}/team/other:1")
    assert done.stderr.endswith("): 1 sent, 582 B, 3 mounted\n")
    assert not nowhere.exists()
    assert lamina_json(nowhere, "copy", f"{there}:1", f"{there}:3")["digest"] == shown["digest"]


def test_the_commands_fail_in_one_line(image: str, tmp_path: Path, registry: TakingRegistry) -> None:
    root = tmp_path / "root"
    there = f"{registry.name}/team/app:1"
    for words, code, part in (
        (("push", "absent:1"), 3, "no image"),
        (("push", image, "UPPER CASE"), 2, "not an image reference"),
        (("push", image, there, "--platform", "linux/s390x"), 5, "s390x"),
        (("copy", there, there), 3, "has no"),
    ):
        done = lamina(root, *words, code=code)
        assert done.stderr.count("\n") == 1
        assert part in done.stderr
    registry.plan("PUT .*/manifests", respond(response(400)))
    assert "answered 400" in lamina(root, "push", image, there, code=5).stderr
