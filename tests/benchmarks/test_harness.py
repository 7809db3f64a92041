"""The harness itself: one run of it, and that nothing stays, also when it is interrupted."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.fresh import MEMORY, prefix, sweep
from tests.benchmarks.test_images import tiny
from tests.conftest import peer
from tests.processes import until

pytestmark = pytest.mark.root

HARNESS = (sys.executable, "-m", "benchmarks")


def left(pid: int) -> list[str]:
    """Return what a run left: folders, mounts, loop devices and control groups."""
    mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    loops = subprocess.run(["losetup", "-a"], capture_output=True, text=True, check=True).stdout
    paths = [*MEMORY.iterdir(), *Path(tempfile.gettempdir()).iterdir()]
    paths += Path("/sys/fs/cgroup").glob("**/lamina-group-*")
    return [line for line in [*mounts, *loops.splitlines(), *map(str, paths)] if _ours(pid, line)]


def _ours(pid: int, line: str) -> bool:
    return any(prefix(what, pid) in line for what in ("fs", "group", "images"))


def test_one_run_of_all_of_it(tmp_path: Path):
    archive = tiny("big-layer", tmp_path)
    out, page = tmp_path / "out.json", tmp_path / "out.md"
    words = [
        "unpack",
        archive,
        "--peer",
        "tar",
        "--repeat",
        "1",
        "--durability",
        "full",
        "--stage",
        "unpack",
    ]
    with subprocess.Popen(
        [*HARNESS, *words, "--json", out, "--markdown", page],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        table, messages = started.communicate()
    assert started.returncode == 0, messages
    assert "lamina overlay full" in table
    (image,) = json.loads(out.read_text())["images"]
    runs = {(each["name"], each["stage"]): each["costs"] for each in image["contenders"]}
    assert {name: len(costs) for name, costs in runs.items()} == {
        ("lamina overlay full", "unpack"): 1,
        ("tar", "unpack"): 1,
    }
    assert all(cost["user"] + cost["system"] > 0 for costs in runs.values() for cost in costs)
    assert runs["lamina overlay full", "unpack"][0]["own"] > 10**6
    assert page.read_text().count("| lamina overlay full |") == 1
    assert left(started.pid) == []


def test_one_run_of_pulls(tmp_path: Path):
    for program in ("docker-registry", "skopeo", "ctr"):
        peer(program)
    out = tmp_path / "out.json"
    words = ["pull", tiny("one-file", tmp_path), "--figure", "far", "--repeat", "1", "--json", out]
    with subprocess.Popen([*HARNESS, *words], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout
        told = started.stdout.read()
    assert "a pull over 20 ms and 100 MB/s" in told
    turns = json.loads(out.read_text())["turns"]
    found = {name: (cost["requests"], cost["sent"] > 0) for name, (cost,) in turns.items()}
    assert found == {"far": (4, True), "transfer": (3, True), "unpack": (0, False)}
    assert left(started.pid) == []


def test_one_run_of_containers(tmp_path: Path):
    for program in ("podman", "busybox"):
        peer(program)
    out, page = tmp_path / "out.json", tmp_path / "out.md"
    words = ["containers", "--figure", "chain,many", "--repeat", "1", "--many", "3"]
    with subprocess.Popen(
        [*HARNESS, *words, "--json", out, "--markdown", page], stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout
        told = started.stdout.read()
    assert "beside `podman create` and `podman rm`" in told
    turns = json.loads(out.read_text())["turns"]
    assert {name: len(seconds) for name, seconds in turns.items()} == {
        "provision and destroy": 1,
        "podman create and rm": 1,
        "beside many": 1,
        "beside none": 1,
        "recover": 1,
        "recover unmounted": 1,
    }
    assert "| recover of 3 containers, seconds |" in page.read_text()
    assert left(started.pid) == []


def test_nothing_stays_of_an_interrupted_run(tmp_path: Path):
    archive = tiny("one-file", tmp_path)
    words = ["unpack", archive, "--peer", "none", "--repeat", "1000"]
    with subprocess.Popen([*HARNESS, *words], stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr
        until(lambda: "lamina" in started.stderr.readline())
        started.send_signal(signal.SIGINT)
        started.stderr.read()
    assert started.returncode == 130
    assert left(started.pid) == []


def test_what_an_interrupt_kept_from_being_removed_goes_at_the_end():
    folder = MEMORY / f"{prefix('fs')}x"
    mounted = folder / "mnt"
    mounted.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", mounted], check=True)
    sweep()
    assert left(os.getpid()) == []


def test_the_commands_are_listed():
    done = subprocess.run([*HARNESS, "--help"], capture_output=True, text=True, check=True)
    for command in (
        "unpack",
        "sharing",
        "pull",
        "containers",
        "store",
        "ingest",
        "hostile",
        "corpus",
        "render",
    ):
        assert f"  {command}" in done.stdout
