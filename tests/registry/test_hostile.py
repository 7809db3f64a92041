"""What registries and images try that is none of the behaviours in the tables: each costs little."""

import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from engine import limits
from engine.content import closure
from engine.copying import copy_image
from engine.errors import NotFound, Refused
from engine.oci.digest import digest_of
from engine.oci.documents import Manifest, parse_artifact
from engine.registry.client import open_client
from engine.registry.connections import Connections, Peer
from engine.registry.hosts import Origin
from engine.testing.fake_registry import FakeRegistry, cut
from tests.command import lamina, lamina_json
from tests.engine.image_files import AMD64, ARM64, CONFIG, INDEX, MANIFEST
from tests.registry.asking import QUICK, Served, with_client
from tests.registry.pulls import access, engine_at

pytestmark = pytest.mark.root


def for_two_platforms(registry: FakeRegistry) -> str:
    """Serve an index of two images that have one layer, and return its name."""
    one = Served(registry)
    config = json.loads(registry.content[f"/a/blobs/{one.config.digest}"][1]) | ARM64
    manifest = json.loads(one.data)
    manifest["config"] = _put(registry, "blobs", config, CONFIG)
    other = _put(registry, "manifests", manifest, MANIFEST)
    mine = {"mediaType": MANIFEST, "digest": one.manifest.digest, "size": one.manifest.size}
    listed = [mine | {"platform": AMD64}, other | {"platform": ARM64}]
    _put(registry, "manifests", {"schemaVersion": 2, "manifests": listed}, INDEX, "two")
    return f"{registry.name}/a:two"


def _put(
    registry: FakeRegistry, kind: str, value: Any, media_type: str, tag: str = ""
) -> dict[str, Any]:
    data = json.dumps(value).encode()
    digest = registry.put("a", kind, data, media_type, tag)
    return {"mediaType": media_type, "digest": digest, "size": len(data)}


def test_a_layer_that_one_platform_let_go_of_is_fetched_for_another(
    tmp_path: Path, registry: FakeRegistry, umask_0: None
) -> None:
    name = for_two_platforms(registry)

    async def pull(**options: Any) -> None:
        async with engine_at(tmp_path) as engine, open_client(access()) as client:
            await engine.pull(name, client, snapshotter="overlay", keep_blobs=False, **options)

    trio.run(pull)
    lamina(tmp_path, "gc")
    trio.run(lambda: pull(all_platforms=True))
    lamina(tmp_path, "gc")
    (image,) = lamina_json(tmp_path, "images")
    assert "error" not in image
    lamina(tmp_path, "fsck")
    lamina(tmp_path, "unpack", name, "--platform", "linux/arm64", "--snapshotter", "overlay")


def with_another(registry: FakeRegistry, config: Any, media_type: str) -> str:
    """Serve an index of an image and of a manifest with some config, and return its name."""
    one = Served(registry)
    manifest = json.loads(one.data) | {"config": _put(registry, "blobs", config, media_type)}
    mine = {"mediaType": MANIFEST, "digest": one.manifest.digest, "size": one.manifest.size}
    listed = [mine | {"platform": AMD64}, _put(registry, "manifests", manifest, MANIFEST)]
    _put(registry, "manifests", {"schemaVersion": 2, "manifests": listed}, INDEX, "two")
    return f"{registry.name}/a:two"


ALL = ("--all-platforms", "--no-unpack", "--platform", "linux/amd64")


def test_what_an_index_lists_beside_images_is_no_damage(tmp_path: Path, registry: FakeRegistry) -> None:
    name = with_another(registry, {}, "application/vnd.cncf.helm.config.v1+json")
    lamina(tmp_path, "pull", name, *ALL)
    (image,) = lamina_json(tmp_path, "images")
    assert (image["platforms"], "error" in image) == (["linux/amd64"], False)
    lamina(tmp_path, "fsck")


def test_all_platforms_are_images_or_none_is_pulled(tmp_path: Path, registry: FakeRegistry) -> None:
    config = {**ARM64, "rootfs": {"type": "layers", "diff_ids": list[str]()}}
    name = with_another(registry, config, CONFIG)
    assert "names 0 diff IDs" in lamina(tmp_path, "pull", name, *ALL, code=5).stderr
    assert lamina_json(tmp_path, "images") == []
    lamina(tmp_path, "fsck")


