"""Bad input ends in one line, the right exit code and an unchanged store."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.kv.schema import FORMAT, INLINE
from engine.testing.archives import archive, layout, member
from tests.cli.bad_images import BAD_IMAGES
from tests.cli.conftest import BASE
from tests.cli.failing import assert_fails
from tests.cli.test_commands import CHAIN
from tests.command import dump, lamina, lamina_json

pytestmark = pytest.mark.root


@pytest.mark.parametrize("make", BAD_IMAGES, ids=lambda make: make.__name__.strip("_"))
def test_a_bad_image_is_refused_whole(stocked: Path, tmp_path: Path, make: Callable[[Path], Path]):
    code, says = BAD_IMAGES[make]
    source = make(tmp_path)
    assert_fails(stocked, "import", source, "--name", "new:1", code=code, says=says)


# Words after `lamina`, the exit code, and part of the message. The store has app:1.
USAGE: list[tuple[str, int, str]] = [
    ("no-such-command", 2, "No such command 'no-such-command'; see `lamina --help`"),
    ("images --no-such-option", 2, "No such option '--no-such-option'; see `lamina images --help`"),
    ("import", 2, "Missing argument 'PATH'; see `lamina import --help`"),
    ("backends superfluous", 2, "unexpected extra argument"),
    ("gc app:1", 2, "OBJECT goes with --explain; see `lamina gc --help`"),
    ("gc --explain absent:1", 3, "no image, blob or snapshot absent:1"),
    ("--namespace ../other images", 2, "is not a namespace"),
    ("unpack app:1 --snapshotter none", 2, "no snapshotter 'none'; there are"),
    ("snapshots ls --snapshotter none", 2, "no snapshotter 'none'; there are"),
    ("unpack app:1 --platform sparc", 2, "is not a platform"),
    ("unpack app:1 --platform a/b/c/d", 2, "is not a platform"),
    ("unpack App:1", 2, "is not an image reference"),
    ("unpack absent:1", 3, "no image absent:1; `lamina images` lists what there is"),
    ("image inspect absent:1", 3, "no image absent:1"),
    ("image rm absent:1", 3, "no image absent:1"),
    ("image tag absent:1 app:2", 3, "no image absent:1"),
    ("image tag app:1 UPPER//case", 2, "is not an image reference"),
    ("image tag app:1 app:1@sha256:12", 2, "not a sha256 or sha512 digest"),
    ("mount absent:1 /mnt", 3, "no image absent:1"),
    ("mount app:1 {tmp}/file", 3, "is not a folder"),
    ("mount app:1 {tmp}/absent", 3, "is not a folder"),
    ("mount app:1 {tmp}", 2, "overlap; mount somewhere else"),
    ("mount app:1 {tmp} --snapshotter none", 2, "no snapshotter 'none'"),
    ("umount {tmp}", 3, "has mounted nothing"),
    ("content get sha256:12", 2, "not a sha256 or sha512 digest"),
    (f"content get sha256:{0:064}", 3, "no blob"),
    (f"content rm sha256:{0:064}", 3, "no blob"),
    (f"content verify sha256:{0:064}", 3, "no blob"),
    ("snapshots rm absent", 3, "no snapshot absent"),
    (f"logs absent --tail {1 << 64}", 2, "is not in the range"),
    ("stop absent --time nan", 2, "--time nan"),
    ("stop absent --time inf", 2, "is not in the range"),
    ("snapshots rm :apple:[bold]", 3, "no snapshot :apple:[bold];"),
    ("snapshots usage absent", 3, "no snapshot absent"),
    (f"snapshots rm {CHAIN[0]}", 6, "has children"),
    ("image label app:1 word", 2, "'word' is no label; write KEY=VALUE"),
    ("image label app:1 =x", 2, "is no label"),
    ("image label app:1 -", 2, "is no label"),
    ("image label app:1 a=b k=" + "x" * 4096, 2, "label 'k' is over 4096 bytes"),
    ("image label absent:1 a=b", 3, "no image absent:1"),
    ("image pin app:1 absent:1", 3, "no image absent:1"),
    (f"content label sha256:{0:064} a=b", 3, "no blob"),
    ("snapshots label absent a=b", 3, "no snapshot absent"),
    ("leases create --id a/b", 2, "'a/b' is not a lease; use letters and digits"),
    ("leases create --id " + "x" * 77, 2, "76 at most"),
    ("leases create --expires soon", 2, "write a duration as 1h30m"),
    ("leases create --expires -1h", 2, "a time to come"),
    ("leases create --expires 2001-01-01T00:00:00Z", 2, "a time to come"),
    ("leases create --expires 99999999h", 2, "no lease lives that long"),
    ("leases create word", 2, "is no label"),
    ("leases inspect absent", 3, "no lease absent; `lamina leases ls` lists them"),
    ("leases rm absent", 3, "no lease absent"),
    ("leases ls --filter id=x", 2, "expected one of"),
    ("import --lease absent {tmp}", 3, "no lease absent"),
    ("unpack --lease absent app:1", 3, "no lease absent"),
    ("namespaces create default", 4, "namespace default exists"),
    ("namespaces create a..b", 2, "is not a namespace"),
    ("namespaces label absent a=b", 3, "no namespace absent"),
    ("namespaces rm absent", 3, "no namespace absent"),
    ("namespaces rm default", 6, "namespace default has images and blobs and snapshots"),
]


@pytest.mark.parametrize(("words", "code", "says"), USAGE, ids=[words for words, _, _ in USAGE])
def test_a_bad_command_changes_nothing(stocked: Path, tmp_path: Path, words: str, code: int, says: str):
    (tmp_path / "file").touch()
    arguments = words.format(tmp=tmp_path).split()
    assert_fails(stocked, *arguments, code=code, says=says)


def test_a_name_moves_only_when_told(stocked: Path, other_image: Path):
    assert_fails(stocked, "import", other_image, code=4, says="pass --replace")
    lamina(stocked, "import", "--name", "app:2", other_image)
    assert_fails(stocked, "image", "tag", "app:2", "app:1", code=4, says="pass --replace")


def test_one_name_is_not_for_two_images(tmp_path: Path, stocked: Path):
    both = tmp_path / "both"
    for tag in ("1", "2"):
        layout(both, [archive(member(tag))], tag=tag)
    assert_fails(stocked, "import", both, "--name", "new:1", code=2, says="holds 2 images")


def test_an_image_for_other_platforms_only(tmp_path: Path, stocked: Path):
    index = tmp_path / "index"
    for architecture in ("s390x", "riscv64"):
        platform = {"os": "plan9", "architecture": architecture}
        layout(index, [archive(member(architecture))], platform=platform)
    assert_fails(stocked, "import", index, code=3, says="no single image")
    assert_fails(stocked, "import", index, "--platform", "linux/386", code=3, says="linux/386")


def test_what_an_image_needs_stays(stocked: Path):
    for blob in lamina_json(stocked, "content", "ls"):
        assert_fails(stocked, "content", "rm", blob["digest"], code=6, says="belongs to image")


def test_a_target_in_use_is_left_alone(stocked: Path, other_image: Path, tmp_path: Path):
    target = tmp_path / "mnt"
    target.mkdir()
    key = lamina_json(stocked, "mount", "app:1", target)["name"]
    try:
        assert_fails(stocked, "mount", "app:1", target, code=6, says="unmount it first")
        assert_fails(stocked, "snapshots", "rm", key, code=6, says="is mounted")
        assert (target / "etc/name").read_text() == "upper\n"
    finally:
        lamina(stocked, "umount", target)
    assert_fails(stocked, "umount", target, code=3, says="has mounted nothing")


@pytest.mark.parametrize(("size", "where"), [(100, "meta.lmdb"), (2 * INLINE, "blobs.lmdb")])
def test_damaged_bytes_are_told(stocked: Path, tmp_path: Path, size: int, where: str):
    noise = random.Random(size).randbytes(size)  # which no packing makes small
    layers = [archive(member("file", data=noise))]
    lamina(stocked, "import", "--no-unpack", layout(tmp_path / "noise", layers))
    (layer,) = lamina_json(stocked, "image", "inspect", "noise")["manifest"]["layers"]
    file = stocked / where / "data.mdb"
    blob = lamina(stocked, "content", "get", layer["digest"], encoding="latin-1").stdout
    end = blob.encode("latin-1")[-64:]
    data = file.read_bytes()
    assert end in data
    file.write_bytes(data.replace(end, bytes([end[0] ^ 1]) + end[1:]))  # in pages freed meanwhile too
    done = lamina(stocked, "content", "verify", code=5)
    assert done.stderr.splitlines()[0].startswith(f"lamina: blob {layer['digest']}")
    shown = json.loads(lamina(stocked, "content", "verify", "--json", code=5).stdout)
    assert (shown["damaged"], shown["error"]["kind"]) == ([layer["digest"]], "DataLoss")
    got = lamina(stocked, "content", "get", layer["digest"], code=5, encoding="latin-1")
    assert "is damaged" in got.stderr


def test_a_store_of_a_later_version_is_left_alone(stocked: Path):
    before = dump(stocked)
    (stocked / "format").write_text(f"{FORMAT + 1}\n")
    done = lamina(stocked, "images", code=6)
    assert re.fullmatch(
        rf"lamina: root .* has format {FORMAT + 1}, this lamina knows {FORMAT}; upgrade lamina\n",
        done.stderr,
    )
    (stocked / "format").write_text(f"{FORMAT}\n")
    assert dump(stocked) == before


def test_a_folder_in_use_is_no_root(tmp_path: Path):
    folder = tmp_path / "home"
    folder.mkdir(mode=0o755)
    (folder / "letter").write_text("mine\n")
    done = lamina(folder, "images", code=2)
    assert "is in use for something else" in done.stderr
    assert [path.name for path in folder.iterdir()] == ["letter"]
    assert "is not a folder" in lamina(folder / "letter", "images", code=2).stderr


def test_a_layer_that_fails_keeps_those_below(stocked: Path, tmp_path: Path):
    # A shared base is there already: a bad image on top of it must not take it away.
    image = layout(tmp_path / "image", [BASE, b"not an archive " * 100])
    assert_fails(stocked, "import", image, "--name", "new:1", code=5, says="layer")
    assert lamina_json(stocked, "snapshots", "usage", CHAIN[0])
