"""Every command does its work and shows it twice: as a table for people, as JSON for programs."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.oci.digest import digest_of
from engine.oci.identity import chain_ids
from engine.testing.archives import archive, docker_archive, layout, member, tar_layout
from tests.cli.conftest import BASE, CHANGES
from tests.command import LAMINA, dump, empty_store, lamina, lamina_json

pytestmark = pytest.mark.root

DIFF_IDS = [digest_of(BASE), digest_of(CHANGES)]
CHAIN = chain_ids(DIFF_IDS)


def _table(text: str) -> list[list[str]]:
    """Return the cells of a table, which two spaces or more part."""
    return [[cell for cell in map(str.strip, line.split("  ")) if cell] for line in text.splitlines()]


def _digests(image: Path) -> set[str]:
    return {f"sha256:{file.name}" for file in (image / "blobs" / "sha256").iterdir()}


# -- images -----------------------------------------------------------------------------------


def test_import_names_and_unpacks_an_image(tmp_path: Path, image: Path):
    done = lamina(tmp_path / "root", "import", image)
    assert done.stdout == ""
    assert done.stderr.startswith("imported app:1 (")
    (row,) = lamina_json(tmp_path / "root", "images")
    assert row["unpacked"] == {"overlay": CHAIN[-1]}


def test_import_tells_digests_as_json(tmp_path: Path, image: Path):
    manifest = json.loads((image / "index.json").read_text())["manifests"][0]["digest"]
    done = lamina_json(tmp_path / "root", "import", "--no-unpack", image)
    (row,) = lamina_json(tmp_path / "root", "images")
    assert list(done.pop("timings")) == ["fetch"]
    assert done == {"images": [row], "passed_over": [], "failed": [], "unpacked": []}
    assert (row["name"], row["digest"]) == ("docker.io/library/app:1", manifest)
    assert row["unpacked"] == {}


@pytest.mark.parametrize("form", ["layout", "oci archive", "docker archive"])
def test_import_tells_forms_apart_by_content(tmp_path: Path, image: Path, form: str):
    # A name that promises nothing.
    file = tmp_path / "download"
    if form == "layout":
        subprocess.run(["cp", "-a", image, file], check=True)
    elif form == "oci archive":
        tar_layout(image, file)
    else:
        docker_archive(file, [BASE, CHANGES], ["app:1"])
    lamina(tmp_path / "root", "import", "--name", "renamed:2", file)
    (row,) = lamina_json(tmp_path / "root", "images")
    assert row["name"] == "docker.io/library/renamed:2"
    assert row["unpacked"] == {"overlay": CHAIN[-1]}


def test_import_chooses_a_platform(tmp_path: Path):
    index = tmp_path / "many"
    for architecture in ("amd64", "s390x"):
        layer = archive(member(architecture))
        layout(index, [layer], tag="1", platform={"os": "linux", "architecture": architecture})
    root = tmp_path / "root"
    lamina(root, "import", "--platform", "linux/s390x", index)
    shown = lamina_json(root, "image", "inspect", "--platform", "linux/s390x", "many:1")
    assert shown["platform"] == "linux/s390x"
    assert shown["config"]["rootfs"]["diff_ids"] == [digest_of(archive(member("s390x")))]


def test_images_as_a_table_and_as_json(stocked: Path, image: Path):
    header, row = _table(lamina(stocked, "images").stdout)
    assert header == ["NAME", "DIGEST", "PLATFORM", "LAYERS", "SIZE", "UPDATED", "UNPACKED"]
    assert row[0] == "app:1"
    assert row[2:4] == ["linux/amd64", "2"]
    assert row[-1] == "overlay"
    (shown,) = lamina_json(stocked, "images")
    assert shown["name"] == "docker.io/library/app:1"
    assert shown["digest"] == row[1]
    files = (image / "blobs" / "sha256").iterdir()
    assert shown["size"] == sum(file.stat().st_size for file in files)
    assert shown["layers"] == 2


def test_an_empty_store_lists_nothing(tmp_path: Path):
    empty_store(tmp_path / "root")
    assert lamina_json(tmp_path / "root", "images") == []
    assert lamina_json(tmp_path / "root", "content", "ls") == []
    assert lamina_json(tmp_path / "root", "snapshots", "ls") == []
    done = lamina(tmp_path / "root", "images")
    assert (done.stdout, done.stderr) == ("", "no images; `lamina import PATH` brings some in\n")


def test_image_inspect(stocked: Path, image: Path):
    text = lamina(stocked, "image", "inspect", "app:1").stdout
    shown = lamina_json(stocked, "image", "inspect", "app:1")
    assert shown["chain_ids"] == CHAIN
    assert shown["config"]["rootfs"]["diff_ids"] == DIFF_IDS
    assert shown["unpacked"] == {"overlay": CHAIN[-1]}
    assert shown["digest"] in _digests(image)
    layers = [layer["digest"] for layer in shown["manifest"]["layers"]]
    for part in (*CHAIN, *layers, shown["manifest"]["config"]["digest"], "linux/amd64"):
        assert part in text


def test_image_tag_and_rm(stocked: Path):
    lamina(stocked, "image", "tag", "app:1", "example.org/team/app:stable")
    names = [row["name"] for row in lamina_json(stocked, "images")]
    assert names == ["docker.io/library/app:1", "example.org/team/app:stable"]
    lamina(stocked, "image", "rm", "app:1")
    assert lamina_json(stocked, "gc")["blobs"] == []
    lamina(stocked, "image", "rm", "example.org/team/app:stable")
    assert lamina_json(stocked, "images") == []


def test_replace_moves_a_name(stocked: Path, other_image: Path):
    (before,) = lamina_json(stocked, "images")
    lamina(stocked, "import", "--replace", other_image)
    (after,) = lamina_json(stocked, "images")
    assert after["name"] == before["name"]
    assert after["digest"] != before["digest"]
    lamina(stocked, "import", "--name", "app:2", "--no-unpack", other_image)
    lamina(stocked, "image", "tag", "--replace", "app:2", "app:1")


def test_unpack_does_only_what_is_missing(stocked: Path):
    done = lamina_json(stocked, "unpack", "app:1", "--snapshotter", "overlay")
    assert (done["layers"], done["applied"], done["chain_id"]) == (2, 0, CHAIN[-1])
    done = lamina_json(stocked, "unpack", "app:1", "--snapshotter", "copy")
    assert (done["layers"], done["applied"], done["chain_id"]) == (2, 2, CHAIN[-1])
    text = lamina(stocked, "unpack", "app:1", "--snapshotter", "aufs")
    assert text.stdout == f"{CHAIN[-1]}\n"
    assert text.stderr.startswith("unpacked 2 of 2 layers: 5 entries")


# -- mounts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["overlay", "copy"])
def test_mount_shows_the_image_read_only(stocked: Path, tmp_path: Path, backend: str):
    target = tmp_path / "mnt"
    target.mkdir()
    info = lamina_json(stocked, "mount", "--snapshotter", backend, "app:1", target)
    try:
        assert (info["state"], info["rw"]) == ("mounted", False)
        assert (target / "etc/name").read_text() == "upper\n"
        assert sorted(path.name for path in (target / "etc").iterdir()) == ["name"]
        with pytest.raises(OSError, match="Read-only"):
            (target / "new").touch()
        assert lamina_json(stocked, "gc")["snapshots"] == [], "a mount is in use"
    finally:
        lamina(stocked, "umount", target)
    assert list(target.iterdir()) == []
    assert info["name"] not in str(lamina_json(stocked, "snapshots", "ls"))
    assert lamina_json(stocked, "mounts") == []


def test_a_writable_mount_keeps_what_was_written(stocked: Path, tmp_path: Path):
    target = tmp_path / "mnt"
    target.mkdir()
    key = lamina_json(stocked, "mount", "--rw", "app:1", target)["name"]
    (target / "written").write_text("kept\n")
    assert key in lamina(stocked, "umount", target).stderr
    lamina(stocked, "mount", "--rw", "app:1", target)
    try:
        assert (target / "written").read_text() == "kept\n"
    finally:
        lamina(stocked, "umount", target)
    lamina(stocked, "snapshots", "rm", key)
    assert len(lamina_json(stocked, "snapshots", "ls")) == 2


# -- content ----------------------------------------------------------------------------------


def test_content_ls_and_get(stocked: Path, image: Path):
    header, *rows = _table(lamina(stocked, "content", "ls").stdout)
    assert header == ["DIGEST", "SIZE", "CREATED"]
    blobs = lamina_json(stocked, "content", "ls")
    assert {blob["digest"] for blob in blobs} == {row[0] for row in rows} == _digests(image)
    digest = blobs[0]["digest"]
    got = lamina(stocked, "content", "get", digest, encoding="latin-1").stdout.encode("latin-1")
    assert digest_of(got) == digest
    assert blobs[0]["size"] == len(got)


def test_content_verify(stocked: Path, image: Path):
    done = lamina_json(stocked, "content", "verify")
    assert (done["blobs"], done["damaged"]) == (len(_digests(image)), [])
    digest = min(_digests(image))
    assert lamina(stocked, "content", "verify", digest).stderr.startswith("1 of 1 blob good")


def test_content_rm_of_what_nobody_needs(stocked: Path, image: Path):
    lamina(stocked, "image", "rm", "app:1")
    lamina(stocked, "content", "rm", *sorted(_digests(image)))
    assert lamina_json(stocked, "content", "ls") == []
    assert dump(stocked)["extents"] == []


# -- snapshots --------------------------------------------------------------------------------


def test_snapshots_ls_and_tree(stocked: Path):
    header, *rows = _table(lamina(stocked, "snapshots", "ls").stdout)
    assert header == ["KEY", "SNAPSHOTTER", "KIND", "CREATED", "PARENT"]
    expected = {(CHAIN[0], "-"), (CHAIN[1], CHAIN[0])}
    assert {(row[0], row[4]) for row in rows} == expected
    shown = lamina_json(stocked, "snapshots", "ls", "--snapshotter", "overlay")
    assert {(row["key"], row["parent"] or "-") for row in shown} == expected
    assert {row["kind"] for row in shown} == {"committed"}
    drawing = lamina(stocked, "snapshots", "tree").stdout.splitlines()
    assert drawing[0] == "overlay"
    assert CHAIN[0] in drawing[1]
    assert CHAIN[1] in drawing[2]


def test_snapshots_usage(stocked: Path):
    header, *rows = _table(lamina(stocked, "snapshots", "usage").stdout)
    assert header == ["KEY", "SIZE", "INODES", "SNAPSHOTTER"]
    assert {row[0] for row in rows} == set(CHAIN)
    (shown,) = lamina_json(stocked, "snapshots", "usage", CHAIN[1])
    assert shown["key"] == CHAIN[1]
    assert shown["inodes"] > 0


def test_snapshots_rm_from_the_top_down(stocked: Path):
    lamina(stocked, "snapshots", "rm", CHAIN[1], CHAIN[0])
    assert lamina_json(stocked, "snapshots", "ls") == []
    assert dump(stocked)["folders"] == []


# -- the store --------------------------------------------------------------------------------


def test_gc_says_what_went(stocked: Path, image: Path):
    lamina(stocked, "image", "rm", "app:1")
    before = dump(stocked)
    would = lamina_json(stocked, "gc", "--dry-run")
    assert dump(stocked) == before
    assert set(would["blobs"]) == _digests(image)
    assert [node["key"] for node in would["snapshots"]] == [CHAIN[1], CHAIN[0]]
    done = lamina(stocked, "gc")
    assert {line.split()[1] for line in done.stdout.splitlines() if line.startswith("blob")} == set(
        would["blobs"]
    )
    assert done.stderr.startswith(f"removed {len(would['blobs'])} blobs (")
    assert {name: records for name, records in dump(stocked).items() if records} == {}


def test_bk_01_backends_says_what_works(tmp_path: Path):
    empty_store(tmp_path / "root")
    header, *rows = _table(lamina(tmp_path / "root", "backends").stdout)
    assert header == ["NAME", "UNPACKS", "MOUNTS", "WHY NOT"]
    shown = {row["name"]: row for row in lamina_json(tmp_path / "root", "backends")}
    assert set(shown) == {row[0] for row in rows} >= {"overlay", "copy", "aufs"}
    for row in shown.values():
        assert row["mounts"] or row["reason"]
    assert shown["copy"]["mounts"]


def test_namespaces_do_not_see_each_other(stocked: Path):
    assert lamina_json(stocked, "--namespace", "team", "images") == []


def test_demo_shows_that_the_backends_agree(demonstrated: Mapping[str, Any]):
    shown = demonstrated
    assert {"overlay", "copy"} <= set(shown["equal"])
    assert set(shown["unpack"]) == set(shown["equal"])
    assert all(done["entries"] > 3000 for done in shown["unpack"].values())
    assert shown["gc"]["snapshots"] > 0


@pytest.mark.parametrize("words", [["--help"], ["import", "--help"], ["snapshots", "ls", "-h"]])
def test_help_is_an_answer(tmp_path: Path, words: list[str]):
    assert "Usage: lamina" in lamina(tmp_path / "unused", *words).stdout
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("words", [["images"], ["images", "--json"], ["--help"]])
def test_a_reader_that_leaves_early_is_no_error(stocked: Path, words: list[str]):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [*LAMINA, "--root", str(stocked), *words]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
