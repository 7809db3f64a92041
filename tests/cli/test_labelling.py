"""Leases, namespaces and labels at the command line, as whoever types them sees them."""

import json
import subprocess
from pathlib import Path

import pytest

from engine.metadata.leases import leased
from engine.root import open_root
from tests.cli.failing import assert_fails, assert_one_line
from tests.cli.test_commands import CHAIN
from tests.command import lamina, lamina_json

pytestmark = pytest.mark.root

# -- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["image", "content", "snapshots", "namespaces"])
def test_labels_are_set_deleted_and_shown(stocked: Path, kind: str):
    name = {
        "image": "app:1",
        "content": lamina_json(stocked, "content", "ls")[0]["digest"][:19],
        "snapshots": CHAIN[-1][7:19],
        "namespaces": "default",
    }[kind]
    before = lamina(stocked, kind, "label", name).stdout
    done = lamina(stocked, kind, "label", name, "b=1=2 3", "a.b/c=x", "d-=4")
    assert sorted([*before.splitlines(), "a.b/c=x", "b=1=2 3", "d-=4"]) == done.stdout.splitlines()
    assert lamina(stocked, kind, "label", name).stdout == done.stdout
    assert lamina(stocked, kind, "label", name, "-q", "b=5").stdout == ""
    shown = lamina_json(stocked, kind, "label", name, "absent-", "d-=", "a.b/c-")
    assert shown["labels"]["b"] == "5"
    assert lamina(stocked, kind, "label", name, "b-").stdout == before
    assert_fails(stocked, kind, "label", name, "a=b", "word", code=2, says="'word' is no label")


def test_labels_of_one_name_are_not_those_of_another(stocked: Path):
    lamina(stocked, "image", "tag", "app:1", "app:2")
    lamina(stocked, "image", "label", "app:1", "a=b")
    assert [row["labels"] for row in lamina_json(stocked, "images")] == [{"a": "b"}, {}]
    digest = lamina_json(stocked, "images")[0]["digest"]
    assert_fails(stocked, "image", "label", digest, "a=b", code=6, says="has 2 names (app:1, app:2)")


def test_whoever_types_may_set_labels_that_steer_collections(stocked: Path):
    blobs = lamina(stocked, "content", "ls", "-q").stdout.split()
    lamina(stocked, "content", "label", blobs[0], "containerd.io/gc.root=yes")
    lamina(stocked, "image", "rm", "app:1", "--gc")
    held = set(lamina(stocked, "content", "ls", "-q").stdout.split())
    assert blobs[0] in held
    lamina(stocked, "content", "label", blobs[0], "containerd.io/gc.root-")
    lamina(stocked, "gc")
    assert lamina_json(stocked, "content", "ls") == []


def test_an_image_is_pinned_and_unpinned(stocked: Path):
    lamina(stocked, "image", "tag", "app:1", "app:2")
    pinned = ("images", "-q", "--filter", 'labels."io.cri-containerd.pinned"==pinned')
    assert lamina(stocked, "image", "pin", "app:1", "app:2").stdout == ""
    assert lamina(stocked, *pinned).stdout == "app:1\napp:2\n"
    (row,) = lamina_json(stocked, "image", "unpin", "app:1")
    assert (row["name"], row["labels"]) == ("docker.io/library/app:1", {})
    assert lamina(stocked, *pinned).stdout == "app:2\n"
    lamina(stocked, "image", "rm", "app:2")


# -- image rm --gc ----------------------------------------------------------------------------


def test_an_image_goes_with_all_that_only_it_kept(stocked: Path, other_image: Path):
    lamina(stocked, "import", "--name", "other:1", other_image)
    done = lamina(stocked, "image", "rm", "app:1", "--gc")
    kinds = [line.split()[0] for line in done.stdout.splitlines()]
    assert sorted(kinds) == ["blob"] * 4 + ["snapshot"] * 2
    assert done.stderr.startswith("removed 4 blobs (")
    assert [row["name"] for row in lamina_json(stocked, "images")] == ["docker.io/library/other:1"]
    shown = lamina_json(stocked, "image", "rm", "other:1", "--gc")
    assert shown["removed"] == ["docker.io/library/other:1"]
    assert len(shown["collected"]["blobs"]) == 3
    assert lamina(stocked, "gc").stdout == ""
    assert_fails(stocked, "image", "rm", "other:1", "--gc", code=3, says="no image other:1")


