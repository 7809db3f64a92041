"""Images as other tools write them give the same tree as umoci unpacks from their OCI form."""

import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.testing.archives import archive, layout, member
from tests.command import lamina, lamina_json
from tests.compat.images import Tree, assert_same, our_tree, run, umoci_tree
from tests.conftest import peer
from tests.engine.image_files import Files

pytestmark = [pytest.mark.compat, pytest.mark.root]

NAME = "team/app:1"


def _layers() -> list[bytes]:
    base = [
        member("etc/", "5", mode=0o755),
        member("etc/name", data=b"lower\n", mode=0o600, uid=1000, gid=100),
        member("etc/hidden", data=b"not to be seen\n"),
        member("folder/", "5", mode=0o1777, mtime=1_234_567_890),
        member("folder/below", data=b"x" * 9000),
        member("linked", "1", link="folder/below"),
        member("symlink", "2", link="etc/name"),
    ]
    changes = [
        member("etc/name", data=b"upper\n", mode=0o4755),
        member("etc/.wh.hidden"),
        member("folder/", "5", mode=0o700),
        member("folder/.wh..wh..opq"),
        member("folder/only", data=b"left\n"),
        member("note", pax={b"SCHILY.xattr.user.note": b"kept", b"mtime": b"1234567890.123456789"}),
        member("pipe", "6"),
    ]
    return [archive(*base), archive(*changes), archive(member("last", data=b"layer\n"))]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return layout(tmp_path / "source", _layers())


def _compare(tmp_path: Path, image: Path, oci: Path) -> Tree:
    """Import what a tool wrote, through the command line, and compare it with umoci's tree."""
    root = tmp_path / "root"
    lamina(root, "import", "--name", NAME, "--snapshotter", "overlay", image)
    ours = our_tree(root, NAME, "overlay", tmp_path / "mnt")
    assert_same(ours, umoci_tree(oci, tmp_path / "umoci"), "umoci")
    return ours


# -- umoci ------------------------------------------------------------------------------------


def test_umoci_insert_ends_a_layer_without_padding(tmp_path: Path, source: Path):
    inserted = tmp_path / "inserted"
    inserted.write_bytes(b"x" * 700)
    run(peer("umoci"), "insert", "--image", f"{source}:latest", inserted, "/inserted")
    ours = _compare(tmp_path, source, source)
    assert b"inserted" in ours


# -- skopeo -----------------------------------------------------------------------------------

_FORMS = {
    "folder": "oci:{}:latest",
    "archive": "oci-archive:{}:latest",
    "docker archive": f"docker-archive:{{}}:docker.io/{NAME}",
    "dir": "dir:{}",
}


def _skopeo(source: Path, target: Path, form: str, *options: str) -> Path:
    command = (peer("skopeo"), "--insecure-policy", "copy", *options)
    run(*command, f"oci:{source}:latest", _FORMS[form].format(target))
    return target


@pytest.mark.parametrize("form", _FORMS)
def test_skopeo(tmp_path: Path, source: Path, form: str):
    tree = _compare(tmp_path, _skopeo(source, tmp_path / "copied", form), source)
    assert b"etc/name" in tree
    assert b"etc/hidden" not in tree


def test_skopeo_dir_in_dockers_form(tmp_path: Path, source: Path):
    _compare(tmp_path, _skopeo(source, tmp_path / "copied", "dir", "--format", "v2s2"), source)


@pytest.mark.parametrize("packer", ["xz", "bzip2"])
def test_archive_that_is_packed_and_comes_through_a_pipe(tmp_path: Path, source: Path, packer: str):
    file = _skopeo(source, tmp_path / "copied.tar", "archive")
    root = tmp_path / "root"
    run(peer(packer), "--keep", file)
    (packed,) = tmp_path.glob("copied.tar.*")
    with subprocess.Popen([peer(packer), "-dc", packed], stdout=subprocess.PIPE) as unpacked:
        lamina(root, "import", "--no-unpack", "--name", NAME, "-", stdin=unpacked.stdout)
    lamina(root, "import", "--no-unpack", "--name", NAME, packed)
    (entry,) = json.loads((source / "index.json").read_text())["manifests"]
    assert [row["digest"] for row in lamina_json(root, "images")] == [entry["digest"]]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_skopeo_packs_layers_anew(tmp_path: Path, compression: str):
    plain = layout(tmp_path / "plain", _layers(), compression="none")
    options = ("--dest-compress-format", compression)
    packed = _skopeo(plain, tmp_path / "packed", "folder", *options)
    types = {layer["mediaType"].rpartition("+")[2] for layer in _manifest(packed)["layers"]}
    assert types == {compression}
    _compare(tmp_path, packed, plain)


def test_skopeo_names_are_kept(tmp_path: Path, source: Path):
    lamina(tmp_path / "root", "import", _skopeo(source, tmp_path / "copied", "docker archive"))
    assert [row["name"] for row in lamina_json(tmp_path / "root", "images")] == [f"docker.io/{NAME}"]


def _manifest(image: Path) -> dict[str, list[dict[str, str]]]:
    (entry,) = json.loads((image / "index.json").read_text())["manifests"]
    digest = entry["digest"].removeprefix("sha256:")
    loaded: dict[str, list[dict[str, str]]] = json.loads((image / "blobs/sha256" / digest).read_text())
    return loaded


