"""`--filter` of the listings: what matches, by containerd's fields."""

import pytest

from tests.command import lamina, lamina_json

pytestmark = pytest.mark.root

_ALL = (("images",), ("content", "ls"), ("snapshots", "ls"))


def keys(rows, field):
    return {row[field] for row in rows}


def test_blobs_by_digest_and_label(stocked):
    rows = lamina_json(stocked, "content", "ls")
    layers = {row["digest"] for row in rows if "containerd.io/uncompressed" in row["labels"]}
    assert 0 < len(layers) < len(rows)
    label = 'labels."containerd.io/uncompressed"'
    assert keys(lamina_json(stocked, "content", "ls", "--filter", label), "digest") == layers
    one, two = sorted(layers)
    either = ["--filter", f"digest=={one}", "--filter", f"digest=={two}"]
    assert keys(lamina_json(stocked, "content", "ls", *either), "digest") == layers
    both = ["--filter", f"digest=={one},digest!={one}"]
    assert lamina(stocked, "content", "ls", "-q", *both).stdout == ""


def test_images_by_name_and_target(stocked):
    lamina(stocked, "image", "tag", "app:1", "other:2")
    names = lamina(stocked, "images", "-q", "--filter", r"name~=/\/app:1$/").stdout
    assert names == "app:1\n"
    index = "target.mediatype~=image.index"
    assert not lamina_json(stocked, "images", "--filter", f"name==docker.io/library/app:1,{index}")
    digest = lamina_json(stocked, "images")[0]["digest"]
    assert len(lamina_json(stocked, "image", "ls", "--filter", f"target.digest=={digest}")) == 2


def test_snapshots_by_kind_and_parent(stocked):
    (top,) = lamina_json(stocked, "snapshots", "ls", "--filter", "kind==committed,parent")
    (base,) = lamina_json(stocked, "snapshots", "ls", "--filter", f"name=={top['parent']}")
    assert base["parent"] == ""
    assert not lamina_json(stocked, "snapshots", "ls", "--filter", "kind==active")


@pytest.mark.parametrize("command", _ALL, ids="-".join)
def test_a_filter_that_is_none_says_where(stocked, command):
    wrong = lamina(stocked, *command, "--filter", "name=x", code=2)
    assert wrong.stderr.startswith("lamina: filter 'name=x', character 5: expected one of")


def test_an_expression_that_is_none_says_where(stocked):
    done = lamina(stocked, "images", "--filter", "name~=a(", code=2)
    assert "lamina: expression 'a(', character 2: " in done.stderr


@pytest.mark.parametrize("command", _ALL, ids="-".join)
def test_what_matches_nothing_does_not_call_the_store_empty(stocked, command):
    assert " match\n" in lamina(stocked, *command, "--filter", "labels.none==x").stderr