def test_files_that_resist_are_told_after_the_name_is_gone(stocked: Path):
    stuck = next((stocked / "snapshots").glob("*/*/fs/etc"))
    subprocess.run(["chattr", "+i", stuck], check=True)
    try:
        done = lamina(stocked, "image", "rm", "app:1", "--gc", "--json", code=1)
    finally:
        for path in [stuck, *(stocked / "trash").rglob("etc")]:
            subprocess.run(["chattr", "-i", path], check=False, capture_output=True)
    shown = json.loads(done.stdout)
    assert shown["removed"] == ["docker.io/library/app:1"]
    assert len(shown["collected"]["left"]) == 1
    lamina(stocked, "gc")


# -- leases -----------------------------------------------------------------------------------


def test_what_comes_in_for_a_lease_stays_with_it(tmp_path: Path, stocked: Path, other_image: Path):
    assert lamina(stocked, "leases", "create", "--id", "mine", "team=web").stdout == "mine\n"
    lamina(stocked, "import", "--lease", "mine", "--name", "other:1", other_image)
    assert lamina(stocked, "image", "rm", "other:1", "--gc").stdout == ""
    held = lamina_json(stocked, "leases", "inspect", "mine")
    assert len(lamina(stocked, "leases", "inspect", "mine").stdout.splitlines()) == held["holds"] + 1
    ids = [one["id"] for one in held["resources"]]
    assert lamina(stocked, "leases", "inspect", "-q", "mine").stdout.split() == ids
    lamina(stocked, "leases", "rm", "mine")
    gone = lamina_json(stocked, "gc")
    assert sorted([*gone["blobs"], *(one["key"] for one in gone["snapshots"])]) == sorted(ids)


def test_an_unpacked_image_stays_with_a_lease(stocked: Path):
    lease = lamina(stocked, "leases", "create", "-x", "1h30m").stdout.strip()
    lamina(stocked, "unpack", "--lease", lease, "app:1")
    lamina(stocked, "image", "rm", "app:1", "--gc")
    assert [row["key"] for row in lamina_json(stocked, "snapshots", "ls")] == sorted(CHAIN)


def test_leases_are_listed(stocked: Path):
    assert lamina(stocked, "leases", "ls").stderr == "no leases\n"
    lamina(stocked, "leases", "create", "--id", "ever", "-x", "0", "--flat")
    lamina(stocked, "leases", "create", "--id", "mine", "-x", "2h", "a=b")
    with open_root(stocked) as root, leased(root.meta, "default") as work:
        lines = [line.split() for line in lamina(stocked, "leases", "ls").stdout.splitlines()]
        rows = lamina_json(stocked, "leases", "ls")
        assert lamina(stocked, "leases", "ls", "-q").stdout.split() == ["ever", "mine", work]
        refused = lamina(stocked, "leases", "rm", "mine", work, code=6)
        assert_one_line(refused.stderr, "that of process")
    assert lines[0] == ["ID", "HOLDS", "CREATED", "EXPIRES", "OWNER", "LABELS"]
    assert [line[0] for line in lines[1:]] == ["ever", "mine", work]
    assert " ".join(lines[2]).endswith("ago in 2 h - a=b")
    assert [row["live"] for row in rows] == [True] * 3
    assert [row["flat"] for row in rows] == [True, False, False]
    assert ["expires" in row for row in rows] == [False, True, False]
    assert rows[2]["owner"].startswith("process ")
    by_label = lamina_json(stocked, "leases", "ls", "--filter", "labels.a==b")
    assert [row["id"] for row in by_label] == ["mine"]
    assert lamina(stocked, "leases", "inspect", "mine").stderr == "lease mine holds nothing\n"


# -- namespaces -------------------------------------------------------------------------------


def test_namespaces_are_listed_made_and_removed(stocked: Path, other_image: Path):
    lamina(stocked, "namespaces", "create", "apart", "--isolated", "a=b")
    lamina(stocked, "--namespace", "other", "import", other_image)
    assert lamina(stocked, "ns", "ls", "-q").stdout.split() == ["apart", "default", "other"]
    lines = lamina(stocked, "namespaces", "ls").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["apart", "isolated"],
        ["default", "shared"],
        ["other", "shared"],
    ]
    says = "namespace other has images and blobs and snapshots; remove those first"
    assert_fails(stocked, "namespaces", "rm", "apart", "other", code=6, says=says)
    lamina(stocked, "--namespace", "other", "image", "rm", "app:1", "--gc")
    assert lamina(stocked, "ns", "ls", "-q").stdout.split() == ["apart", "default"]
    lamina(stocked, "namespaces", "rm", "apart")
    assert lamina(stocked, "ns", "ls", "-q").stdout.split() == ["default"]
