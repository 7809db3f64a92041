"""docs/json.md says what `--json` writes: held against what every command really writes."""

import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.kv import keys
from engine.kv.schema import CONTAINERS
from engine.metadata.containers import Container, ContainerStore
from engine.metadata.images import ImageStore
from engine.metadata.leases import leased
from engine.metadata.pulls import PullStore
from engine.root import Root, open_root
from engine.testing.archives import archive, layout, member
from engine.testing.taking_registry import TakingRegistry
from tests.cli.test_importing import mixed
from tests.command import commands, lamina
from tests.registry.asking import Served
from tests.running.images import image as running_image
from tests.test_architecture import TOP

pytestmark = pytest.mark.root

_DOCS = (TOP / "docs" / "json.md").read_text(encoding="utf-8")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z")
_WITHOUT = {("content", "get"), ("completion",), ("run",), ("exec",), ("attach",), ("logs",)}
_LISTS = {"list of images": "image", "list of unpackings": "unpacking"}
_RARE = {
    "removal of snapshots": {"left[].path", "left[].reason"},
    "image details": {"fetched", "puller"},  # of an image with a name all is here
    "container": {"parent"},  # no command nests them
}
_PYTHON = {"string": str, "number": int | float, "time": str, "boolean": bool}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _documented() -> Mapping[str, Mapping[str, str]]:
    """Return the fields of each shape, as paths, and their types."""
    found = {}
    for section in _DOCS.split("\n## ")[1:]:
        title, *lines = section.splitlines()
        found[title] = {
            name: kind
            for names, kind, *_ in (_cells(line) for line in lines if line.startswith("| `"))
            for name in re.findall(r"`([^`]+)`", names)
        }
    found["image details"] |= {k: v for k, v in found["image"].items() if k != "error"}
    found["lease details"] |= {k: v for k, v in found["lease"].items() if k != "error"}
    return found


def _promised() -> dict[tuple[str, ...], tuple[str, bool]]:
    """Return the shape of each command's document, and whether it is a list of those."""
    table = _DOCS.partition("| command |")[2].partition("\n## ")[0]
    found = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            names, document = _cells(line)
            shape = re.search(r"\[([^]]+)\]", document)
            assert shape
            for name in re.findall(r"`([^`]+)`", names):
                found[tuple(name.split())] = (shape[1], document.startswith("list of"))
    return found


SHAPES, PROMISED = _documented(), _promised()


