"""Promises of docs/security.md that no layer alone can break: labels, messages, the store's folder."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from engine.app import open_engine
from engine.content.image import resolve
from engine.diff.budget import Budget
from engine.diff.rules import Rules
from engine.diff.tar import TarReader
from engine.errors import EngineError, FailedPrecondition, PermissionDenied, Refused
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor, parse_config, parse_index, parse_manifest
from engine.oci.mediatypes import layer_compression
from engine.oci.platform import Platform
from engine.oci.reference import parse_reference
from engine.processes import Owners
from engine.root import Root
from engine.stores import Stores
from engine.testing.archives import archive, layout, member
from tests.conftest import AMD64
from tests.security.harness import D, F, H, S
from tests.support import apply_stack

# -- labels -----------------------------------------------------------------------------------

OTHER = digest_of(b"of someone else")
HOSTILE = {
    "containerd.io/gc.root": "evil",
    "containerd.io/gc.ref.content": OTHER,
    "containerd.io/gc.ref.content.x": OTHER,
    "containerd.io/gc.ref.snapshot.overlay": "evil",
    "containerd.io/gc.ref.image": "docker.io/library/evil:latest",
    "containerd.io/gc.bref.image": "docker.io/library/evil:latest",
    "containerd.io/gc.bref.content.x": OTHER,
    "containerd.io/gc.cond.snapshot.overlay": "usedat<1h|evil",
    "containerd.io/gc.cond.value-usedat": "2001-01-01T00:00:00Z",
    "containerd.io/gc.expire": "2001-01-01T00:00:00Z",
    "containerd.io/gc.flat": "true",
    "containerd.io/namespace.shareable": "true",
    "containerd.io/distribution.source.example.org": "evil/repository",
    "containerd.io/restart.loguri": "binary:///evil",
    "containerd.io/snapshot/uidmapping": "0:1000:65536",
    "containerd.io/snapshot/max-size": "1",
    "io.cri-containerd.image": "managed",
    "io.cri-containerd.pinned": "pinned",
    "containerd.io/uncompressed": OTHER,
    "containerd.io/snapshot.ref": "evil",
    "evil": "evil",
}


def with_annotations(folder: Path) -> Path:
    """Write every annotation and label that an image can have into a layout."""
    blobs = folder / "blobs" / "sha256"

    def rewrite(descriptor: dict[str, Any], change: Callable[[dict[str, Any]], None]) -> None:
        document = json.loads((blobs / descriptor["digest"][7:]).read_bytes())
        change(document)
        data = json.dumps(document).encode()
        (blobs / digest_of(data)[7:]).write_bytes(data)
        descriptor |= {"digest": digest_of(data), "size": len(data)}
        annotate(descriptor)

    def annotate(document: dict[str, Any]) -> None:
        document["annotations"] = {**HOSTILE, **document.get("annotations", {})}

    def change_config(config: dict[str, Any]) -> None:
        config["config"]["Labels"] = HOSTILE

    def change_manifest(manifest: dict[str, Any]) -> None:
        annotate(manifest)
        rewrite(manifest["config"], change_config)
        for layer in manifest["layers"]:
            annotate(layer)

    index = json.loads((folder / "index.json").read_bytes())
    annotate(index)
    for entry in index["manifests"]:
        rewrite(entry, change_manifest)
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.root
def test_l_01_to_l_04_nothing_of_an_image_becomes_a_label(tmp_path: Path) -> None:
    image = with_annotations(layout(tmp_path / "image", [archive(member("f")), archive(member("g"))]))

    async def main() -> None:
        async with open_engine(tmp_path / "root", platform=AMD64) as engine:
            (named,) = (await engine.import_image(image, snapshotter="overlay")).images
            stores = engine.stores
            resolved = stores.resolve(named.target)
            blobs = {blob.digest: blob.labels for blob in stores.content.walk()}
            layers = [layer.descriptor.digest for layer in resolved.layers]
            diff_ids, chain = resolved.config.diff_ids, resolved.chain
            config = resolved.manifest.config.digest
            ref = "containerd.io/gc.ref."
            assert blobs == {
                resolved.path[-1].digest: {
                    f"{ref}content.config": config,
                    **{f"{ref}content.l.{n}": digest for n, digest in enumerate(layers)},
                },
                config: {f"{ref}snapshot.overlay": chain[-1]},
                **{
                    digest: {"containerd.io/uncompressed": diff_id}
                    for digest, diff_id in zip(layers, diff_ids, strict=True)
                },
            }
            snapshots = {info.key: info.labels for info in stores.snapshotter("overlay").walk()}
            about = {
                name: {"containerd.io/snapshot.ref": name, "containerd.io/snapshot/diff-id": diff_id}
                for name, diff_id in zip(chain, diff_ids, strict=True)
            }
            about[chain[1]]["containerd.io/snapshot/parent-chain-id"] = chain[0]
            assert snapshots == about
            assert named.labels == {}
            assert stores.namespaces.get("default").labels == {}
            assert stores.leases.walk() == []
            # Nor does any of it keep anything.
            stores.images.remove(named.name)
            assert (await engine.collect()).errors == []
            assert not list(stores.content.walk())

    trio.run(main)


# -- messages ---------------------------------------------------------------------------------

ODD = "\x1b]0;owned\x07\x1b[31m\n\r\b\x00\u202e\u2028\ud7ff\uffff"
NAME = ODD.replace("\x00", "").encode() + b"\xff\x9b"


def _pax(key: bytes, value: bytes) -> dict[bytes, bytes]:
    return {key: value}


MEMBERS = {
    "too deep": [F((NAME + b"/") * 600)],
    "too long": [F(NAME * 50)],
    "too long, of a folder": [F(NAME * 50 + b"/x")],
    "ends in ..": [F(NAME + b"/..")],
    "below a file": [F(NAME), F(NAME + b"/x")],
    "below a file, deeper": [F(NAME + b"/" + NAME), F(NAME + b"/" + NAME + b"/x")],
    "target not there": [H(NAME, NAME)],
    "no target": [H(NAME, b"")],
    "target is a marker": [H(NAME, b".wh." + NAME)],
    "links in a circle": [S(NAME, NAME), F(NAME + b"/x")],
    "no link": [S(NAME, b"")],
    "long link": [S(NAME, NAME * 500)],
    "whiteout of nothing": [F(b".wh..wh." + NAME)],
    "whiteout of another type": [S(b".wh." + NAME, b"x")],
    "whiteout as a folder": [F(b".wh..wh." + NAME + b"/x")],
    "marker of another type": [D(NAME + b"/.wh..wh..opq")],
    "device 0:0": [member(NAME, "3")],
    "device out of range": [member(NAME, "3", device=(4096, 1))],
    "unknown type": [member(NAME, "\x1b")],
    "owner": [F(NAME, pax=_pax(b"uid", b"4294967295"))],
    "xattr": [F(NAME, pax=_pax(b"SCHILY.xattr.", b"x"))],
    "large xattr": [F(NAME, pax=_pax(b"SCHILY.xattr.user.x", b"x" * 70_000))],
    "capability": [F(NAME, pax=_pax(b"SCHILY.xattr.security.capability", b"x"))],
    "size without a body": [D(NAME, fields={124: b"00000000001\0"})],
    "mode": [F("x", fields={100: NAME[:8]})],
    "owner field": [F("x", fields={108: NAME[:8]})],
    "pax number": [F("x", pax=_pax(b"uid", NAME))],
    "pax time": [F("x", pax=_pax(b"mtime", NAME))],
    "root": [S(b"./" * 3, NAME)],
}


def check_message(error: EngineError) -> None:
    text = str(error)
    assert text.isprintable(), text
    assert len(text) < 700


@pytest.mark.root
@pytest.mark.usefixtures("umask_0")
def test_messages_escape_what_a_layer_says(stores: Stores) -> None:
    for about, members in MEMBERS.items():
        for name in ("overlay", "aufs"):
            with pytest.raises(EngineError) as caught:
                apply_stack(stores.snapshotter(name), [archive(*members)])
            check_message(caught.value)
            assert list(stores.snapshotter(name).walk()) == [], about


MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


def manifest(**changes: Any) -> bytes:
    config = {"mediaType": CONFIG, "digest": digest_of(b""), "size": 1}
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [], **changes}
    return json.dumps(document).encode()


DOCUMENTS: Mapping[str, Callable[[], object]] = {
    "digest": lambda: parse_manifest(
        manifest(layers=[{"mediaType": "x", "digest": ODD, "size": 1}]), MANIFEST
    ),
    "descriptor": lambda: Descriptor(media_type="x", digest=ODD, size=1).key,
    "media type": lambda: parse_manifest(manifest(), ODD),
    "media type of an index": lambda: parse_index(manifest(), ODD),
    "media type within": lambda: parse_manifest(manifest(mediaType=ODD), MANIFEST),
    "config type": lambda: parse_manifest(
        manifest(config={"mediaType": ODD, "digest": digest_of(b""), "size": 1}), MANIFEST
    ),
    "layer type": lambda: layer_compression(ODD),
    "repeated key": lambda: parse_manifest(b'{"\\u001b[31m": 1, "\\u001b[31m": 2}', MANIFEST),
    "another case": lambda: parse_manifest(manifest(LAYERS=ODD), MANIFEST),
    "wrong type": lambda: parse_manifest(manifest(layers=ODD), MANIFEST),
    "not JSON": lambda: parse_manifest(ODD.encode(), MANIFEST),
    "root file system": lambda: parse_config(
        json.dumps({"rootfs": {"type": ODD, "diff_ids": []}}).encode(), 0
    ),
    "diff ID": lambda: (
        parse_config(json.dumps({"rootfs": {"type": "layers", "diff_ids": [ODD]}}).encode(), 1).diff_ids
    ),
    "reference": lambda: parse_reference(ODD),
    "reference with a digest": lambda: parse_reference(f"a@{ODD}"),
}


@pytest.mark.parametrize("about", DOCUMENTS)
def test_messages_escape_what_a_document_says(about: str) -> None:
    with pytest.raises(EngineError) as caught:
        DOCUMENTS[about]()
    check_message(caught.value)


@pytest.mark.parametrize("field", ["os", "architecture", "variant", "os.version"])
@pytest.mark.parametrize("where", ["index", "config"])
def test_messages_escape_platforms(where: str, field: str) -> None:
    odd = {"os": "linux", "architecture": "amd64", field: ODD}
    plain = {"os": "linux", "architecture": "amd64"}
    config = json.dumps({**odd, "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    documents = {}

    def put(data: bytes, media_type: str) -> dict[str, Any]:
        documents[digest_of(data)] = data
        return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}

    entry = put(manifest(config=put(config, CONFIG)), MANIFEST)
    entry["platform"] = odd if where == "index" else plain
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}
    top = put(json.dumps(index).encode(), INDEX)
    target = Descriptor(media_type=INDEX, digest=top["digest"], size=top["size"])
    try:
        resolve(target, Platform(os="linux", architecture="amd64"), lambda d, _: documents[d.digest])
    except EngineError as error:
        check_message(error)
    else:
        assert field in {"variant", "os.version"}  # of which no one else has any


@pytest.mark.parametrize("kind", ["1", "2"])
@pytest.mark.parametrize("field", ["name", "link"])
def test_a_nul_that_a_reader_let_in_goes_no_further(kind: str, field: str) -> None:
    (entry,) = TarReader([archive(member("x", kind, link="y"))])
    spoilt = msgspec.structs.replace(entry, **{field: b"a\0b"})
    rules = Rules(Budget(), name_bytes=255, whiteout_names=True)
    with pytest.raises(Refused, match=r"without a name|overlong target|no target"):
        list(rules.operations([spoilt]))


# -- the store --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0, 0o077])
def test_what_a_process_at_work_makes_is_closed_to_others(tmp_path: Path, mask: int) -> None:
    os.umask(mask)
    with Root(tmp_path / "root") as root:
        assert root.owners.me
        for path in (root.path, *root.path.rglob("*")):
            mode = stat.S_IMODE(path.lstat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_a_fresh_root_was_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_late(path: Path, _mode: int) -> None:
        raise AssertionError(f"{path} was open until now")

    os.umask(0)
    monkeypatch.setattr(Path, "chmod", too_late)
    with Root(tmp_path / "root"):
        pass


@pytest.mark.root
@pytest.mark.parametrize("inside", ["snapshots", "trash", "owners", "meta.lmdb", "blobs.lmdb"])
def test_a_folder_of_another_user_within(tmp_path: Path, inside: str) -> None:
    with Root(tmp_path / "root"):
        pass
    os.chown(tmp_path / "root" / inside, 4242, 4242)
    with pytest.raises(FailedPrecondition, match="not a folder of lamina"):
        Root(tmp_path / "root")
    if inside != "owners":  # which nobody needs to read
        with pytest.raises(FailedPrecondition, match="not a folder of lamina"):
            Root(tmp_path / "root", readonly=True)


@pytest.mark.root
@pytest.mark.parametrize("readonly", [False, True])
def test_a_root_of_another_user_is_not_looked_into(tmp_path: Path, readonly: bool) -> None:
    with Root(tmp_path / "root"):
        pass
    os.chown(tmp_path / "root", 4242, -1)
    with pytest.raises(PermissionDenied, match="4242"):
        Root(tmp_path / "root", readonly=readonly)


def test_to_read_changes_no_mode(tmp_path: Path) -> None:
    with Root(tmp_path / "root"):
        pass
    (tmp_path / "root").chmod(0o750)
    with Root(tmp_path / "root", readonly=True):
        pass
    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o750


def test_two_processes_cannot_be_one_owner(tmp_path: Path) -> None:
    (tmp_path / "owners").mkdir()
    one, two = Owners(tmp_path / "owners"), Owners(tmp_path / "owners")
    name = one.me.id
    assert name != two.me.id
    assert two.is_alive(name)
    one.close()
    assert not two.is_alive(name)
    two.close()
