"""Pulls: whole, unpacked and named, or not at all; and gone on with by the next."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from socket import socket
from typing import Any

import pytest
import trio

from engine.app import Engine, open_engine
from engine.errors import DigestMismatch, EngineError, NotFound, Refused, Unavailable
from engine.kv.schema import EXTENT
from engine.oci.digest import digest_of
from engine.oci.platform import Platform
from engine.pulling import Pulled
from engine.registry.client import Access, open_client
from engine.registry.lanes import Lanes
from engine.testing.fake_registry import Asked, FakeRegistry, Fault, cut, reset, respond, response
from engine.unpack.jobs import ApplyJob, Arrived
from tests.command import dump, lamina, lamina_json
from tests.engine.image_files import AMD64 as ON_AMD64
from tests.engine.image_files import ARM64, DOCKER_LIST, INDEX
from tests.inline import workers_inline
from tests.registry.asking import QUICK, Served
from tests.registry.pulls import BIG, HELLO

pytestmark = pytest.mark.root


@pytest.fixture
def pull(tmp_path: Path, served: Served, umask_0: None) -> Iterator[Callable[..., Pulled]]:
    """Pull into one store, with workers in this process."""

    def pull(work: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        options = {"snapshotter": "overlay", "platform": Platform(**ON_AMD64), **options}

        async def run() -> Any:
            async with open_engine(tmp_path / "root") as engine:
                with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                    async with open_client(Access(patience=QUICK)) as client:
                        if work:
                            return await work(engine, client)
                        return await engine.pull(str(served.reference), client, **options)

        return trio.run(run)

    return pull


def state(root: Path) -> dict[str, Any]:
    return {name: rows for name, rows in dump(root).items() if name in {"images", "ingests"}}


def test_ms_07_an_image_is_pulled_once(
    pull: Callable[..., Pulled], served: Served, registry: FakeRegistry, tmp_path: Path
) -> None:
    pulled = pull()
    assert pulled.image.name == str(served.reference)
    assert pulled.image.target == served.manifest
    assert pulled.unpacked
    assert (pulled.unpacked.layers, pulled.unpacked.applied) == (2, 2)
    assert len(registry.asked) == 5
    registry.asked.clear()
    again = pull()
    assert again.unpacked
    assert again.unpacked.applied == 0
    assert len(registry.asked) == 1
    # Nothing is there but the image, and a collection takes none of it.
    assert lamina_json(tmp_path / "root", "gc")["blobs"] == []
    assert lamina_json(tmp_path / "root", "images")[0]["unpacked"]


def test_a_name_that_moved(pull: Callable[..., Pulled], served: Served, registry: FakeRegistry) -> None:
    first = pull()
    other = Served(registry, (HELLO,))
    registry.asked.clear()
    second = pull()
    assert (first.image.target, second.image.target) == (served.manifest, other.manifest)
    assert registry.count("blobs") == 1  # its config


STAGES = {
    "tag": "/manifests/1$",
    "manifest": "GET .*/manifests/sha256:",
    "blob": "GET .*/blobs/",
}
FAULTS: Sequence[tuple[str, Fault, type[EngineError]]] = [
    ("503", respond(response(503)), Unavailable),
    ("404", respond(response(404)), NotFound),
    ("reset", reset(), Unavailable),
    ("reset in the middle", reset(10), Unavailable),
    ("cut before the last byte", cut(-1), Unavailable),
    ("a login page", respond(response(200, b"<html>", {"Content-Type": "text/html"})), Refused),
]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("what", "fault", "kind"), FAULTS, ids=[row[0] for row in FAULTS])
def test_a_pull_that_fails_names_nothing_and_is_gone_on_with(  # noqa: PLR0917  a row, and fixtures
    stage: str,
    what: str,
    fault: Fault,
    kind: type[EngineError],
    pull: Callable[..., Pulled],
    served: Served,
    registry: FakeRegistry,
    tmp_path: Path,
) -> None:
    faulty = replace_forever(registry, STAGES[stage], fault)
    if what in {"reset in the middle", "cut before the last byte"} and stage != "manifest":
        kind = EngineError  # a tag's header has no body, a blob gets on by some bytes each time
    with suppress(EngineError) if kind is EngineError else pytest.raises(kind):
        pull()
        assert kind is EngineError
    found = dump(tmp_path / "root")
    if kind is not EngineError:
        assert not found["images"]
    faulty.clear()
    assert pull().image.target == served.manifest


def replace_forever(registry: FakeRegistry, stage: str, fault: Fault) -> list[Any]:
    registry.plan(stage, fault, times=100)  # which nobody asks so often, but where each gets on
    return registry._planned


def test_only_what_is_missing_is_fetched_after_a_failure(
    pull: Callable[..., Pulled], served: Served, registry: FakeRegistry, tmp_path: Path
) -> None:
    big = served.layers[1].digest
    registry.plan(big, cut(EXTENT + 10))
    registry.plan(big, reset(), times=100)
    with pytest.raises(Unavailable, match=registry.name):
        pull()
    (ingest,) = dump(tmp_path / "root")["ingests"]
    assert big in str(ingest)
    registry._planned.clear()
    registry.asked.clear()
    pull()
    assert [one.headers.get("range") for one in registry.asked if "blobs" in one.path] == [
        f"bytes={EXTENT + 10}-"
    ]


def test_up_09_a_layer_that_is_not_what_its_config_says(
    pull: Callable[..., Pulled], registry: FakeRegistry, tmp_path: Path
) -> None:
    lying = Served(registry, (HELLO, BIG))
    config = json.loads(registry.content[f"/a/blobs/{lying.config.digest}"][1])
    config["rootfs"]["diff_ids"][1] = digest_of(b"other")
    data = json.dumps(config).encode()
    digest = registry.put("a", "blobs", data, lying.config.media_type)
    manifest = json.loads(lying.data)
    manifest["config"] |= {"digest": digest, "size": len(data)}
    registry.put("a", "manifests", json.dumps(manifest).encode(), lying.manifest.media_type, "1")
    with pytest.raises(DigestMismatch):
        pull()
    assert not dump(tmp_path / "root")["images"]


@pytest.mark.parametrize("kind", [INDEX, DOCKER_LIST])
def test_a_platform_is_chosen(
    kind: str, pull: Callable[..., Pulled], served: Served, registry: FakeRegistry, tmp_path: Path
) -> None:
    entries = [
        {
            "mediaType": served.manifest.media_type,
            "digest": digest_of(b"x"),
            "size": 1,
            "platform": ARM64,
        },
        {
            "mediaType": served.manifest.media_type,
            "digest": served.manifest.digest,
            "size": served.manifest.size,
            "platform": ON_AMD64,
        },
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": entries}).encode()
    digest = registry.put("a", "manifests", index, kind, "1")
    assert pull().image.target.digest == digest
    assert lamina_json(tmp_path / "root", "gc")["blobs"] == []
    with pytest.raises(NotFound, match=r"nothing for linux/386; it has linux/amd64, linux/arm64"):
        pull(platform=Platform(os="linux", architecture="386"))


def test_pulls_at_once_share_layers(
    pull: Callable[..., Any], served: Served, registry: FakeRegistry
) -> None:
    async def work(engine: Engine, client: Any) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one, engine, client)

    async def one(engine: Engine, client: Any) -> None:
        name, platform = str(served.reference), Platform(**ON_AMD64)
        pulled = await engine.pull(name, client, snapshotter="overlay", platform=platform)
        assert pulled.image.target == served.manifest

    pull(work)
    for layer in served.layers:
        assert registry.count(layer.digest) == 1


def test_an_apply_that_waits_for_bytes_is_cancelled(tmp_path: Path, umask_0: None) -> None:
    # Of workers in this process too: else a test that has found a mistake hangs.
    scope = trio.CancelScope()

    async def more(_seen: int) -> Arrived:
        scope.cancel()
        await trio.sleep_forever()
        raise AssertionError

    async def run() -> None:
        async with open_engine(tmp_path / "root") as engine:
            stores = engine.stores
            lease = stores.leases.create().id
            target = stores.snapshotter("overlay")
            target.prepare("x", lease=lease)
            with stores.content.ingest("x", lease=lease, total=4 * EXTENT) as writer:
                writer.write(BIG[:EXTENT])
                number, there = writer.durable
                job = ApplyJob(
                    root=str(stores.root.path),
                    number=number,
                    arrived=Arrived(there, False),
                    diff_id=digest_of(b""),
                    target=target.sink("x"),
                )
                with workers_inline(pytest.MonkeyPatch(), stores.root), scope:
                    await engine._shop.pool.apply(job, lambda _read: None, more)
                assert scope.cancelled_caught

    trio.run(run)


# -- the command ----------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, registry: FakeRegistry, served: Served) -> None:
    root, name = tmp_path / "root", str(served.reference)
    done = lamina(root, "pull", "--platform", "linux/amd64", name)
    assert done.stderr.startswith(f"pulled {registry.name}/a:1 (")
    shown = lamina_json(root, "pull", "--platform", "linux/amd64", "--no-unpack", name)
    assert shown["images"][0]["digest"] == served.manifest.digest
    assert shown["unpacked"] == []
    (image,) = lamina_json(root, "images")
    assert image["name"] == name
    assert image["unpacked"]


def test_the_command_fails_in_one_line(tmp_path: Path, registry: FakeRegistry, served: Served) -> None:
    root = tmp_path / "root"
    for words, code, says in (
        ([f"{registry.name}/b:1"], 3, f"{registry.name} has no {registry.name}/b:1"),
        (["127.0.0.1:1/a"], 7, "127.0.0.1:1 cannot be reached"),
        (["A:B"], 2, "not an image reference"),
        ([f"{registry.name}/a@sha256:0"], 2, "digest"),
    ):
        done = lamina(root, "pull", *words, code=code)
        assert says in done.stderr
        assert done.stderr.count("\n") == 1


def test_bytes_a_second_of_a_command(
    tmp_path: Path, registry: FakeRegistry, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("pull", "--no-unpack", "--platform", "linux/amd64", str(served.reference))
    for text in ("0", "-1", "0.5", "x", "1T", "1 K", "1e6", "٣", ""):
        assert (
            "no number of bytes"
            in lamina(tmp_path / "root", *words, "--limit-rate", text, code=2).stderr
        )
    assert not registry.asked
    rates: list[float | None] = []

    def lanes(fetches: int | None, bandwidth: float | None) -> Lanes:
        rates.append(bandwidth)
        return Lanes(fetches)

    monkeypatch.setattr("engine.unpack.workshop.Lanes", lanes)
    for text in ("1", "500K", "2.5m", "1G"):
        lamina(tmp_path / "root", *words, "--limit-rate", text)
    assert rates == [1, 500 << 10, 2.5 * (1 << 20), 1 << 30]


def test_an_interrupted_pull_ends_in_one_line_and_is_gone_on_with(
    tmp_path: Path, registry: FakeRegistry, served: Served
) -> None:
    root, words = tmp_path / "root", ("pull", "--platform", "linux/amd64", str(served.reference))

    def interrupt(connection: socket, _asked: Asked, good: bytes) -> bool:
        os.kill(os.getpid(), signal.SIGINT)
        for start in range(0, len(good), 1000):  # whatever runs when it comes
            connection.sendall(good[start : start + 1000])
        return True

    for stage in STAGES.values():
        registry.plan(stage, interrupt)
        done = lamina(root, *words, code=130)
        assert done.stderr == "lamina: interrupted\n"
        registry._planned.clear()
    lamina(root, *words)
    assert lamina_json(root, "gc")["blobs"] == []


def test_credentials_and_mirrors_come_from_files(
    tmp_path: Path, registry: FakeRegistry, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.realm, registry.user, registry.password = "basic", "u", "s3cr3t"
    (tmp_path / "config.json").write_text(
        json.dumps({"auths": {registry.name: {"username": "u", "password": "s3cr3t"}}})
    )
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    folder = tmp_path / "hosts" / "r.example"
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'[host."http://{registry.name}"]')
    options = ("--platform", "linux/amd64", "--no-unpack", "--hosts-dir", folder.parent)
    lamina(tmp_path / "root", "pull", *options, "r.example/a:1")
    assert lamina_json(tmp_path / "root", "images")[0]["name"] == "r.example/a:1"
    assert all("ns=r.example" in one.target for one in registry.asked)


KILLED = (
    "pull.resolved=kill",
    "content.ingest.written=kill",
    "content.commit.before=kill@4",
    "pull.labelled=kill",
    "pull.named=kill",
)


@pytest.mark.crash
@pytest.mark.parametrize("where", KILLED)
def test_a_killed_pull_is_gone_on_with(
    where: str, tmp_path: Path, registry: FakeRegistry, served: Served
) -> None:
    root, name = tmp_path / "root", str(served.reference)
    words = ("pull", "--platform", "linux/amd64", "--no-unpack", name)
    lamina(root, *words, code=-signal.SIGKILL, failpoints=where)
    images = lamina_json(root, "images")
    assert bool(images) == where.startswith("pull.named")
    before = registry.count("blobs")
    # What came in outlasts a collection, too.
    lamina(root, "gc")
    lamina(root, *words)
    # The blob of the moment at most is asked for once more.
    assert registry.count("blobs") - before <= (
        2 if where.startswith("content") else 3 if where.startswith("pull.resolved") else 0
    )
    assert lamina_json(root, "images")[0]["digest"] == served.manifest.digest
    collected = lamina_json(root, "gc")
    assert collected["blobs"] == []
    left = dump(root)
    for table in ("ingests", "leases", "lease_items", "trash"):
        assert left[table] == [], table
