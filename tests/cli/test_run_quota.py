"""`lamina run --storage-opt size=SIZE`: what a container may write, by the command line."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.container_places import Place, place_at
from tests.filesystems import formatted, in_memory

pytestmark = pytest.mark.root

_FILL = ("sh", "-c", "dd if=/dev/zero of=/data bs=64k count=200 2>&1; rm /data; echo again >/data")


@pytest.mark.quota
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_mc_15_a_container_that_is_full_is_told_so(tmp_path: Path, busybox: Path, kind: str):
    make = ("-Oproject,quota", "-Equotatype=prjquota") if kind == "ext4" else ()
    (tmp_path / "disk").mkdir()
    with (
        formatted(kind, tmp_path / "image", tmp_path / "disk", "prjquota", make=make) as disk,
        place_at(disk / "root", busybox) as place,
    ):
        full = place("run", "--rm", "--storage-opt", "size=4m", "busybox", *_FILL).stdout
        assert "No space left" in full or "quota exceeded" in full.lower(), full
        free = place("run", "--rm", "busybox", *_FILL).stdout
        assert "200+0 records out" in free


@pytest.fixture
def place(tmp_path: Path, busybox: Path) -> Iterator[Place]:
    with in_memory(tmp_path / "disk") as disk, place_at(disk / "root", busybox) as found:
        yield found


def test_where_there_are_no_quotas_it_is_said_and_nothing_is_made(place: Place):
    done = place("run", "--storage-opt", "size=1g", "busybox", "true", code=1)
    assert "mount it with the option prjquota" in done.stderr
    assert done.stderr.count("\n") == 1
    assert place.listed() == {}


@pytest.mark.parametrize(
    ("word", "said"),
    [("1g", "there is only size=SIZE"), ("size=x", "is no size"), ("a=1", "there is only")],
)
def test_what_else_docker_takes_is_refused(place: Place, word: str, said: str):
    assert said in place("run", "--storage-opt", word, "busybox", "true", code=2).stderr