def test_one_config_of_many_manifests_is_not_parsed_for_hours(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "DOCUMENTS", 200_000)
    layers = json.loads(Served(registry).data)["layers"]
    config = json.loads(next(data for kind, data in registry.content.values() if kind == CONFIG))
    shared = _put(registry, "blobs", config | {"history": ["x"] * 5000}, CONFIG)
    manifests = [
        _put(registry, "manifests", _manifest(shared, layers) | {"x": number}, MANIFEST)
        | {"platform": AMD64}
        for number in range(20)
    ]
    _put(registry, "manifests", {"schemaVersion": 2, "manifests": manifests}, INDEX, "many")
    done = lamina(tmp_path, "pull", f"{registry.name}/a:many", *ALL, code=5)
    assert "leads to over 200000 bytes of documents" in done.stderr


def _manifest(config: dict[str, Any], layers: list[dict[str, Any]]) -> dict[str, Any]:
    return {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}


def refer(registry: FakeRegistry, subject: str, *referring: dict[str, Any]) -> None:
    """List what refers to a manifest."""
    data = json.dumps({"schemaVersion": 2, "manifests": referring}).encode()
    registry.content[f"/a/referrers/{subject}"] = (INDEX, data)


def copied(registry: FakeRegistry) -> None:
    """Copy with all that refers to the image, to nobody."""
    name = f"{registry.name}/a:1"
    with_client(lambda client: copy_image(client, name, f"{registry.name}/b", referrers=True))


def test_what_refers_to_what_refers_is_read_once(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(registry)
    last = {"mediaType": MANIFEST, "digest": served.manifest.digest, "size": served.manifest.size}
    for _ in range(6):
        value = {**json.loads(served.data), "subject": last}
        after = _put(registry, "manifests", value, MANIFEST)
        refer(registry, last["digest"], after)
        last = after
    refer(registry, last["digest"], last)  # and in a circle
    parsed: list[str] = []

    def parse(data: bytes, media_type: str, what: str) -> Manifest:
        parsed.append(what)
        return parse_artifact(data, media_type, what)

    monkeypatch.setattr(closure, "parse_artifact", parse)
    with pytest.raises(NotFound):
        copied(registry)
    assert len(parsed) == len(set(parsed)) == 7
    assert registry.count("/referrers/") == 7


def test_nobody_is_asked_for_more_once_too_much_refers(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REFERRERS", 4)
    served = Served(registry)
    listed = []
    for at in range(3):
        document = _put(registry, "manifests", json.loads(served.data) | {"x": at}, MANIFEST)
        many = [{**document, "digest": digest_of(b"%d %d" % (at, one))} for one in range(3)]
        refer(registry, document["digest"], *many)
        listed.append(document)
    _put(registry, "manifests", {"schemaVersion": 2, "manifests": listed}, INDEX, "1")
    with pytest.raises(Refused, match="over 4 manifests refer"):
        copied(registry)
    assert registry.count("/referrers/") == 2


def test_hosts_that_others_name_take_no_connections_with_them(
    registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HOSTS", 3)
    here = Origin("http", "127.0.0.1", registry.port)
    # Each was named by another, and so has connections of its own.
    peers = [Peer(here, named_by=f"127.0.0.{number}") for number in range(2, 9)]

    async def run() -> None:
        connections = Connections(QUICK)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(connections.aclose)
            async with connections.exchange(peers[0], "GET", f"{here}/v2/", {}) as in_use:
                for peer in peers[1:]:
                    async with connections.exchange(peer, "GET", f"{here}/v2/", {}) as answer:
                        await answer.whole(1000, "it")
                assert await in_use.whole(1000, "it")
            assert [*connections._pools] == [peers[0], *peers[-2:]]

    trio.run(run)


def test_an_index_of_ever_more_blobs_is_refused(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INDEX_BLOBS", 2)
    name = with_another(
        registry, {**ARM64, "rootfs": {"type": "layers", "diff_ids": list[str]()}}, CONFIG
    )
    assert "over 2 blobs" in lamina(tmp_path, "pull", name, *ALL, code=5).stderr
    assert registry.count("blobs/") == 1


def test_a_blob_that_breaks_off_after_each_byte_is_given_up(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    served = Served(registry)
    registry.plan(served.layers[0].digest, cut(1), times=50)
    words = ("pull", "--no-unpack", "--platform", "linux/amd64", served.reference)
    lamina(tmp_path, *words, code=7)
    assert registry.count(served.layers[0].digest) <= limits.ATTEMPTS