# -- docker save ------------------------------------------------------------------------------


def test_docker_save_as_it_is_today(tmp_path: Path, source: Path):
    # Both forms in one archive: manifest.json names the blobs of the OCI layout beside it.
    plain = layout(tmp_path / "plain", _layers(), compression="none")
    manifest = _manifest(plain)
    path = "blobs/sha256/" + str(manifest["config"]["digest"]).removeprefix("sha256:")  # type: ignore[call-overload]
    entry = {
        "Config": path,
        "RepoTags": [NAME],
        "Layers": [
            "blobs/sha256/" + layer["digest"].removeprefix("sha256:") for layer in manifest["layers"]
        ],
    }
    (plain / "manifest.json").write_text(json.dumps([entry]))
    file = tmp_path / "saved.tar"
    run("tar", "-C", plain, "-cf", file, "blobs", "index.json", "manifest.json", "oci-layout")
    _compare(tmp_path, file, source)


def test_docker_save_as_it_was_with_links_between_layers(tmp_path: Path, source: Path):
    # Old versions wrote one folder for each layer, and a symlink for a layer met before.
    file = _skopeo(source, tmp_path / "saved.tar", "docker archive")
    unpacked = tmp_path / "unpacked"
    with tarfile.open(file) as tar:
        names = {entry.name: entry.issym() for entry in tar}
        tar.extractall(unpacked, filter="fully_trusted")
    assert any(names.values()), "skopeo writes such links too"
    again = tmp_path / "again.tar"
    run("tar", "-C", unpacked, "-cf", again, *sorted(os.listdir(unpacked)))
    _compare(tmp_path, again, source)


# -- buildah ----------------------------------------------------------------------------------


@pytest.fixture
def buildah(tmp_path: Path) -> Callable[..., str]:
    """Run buildah with storage and settings of its own; no network, no daemon."""
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    registries = tmp_path / "registries.conf"
    registries.write_text("")
    program = peer("buildah")

    def call(command: str, *words: object) -> str:
        storage = ("--storage-driver", "vfs", "--root", tmp_path / "b", "--runroot", tmp_path / "br")
        # Only these commands ask for a policy.
        rules = ("--signature-policy", policy) if command in {"from", "commit"} else ()
        settings = ("--registries-conf", registries)
        environment = os.environ | {"TMPDIR": str(tmp_path), "STORAGE_DRIVER": "vfs"}
        done = run(program, *storage, *settings, command, *rules, *words, env=environment)
        return done.strip().splitlines()[-1] if done.strip() else ""

    return call


@pytest.mark.parametrize("form", ["oci", "docker-archive"])
def test_buildah(tmp_path: Path, buildah: Callable[..., str], form: str):
    files = tmp_path / "files"
    files.mkdir(mode=0o751)
    (files / "script").write_text("#!/bin/sh\n")
    (files / "script").chmod(0o755)
    (files / "link").symlink_to("script")
    (files / "twin").hardlink_to(files / "script")
    packed = tmp_path / "added.tar"
    packed.write_bytes(_layers()[0])
    first = buildah("from", "scratch")
    buildah("copy", first, files, "/opt/files")
    buildah("commit", first, "localhost/base")
    second = buildah("from", "--pull-never", "localhost/base")
    buildah("add", second, packed, "/")
    buildah("config", "--cmd", "/opt/files/script", second)
    # The same container twice: as umoci reads it, and in the form under test.
    buildah("commit", "--timestamp", "1600000000", second, f"oci:{tmp_path / 'oci'}:latest")
    image = tmp_path / "oci"
    if form != "oci":
        image = tmp_path / "saved.tar"
        buildah("commit", "--timestamp", "1600000000", second, f"{form}:{image}:{NAME}")
    tree = _compare(tmp_path, image, tmp_path / "oci")
    assert {b"opt/files/script", b"opt/files/link", b"etc/name", b"linked"} <= tree.keys()


@pytest.mark.parametrize("form", ["oci", "dir"])
def test_buildah_list_of_manifests(tmp_path: Path, source: Path, buildah: Callable[..., str], form: str):
    platform = {"architecture": "arm64", "os": "linux"}
    other = layout(tmp_path / "other", [archive(member("other"))], platform=platform)
    buildah("manifest", "create", "localhost/list")
    for image in (other, source):
        buildah("manifest", "add", "localhost/list", f"oci:{image}:latest")
    place = f"{form}:{tmp_path / 'pushed'}" + (":latest" if form == "oci" else "")
    buildah("manifest", "push", "--all", "localhost/list", place)
    _compare(tmp_path, tmp_path / "pushed", source)


def test_skopeo_copies_an_image_beside_a_chart(tmp_path: Path, source: Path):
    # skopeo copies what is no image, too, and writes it into the layout under its tag.
    files = Files()
    chart = files.tag(files.chart(), "chart").folder(tmp_path / "chart")
    both = _skopeo(source, tmp_path / "both", "folder")
    run(peer("skopeo"), "--insecure-policy", "copy", f"oci:{chart}:chart", f"oci:{both}:chart")
    done = lamina_json(tmp_path / "root", "import", "--no-unpack", both)
    assert [row["name"] for row in done["images"]] == ["docker.io/library/both:latest"]
    assert [row["name"] for row in done["passed_over"]] == ["chart"]
