"""`lamina gc`: what it says of who holds what, and its policy, as people use them."""

import os
from pathlib import Path

import pytest

from engine.testing.archives import archive, docker_archive, member
from tests.command import lamina, lamina_json

pytestmark = pytest.mark.root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    base = archive(member("base", data=b"base" * 1000))
    for name in "ab":
        layers = [base, archive(member(name, data=os.urandom(10_000)))]
        lamina(tmp_path / "root", "import", "-q", docker_archive(tmp_path / name, layers, [f"{name}:1"]))
    return tmp_path / "root"


@pytest.fixture
def target(root: Path, tmp_path: Path):
    (tmp_path / "mnt").mkdir()
    yield tmp_path / "mnt"
    if os.path.ismount(tmp_path / "mnt"):
        lamina(root, "umount", tmp_path / "mnt")


def test_who_holds_what(root, target):
    lamina(root, "mount", "a:1", target)
    lamina(root, "image", "rm", "b:1")
    (lease,) = lamina(root, "leases", "create", "-q").stdout.split() or [""]
    dry = lamina(root, "gc", "--dry-run", "--explain").stdout.splitlines()
    garbage = [line for line in dry if line.startswith(("blob", "snapshot  overlay"))]
    assert len(garbage) == 4
    assert all(line.endswith("B") for line in garbage)
    table = dry[len(garbage) :]
    assert table[0].split() == ["KEPT", "BY", "NAME", "OBJECTS", "ALONE", "SHARED", "WHY"]
    assert {tuple(line.split()[:1]) for line in table[1:]} >= {("image",), ("mount",)}
    assert any(f"mounted at {target}" in line for line in table)
    assert lamina(root, "gc", "--explain").stdout.splitlines()[4:] == table
    assert lease is not None


def test_the_way_to_an_object(root, target):
    lamina(root, "mount", "a:1", target, "--name", "web", "--rw")
    image = lamina_json(root, "image", "inspect", "a:1")
    layer = image["chain_ids"][0]  # of one layer that is not packed: a blob and a snapshot
    blob, snapshot = lamina(root, "gc", "--explain", layer).stdout.splitlines()
    assert blob.startswith(f"blob {layer}: kept by image ")
    assert blob.endswith(f" -> layer {layer}")
    assert " -> manifest sha256:" in blob
    top = image["chain_ids"][1]
    way = f"mount web (mounted at {target}) -> snapshot overlay {top} -> snapshot overlay {layer}"
    assert snapshot == f"snapshot overlay {layer}: kept by {way}"
    assert lamina(root, "gc", "--explain", "a:1").stdout == "image a:1: kept by itself\n"
    lamina(root, "image", "rm", "b:1")
    (loose,) = set(lamina(root, "content", "ls", "-q").stdout.split()) & set(
        lamina_json(root, "gc", "--dry-run")["blobs"][:1]
    )
    assert "held by nothing" in lamina(root, "gc", "--explain", loose).stdout
    lamina(root, "gc", "--explain", "nobody", code=3)
    before = lamina_json(root, "content", "ls")
    assert lamina_json(root, "gc", "--explain", loose)[0]["chain"] == []
    assert lamina_json(root, "content", "ls") == before


def test_a_policy_removes_what_nobody_used(root, target):
    lamina(root, "mount", "a:1", target)
    assert not lamina_json(root, "gc", "--max-age", "1d")["removed"]
    old = ("gc", "--max-age", "0s")
    would = lamina(root, *old, "--dry-run")
    assert "would remove image b:1" in would.stderr
    assert "for its age" in would.stderr
    assert len(lamina_json(root, "images")) == 2
    done = lamina_json(root, *old)
    assert [one["names"] for one in done["removed"]] == [["docker.io/library/b:1"]]
    assert len(done["blobs"]) == 3
    assert [row["name"] for row in lamina_json(root, "images")] == ["docker.io/library/a:1"]


def test_a_policy_frees_a_disk_that_is_full(root):
    lamina(root, "image", "pin", "b:1")
    assert not lamina_json(root, "gc", "--high", "0")["removed"]  # both are young
    done = lamina_json(root, "gc", "--high", "0", "--low", "0", "--min-age", "0s")
    assert [one["names"] for one in done["removed"]] == [["docker.io/library/a:1"]]
    assert done["removed"][0]["why"] == "the disk"
    assert not lamina_json(root, "gc", "--high", "0", "--min-age", "0s")["removed"]


@pytest.mark.parametrize(
    "words",
    [
        ["a:1"],
        ["--low", "5"],
        ["--min-age", "5s"],
        ["--high", "101"],
        ["--high", "5", "--low", "6"],
        ["--max-age", "soon"],
        ["--max-age", "-5s"],
        ["--max-age", "5s", "--min-age", "6s"],
    ],
)
def test_options_that_make_no_sense(tmp_path, words):
    assert len(lamina(tmp_path / "root", "gc", *words, code=2).stderr.splitlines()) == 1
