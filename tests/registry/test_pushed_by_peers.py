"""What other tools push to a registry is pulled: digest for digest, tree for tree."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.oci.reference import parse_reference
from engine.testing.archives import archive, layout, member, tar_layout
from tests.command import lamina, lamina_json
from tests.compat.containerd import Containerd
from tests.compat.images import assert_same, our_tree, umoci_tree
from tests.engine.image_files import AMD64, ARM64, Files, config_of
from tests.registry.asking import with_client
from tests.registry.servers import Server, push

pytestmark = [pytest.mark.compat, pytest.mark.root]


def lower() -> bytes:
    return archive(
        member("etc/", "5", mode=0o750),
        member("etc/name", data=b"lower\n", uid=1000, gid=100),
        member("etc/gone", data=b"x"),
        member("linked", "1", link="etc/name"),
        member("symlink", "2", link="etc/name"),
    )


def upper() -> bytes:
    return archive(member("etc/name", data=b"upper\n", mode=0o4755), member("etc/.wh.gone"))


def image(folder: Path, kind: str) -> Path:
    """Write an image of a kind as an OCI layout; return it."""
    layers, compression = KINDS[kind]
    return layout(folder, layers, compression=compression)


KINDS = {
    "gzip": ([lower(), upper()], "gzip"),
    "zstd": ([lower(), upper()], "zstd"),
    "plain": ([lower(), upper()], "none"),
    "64-layers": ([lower(), *(archive(member(f"file{n}")) for n in range(63))], "gzip"),
    "a-layer-twice": ([upper(), lower(), upper()], "gzip"),
}


def assert_pulled(tmp_path: Path, name: str, digest: str, kind: str) -> None:
    """Pull, and compare the digest, the tree with what umoci unpacks, and what is kept with what is."""
    root = tmp_path / "root"
    (shown,) = lamina_json(root, "pull", "--snapshotter", "overlay", name)["images"]
    assert shown["digest"] == digest
    tree = our_tree(root, name, "overlay", tmp_path / "mnt")
    layers, _ = KINDS[kind]
    oracle = layout(tmp_path / "oracle", layers, compression="none")  # umoci knows no zstd
    assert_same(tree, umoci_tree(oracle, tmp_path / "umoci"), "umoci")
    assert lamina_json(root, "gc")["blobs"] == []


@pytest.mark.parametrize(("kind", "form"), [*((kind, "oci") for kind in KINDS), ("gzip", "v2s2")])
def test_skopeo(kind: str, form: str, tmp_path: Path, plain: Server) -> None:
    name = f"skopeo/{kind}-{form}:1"
    digest = push(image(tmp_path / "source", kind), plain, name, "--format", form)
    assert_pulled(tmp_path, f"{plain.name}/{name}", digest, kind)
    by_digest = f"{plain.name}/skopeo/{kind}-{form}@{digest}"
    shown = lamina_json(tmp_path / "root", "pull", "--no-unpack", by_digest)["images"]
    assert [row["name"] for row in shown] == [by_digest]


def test_no_layers(tmp_path: Path, plain: Server) -> None:
    source = layout(tmp_path / "source", [])
    digest = push(source, plain, "skopeo/scratch:1")
    root, name = tmp_path / "root", f"{plain.name}/skopeo/scratch:1"
    (image,) = lamina_json(root, "pull", "--snapshotter", "overlay", name)["images"]
    assert (image["digest"], image["layers"]) == (digest, 0)
    (tmp_path / "mnt").mkdir()
    lamina(root, "mount", "--snapshotter", "overlay", name, tmp_path / "mnt")
    try:
        assert os.listdir(tmp_path / "mnt") == []
    finally:
        lamina(root, "umount", tmp_path / "mnt")


def test_two_platforms(tmp_path: Path, plain: Server) -> None:
    files = Files()
    on_amd64 = files.image([lower(), upper()], compression="gzip")
    on_arm64 = files.image([lower()], compression="gzip", config={**config_of([lower()]), **ARM64})
    index = files.index({**on_amd64, "platform": AMD64}, {**on_arm64, "platform": ARM64})
    source = files.tag(index, "latest").folder(tmp_path / "source")
    digest = push(source, plain, "skopeo/both:1", "--all")
    assert digest == index["digest"]
    name = f"{plain.name}/skopeo/both:1"
    root = tmp_path / "root"
    for platform, gone in (("linux/amd64", False), ("linux/arm64", True)):
        done = lamina_json(root, "pull", "--platform", platform, "--snapshotter", "overlay", name)
        assert done["images"][0]["digest"] == digest
        assert gone in {False, not done["unpacked"][0]["applied"]}  # shares its only layer
    assert lamina_json(root, "gc")["blobs"] == []
    lamina(root, "fsck")


def test_what_is_no_image_and_what_refers_to_one(tmp_path: Path, plain: Server) -> None:
    files = Files()
    app = files.image([lower()], compression="gzip")
    source = files.tag(app, "latest").folder(tmp_path / "app")
    assert push(source, plain, "skopeo/signed:1") == app["digest"]
    more = Files()
    signature = more.signature(app)
    listed = more.tag(more.index(signature), "latest").folder(tmp_path / "listed")
    push(listed, plain, f"skopeo/signed:{app['digest'].replace(':', '-')}", "--all")
    reference = parse_reference(f"{plain.name}/skopeo/signed:1")

    # This registry has no list of its own: a tag stands for it.
    (found,) = with_client(lambda client: client.referrers(reference, app["digest"]))
    assert found.digest == signature["digest"]
    charts = Files()
    chart = charts.tag(charts.chart(), "latest").folder(tmp_path / "chart")
    push(chart, plain, "skopeo/chart:1")
    done = lamina(tmp_path / "root", "pull", f"{plain.name}/skopeo/chart:1", code=5)
    assert "is not a container image" in done.stderr
    assert lamina_json(tmp_path / "root", "images") == []


# -- podman and buildah -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["oci", "v2s2"])
@pytest.mark.parametrize("program", ["podman", "buildah"])
def test_podman_and_buildah(
    program: str, form: str, tmp_path: Path, plain: Server, storage: Callable[..., str]
) -> None:
    source, told = image(tmp_path / "source", "gzip"), tmp_path / "told"
    name = f"{plain.name}/{program}/{form}:1"
    found = storage(program, "pull", "-q", f"oci:{source}:latest").strip().splitlines()[-1]
    options = ("--tls-verify=false", "--format", form, "--digestfile", told)
    storage(program, "push", *options, found, f"docker://{name}")
    assert_pulled(tmp_path, name, told.read_text().strip(), "gzip")


# -- containerd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_ctr(kind: str, tmp_path: Path, plain: Server, containerd: Containerd) -> None:
    name = f"{plain.name}/ctr/{kind}:1"
    packed = tar_layout(image(tmp_path / "source", kind), tmp_path / "source.tar")
    containerd.ctr("images", "import", "--no-unpack", "--index-name", name, packed)
    containerd.ctr("images", "push", "--plain-http", name)
    (line,) = (line for line in containerd.ctr("images", "ls").splitlines() if line.startswith(name))
    assert_pulled(tmp_path, name, line.split()[2], kind)