def _fields(
    value: Mapping[str, Any], shape: Mapping[str, str], path: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield the fields of an object by path; what the docs name as a whole is not looked into."""
    for key, inner in value.items():
        name = f"{path}{key}"
        if name in shape:
            yield name, inner
        elif isinstance(inner, dict):
            yield from _fields(inner, shape, f"{name}.")
        elif isinstance(inner, list) and any(field.startswith(f"{name}[].") for field in shape):
            for item in inner:
                yield from _fields(item, shape, f"{name}[].")
        else:
            yield name, inner


def _check(words: tuple[str, ...], document: Any) -> set[str]:
    """Check a document against the docs; return the fields that it has."""
    title, is_list = PROMISED[words]
    assert isinstance(document, list) == is_list, words
    shape = {**SHAPES[title], **SHAPES["error"]}
    seen = set()
    pending = list(document) if is_list else [document]
    while pending:
        item = pending.pop()
        for name, value in _fields(item, shape):
            assert name in shape, f"{words} writes {name}, which docs/json.md does not have"
            kind = shape[name]
            if kind == "time":
                assert _TIME.fullmatch(value), (name, value)
            if kind in _PYTHON:
                assert isinstance(value, _PYTHON[kind]), (name, value)
            elif kind in {"map", "document"}:
                assert isinstance(value, dict), (name, value)
            else:
                assert isinstance(value, list), (name, value)
                if kind in _LISTS:
                    for one in value:
                        rows = dict(_fields(one, SHAPES[_LISTS[kind]] | {"digest": "string"}))
                        assert rows.keys() <= SHAPES[_LISTS[kind]].keys() | {"digest"}, (name, rows)
                elif kind == "list of snapshots":
                    pending += value
                else:
                    assert all(isinstance(one, str) for one in value), (name, value)
            seen.add(name)
    return seen


def test_every_command_is_documented():
    known = {words for words, _ in commands()}
    assert set(PROMISED) | _WITHOUT == known


@pytest.fixture(scope="module")
def seen(
    tmp_path_factory: pytest.TempPathFactory, image: Path, demonstrated: Mapping[str, Any]
) -> dict[str, set[str]]:
    """What every command wrote, on a store that has one of each kind, damaged ones too."""
    folder = tmp_path_factory.mktemp("json")
    root, target = folder / "root", folder / "mnt"
    target.mkdir()
    found: dict[str, set[str]] = {title: set() for title in SHAPES}
    ran = set()

    def run(*args: object, code: int = 0) -> Any:
        document = json.loads(lamina(root, *args, "--json", code=code).stdout)
        words = next(w for w in PROMISED if w == tuple(map(str, args))[: len(w)])
        ran.add(words)
        found[PROMISED[words][0]] |= _check(words, document)
        if code:
            found["error"] |= {f"error.{name}" for name in document["error"]}
        return document

    (imported,) = run("import", image)["images"]
    run("import", mixed(folder), "--ref", "absent", code=3)
    run("import", folder / "mixed", code=5)
    run("image", "rm", "mixed:good")
    lamina(root, "mount", "app:1", target, "--rw", "--name", "early")
    run("gc", "--dry-run", "--explain")
    (explained,) = json.loads(lamina(root, "gc", "--explain", "early", "--json").stdout)
    found["explanation"] |= {name for name, _ in _fields(explained, SHAPES["explanation"])}
    lamina(root, "umount", target)
    lamina(root, "snapshots", "rm", "early")
    run("gc")
    run("unpack", "app:1")
    assert run("image", "tag", "app:1", "app:2") | {"name": "", "created": "", "updated": ""} == (
        imported | {"name": "", "created": "", "updated": ""}
    )
    assert run("images")[0] == imported
    assert run("image", "ls") == run("images")
    details = run("image", "inspect", "app:1")
    assert {key: details[key] for key in imported} == imported
    run("image", "rm", "app:2")
    assert run("mount", "app:1", target, "--rw", "--name", "web") == run("mounts")[0]
    assert run("umount", target)["state"] == "kept"
    run("mount", "app:1", target)
    assert run("umount", target)["state"] == "unmounted"
    bottom = _list(run)
    _account(root, run)
    lamina(root, "image", "tag", "app:1", "old:1")
    run("gc", "--dry-run", "--explain", "--max-age", "0s", "--min-age", "0s")
    _name_and_keep(root, image, run)
    _contain(root, folder, run)
    run("backends")
    run("compact")
    next((root / "snapshots").glob("*/*/fs/etc")).chmod(0o700)
    run("fsck", code=5)
    run("fsck", "--repair")
    for words, code in ((("content", "rm", bottom), 3), (("gc", "--no-such-option"), 2)):
        run(*words, code=code)
    _damage(root, folder, run)
    found["demo"] = _check(("demo",), demonstrated)
    _pull(root, run)
    assert ran | {("demo",)} == set(PROMISED)
    return found


def _account(root: Path, run: Any) -> None:
    """Ask what a store with a container takes up, and one with the record of one that cannot be read."""
    about = {"state": "stopped", "since": {}, "image": "app:1", "target": "", "backend": "overlay"}
    gone = Container(id="gone", unique="0" * 16, created=0, boot="", **about)
    with Root(root) as opened:
        containers = ContainerStore(opened.meta, "default")
        with opened.meta.write() as txn:
            containers.put_new(txn, gone)
            txn.raw.put(keys.encode(("default", "bad")), b"\xc1", db=txn.databases["containers"])
    assert [row["name"] for row in run("du")["containers"]] == ["gone", "bad"]
    with Root(root) as opened, opened.meta.write() as txn:
        for name in ("gone", "bad"):
            CONTAINERS.delete(txn, "default", name)


def _list(run: Any) -> str:
    """List blobs and snapshots, which all listings show alike; return the key of the lowest."""
    run("content", "ls")
    run("content", "verify")
    listed = {row["key"]: row for row in run("snapshots", "ls")}
    for row in run("snapshots", "usage"):
        assert {key: row[key] for key in listed[row["key"]]} == listed[row["key"]]
    (bottom,) = run("snapshots", "tree")
    assert [child["key"] for child in bottom["children"][0]["children"]] == ["web"]
    run("snapshots", "rm", "web")
    key: str = bottom["key"]
    return key


def _pull(root: Path, run: Any) -> None:
    """Pull an image, push it elsewhere, and pull one not to its end while someone is at work on it."""
    with TakingRegistry().running() as registry:
        served = Served(registry)
        run("pull", "--platform", "linux/amd64", served.reference)
        run("push", served.reference, f"{registry.name}/b:1")
        run("copy", served.reference, f"{registry.name}/c:1")
    with open_root(root) as opened:
        pulls = PullStore(opened.meta, "default", ImageStore(opened.meta, "default"))
        lease = pulls.begin(f"{served.reference}-next")
        pulls.note(lease, served.manifest)
        (row,) = (row for row in run("images", "--all") if "puller" in row)
        assert row["state"] == "fetched"
        pulls.leave(lease)


def _name_and_keep(root: Path, image: Path, run: Any) -> None:
    """Run the commands on labels, leases and namespaces."""
    lease = run("leases", "create", "--id", "mine", "--flat", "a=b")
    lamina(root, "import", "--lease", "mine", "--name", "gone:1", image)
    run("image", "rm", "gone:1", "--gc")
    details = run("leases", "inspect", "mine")
    assert {key: details[key] for key in lease} == lease | {"holds": len(details["resources"])}
    with open_root(root) as opened, leased(opened.meta, "default"):
        ids = [lease["id"] for lease in run("leases", "ls")]
        assert [run("leases", "inspect", name)["id"] for name in ids] == ids == ["mine", ids[1]]
    run("leases", "rm", "mine")
    assert run("image", "label", "app:1", "a=b")["labels"] == {"a": "b"}
    run("image", "pin", "app:1")
    run("image", "unpin", "app:1")
    blob, snapshot = run("content", "ls")[0], run("snapshots", "ls")[0]
    assert run("content", "label", blob["digest"]) == blob
    assert run("snapshots", "label", snapshot["key"]) == snapshot
    made = run("namespaces", "create", "other", "--isolated")
    assert run("namespaces", "ls")[1] == made
    run("namespaces", "label", "other", "a=b")
    run("namespaces", "rm", "other")


def _contain(root: Path, folder: Path, run: Any) -> None:
    """Run the commands on containers."""
    lamina(root, "import", "--name", "busybox", running_image(folder / "busybox"))
    for name in ("one", "two"):
        lamina(root, "run", "-d", "--name", name, "-l", "a=b", "busybox", "sleep", "1000")
    rows = run("ps")
    assert [row["name"] for row in rows] == ["one", "two"]
    assert run("stop", "-t", "0", "one")[0] | {"ended": "", "state": ""} == (
        {key: value for key, value in rows[0].items() if key != "pid"}
        | {"ended": "", "state": "", "exit_code": 137}
    )
    (killed,) = run("kill", "-s", "CONT", "two")
    assert killed == rows[1]
    run("rm", "one", "two", code=6)
    assert run("rm", "-f", "two") == {"removed": ["two"]}
    run("image", "prune", "--keep", "app:1")


def _damage(root: Path, folder: Path, run: Any) -> None:
    other = layout(folder / "other", [archive(member("of", data=b"another"))])
    lamina(root, "import", other)
    lamina(root, "image", "rm", "other")
    stuck = next(path for path in (root / "snapshots").glob("*/*/fs/of"))
    subprocess.run(["chattr", "+i", stuck], check=True)
    try:
        assert run("gc", "--dry-run")["dry_run"]
        run("gc", code=1)
        key = run("snapshots", "ls")[-1]["key"]
    finally:
        for path in [stuck, *(root / "trash").rglob("of")]:
            subprocess.run(["chattr", "-i", path], check=False, capture_output=True)
    with Root(root) as opened, opened.meta.write() as txn:
        for table, *name in (
            ("images", "default", "bad:1"),
            ("blobs", "default", "sha256:bad"),
            ("mounts", "default", "bad"),
            ("containers", "default", "bad"),
            ("leases", "default", "bad"),
            ("namespaces", "bad"),
            ("snapshots", "copy", "default", key),
        ):
            txn.raw.put(keys.encode(name), b"\xc1", db=txn.databases[table])
    (root / "snapshots" / "copy").mkdir(exist_ok=True)
    listings = ("images", "mounts", "content ls", "snapshots ls", "leases ls", "namespaces ls", "ps")
    for words in (*listings, "du", "gc"):
        run(*words.split())


@pytest.mark.parametrize("title", SHAPES)
def test_what_is_documented_is_written(seen: dict[str, set[str]], title: str):
    assert SHAPES[title].keys() - seen[title] <= _RARE.get(title, set())
