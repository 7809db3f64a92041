"""What runs in a container is what image and options say, on each backend: with a real runtime."""

import os
from pathlib import Path
from typing import Any

import pytest
import trio

from benchmarks.corpus import build
from engine.errors import CommandFailed, FailedPrecondition, NotFound
from engine.metadata.containers import ContainerState
from engine.running.options import Bind, ExecOptions, Network, Resources
from engine.testing.archives import archive, member
from tests.conftest import peer
from tests.running.images import deep, image, scratch
from tests.running.scene import Floor, Scene

pytestmark = pytest.mark.root

# The first process of a pid namespace is sent no signal that it has no handler for (kill(2)).
PATIENT = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"


def test_output_and_exit_code(each: Scene) -> None:
    async def work(floor: Floor) -> None:
        launched = await floor.launch("one", "sh", "-c", "echo out; echo err >&2; exit 3")
        assert not launched.already
        ended = await floor.containers.wait("one")
        assert ended.code == 3
        assert launched.status.created < ended.at
        assert sorted(floor.written("one").splitlines()) == [b"err", b"out"]
        status = await floor.containers.status("one")
        assert (status.state, status.exit_code, status.pid) == (ContainerState.STOPPED, 3, 0)

    each.run(work)


def test_what_is_written_is_gone_with_it_and_the_image_as_before(each: Scene) -> None:
    async def work(floor: Floor) -> None:
        await floor.launch("one", "sh", "-c", "echo mine > /etc/passwd; touch /new; ls /")
        assert b"new\n" in await floor.output("one")
        assert await floor.containers.destroy("one")
        await floor.launch("two", "sh", "-c", "head -n 1 /etc/passwd; ls /")
        found = await floor.output("two")
        assert found.startswith(b"root:x:0:0")
        assert b"new\n" not in found

    each.run(work)


def test_signals(each: Scene) -> None:
    async def work(floor: Floor) -> None:
        containers = floor.containers
        await floor.launch("polite", "sh", "-c", PATIENT)
        await floor.writes("polite", b"ready\n")
        assert (await containers.stop("polite", grace_s=20)).code == 7
        assert (await containers.stop("polite")).code == 7, "what has ended is told as it is"
        with pytest.raises(FailedPrecondition, match="does not run"):
            await containers.kill("polite")

        await floor.launch("deaf", "sleep", "1000")
        assert (await containers.stop("deaf", grace_s=0.01)).code == 137
        await floor.launch("killed", "sleep", "1000")
        await containers.kill("killed", "SIGKILL")
        assert (await containers.wait("killed")).code == 137
        await floor.launch("asked", "sh", "-c", PATIENT.replace("TERM", "USR1"))
        await floor.writes("asked", b"ready\n")
        await containers.kill("asked", "USR1")
        assert (await containers.wait("asked")).code == 7

    each.run(work)


def test_the_image_says_how_it_is_stopped(tmp_path: Path, scene: Scene) -> None:
    async def work(floor: Floor) -> None:
        quits = image(tmp_path / "quits", StopSignal="SIGQUIT")
        name = await floor.bring(quits, "quits:latest")
        await floor.launch("one", "sh", "-c", PATIENT.replace("TERM", "QUIT"), image=name)
        await floor.writes("one", b"ready\n")
        assert (await floor.containers.stop("one", grace_s=20)).code == 7
        await floor.launch("two", "sh", "-c", PATIENT, image=name, stop_signal="TERM")
        await floor.writes("two", b"ready\n")
        assert (await floor.containers.stop("two", grace_s=20)).code == 7

    scene.run(work)


def test_users_are_those_of_the_image(each: Scene) -> None:
    async def work(floor: Floor) -> None:
        users = {
            "": b"uid=0(root) gid=0(root) groups=0(root)\n",
            "www": b"uid=33(www) gid=34(www) groups=34(www),77(extra)\n",
            "33": b"uid=33(www) gid=34(www) groups=34(www),77(extra)\n",
            "www:0": b"uid=33(www) gid=0(root) groups=0(root)\n",
            "1234:5": b"uid=1234 gid=5 groups=5\n",
        }
        for number, (user, told) in enumerate(users.items()):
            await floor.launch(f"c{number}", "id", user=user)
            assert await floor.output(f"c{number}") == told, user

    each.run(work)


def test_the_image_says_what_is_run_and_where(tmp_path: Path, scene: Scene) -> None:
    async def work(floor: Floor) -> None:
        about: dict[str, Any] = {
            "Entrypoint": ["sh", "-c", 'echo "$A $B" $(pwd) "$@"', "zero"],
            "Cmd": ["from the image"],
            "Env": ["PATH=/bin", "A=1", "B=2"],
            "WorkingDir": "/srv",
            "User": "www",
        }
        name = await floor.bring(image(tmp_path / "told", **about), "told:latest")
        await floor.launch("as-told", image=name)
        assert await floor.output("as-told") == b"1 2 /srv from the image\n"
        await floor.launch("over", "mine", image=name, env=("B=3",), cwd="/tmp")
        assert await floor.output("over") == b"1 3 /tmp mine\n"
        await floor.launch("own", "hi", image=name, entrypoint=("/bin/echo",))
        assert await floor.output("own") == b"hi\n"

        alone = await floor.bring(scratch(tmp_path / "scratch"), "alone:latest")
        await floor.launch("alone", image=alone)
        assert await floor.output("alone") == b"alone\n"

    scene.run(work)


def test_folders_of_the_host(each: Scene, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "host").write_text("from the host\n")

    async def work(floor: Floor) -> None:
        source = str(tmp_path / "shared")
        binds = (
            Bind(source=source, target="/mnt/rw"),
            Bind(source=source, target="/mnt/ro", readonly=True),
        )
        script = "cat /mnt/ro/host; echo mine > /mnt/rw/mine; touch /mnt/ro/no || echo refused"
        await floor.launch("one", "sh", "-c", f"exec 2>&1; {script}", binds=binds)
        found = await floor.output("one")
        assert found.startswith(b"from the host\n")
        assert found.endswith(b"refused\n")

    each.run(work)
    assert (tmp_path / "shared" / "mine").read_text() == "mine\n"
    assert not (tmp_path / "shared" / "no").exists()


def test_bk_17_images_as_volumes(each: Scene, tmp_path: Path) -> None:
    """Mounted read-only where they are asked for, and held as its own image is."""

    async def work(floor: Floor) -> None:
        data = scratch(tmp_path / "data")
        name = await floor.bring(data, "data:latest")
        script = "exec 2>&1; ls /mnt/data /srv/again; touch /mnt/data/no || echo refused"
        volumes = {"/mnt/data": name, "/srv/again": name}
        await floor.launch("one", "sh", "-c", script, volumes=volumes)
        found = (await floor.output("one")).splitlines()
        assert found.count(b"busybox") == 2
        assert found[-1] == b"refused"

    each.run(work)


def test_read_only(each: Scene) -> None:
    async def work(floor: Floor) -> None:
        script = "exec 2>&1; touch /new || echo refused; touch /dev/shm/new && echo memory"
        await floor.launch("one", "sh", "-c", script, readonly=True)
        found = (await floor.output("one")).splitlines()
        assert found[1:] == [b"refused", b"memory"]

    each.run(work)


def test_a_child_is_in_its_parents_network(each: Scene) -> None:
    script = "ls -l /proc/self/ns | grep -E 'net|uts|ipc|pid|mnt'; echo $$"

    async def work(floor: Floor) -> None:
        await floor.launch("parent", "sh", "-c", f"{script}; sleep 1000", hostname="above")
        await floor.writes("parent", b"\n1\n")
        await floor.launch("child", "sh", "-c", script, parent="parent")
        await floor.launch("other", "sh", "-c", script)
        above = _namespaces(floor.written("parent"))
        below = _namespaces(await floor.output("child"))
        apart = _namespaces(await floor.output("other"))
        same = {kind for kind in above if above[kind] == below[kind]}
        assert same == {"net", "uts", "ipc"}
        assert not {kind for kind in above if above[kind] == apart[kind]}

        await floor.containers.stop("parent", grace_s=0)
        with pytest.raises(FailedPrecondition, match="parent"):
            await floor.launch("late", "true", parent="parent")

    each.run(work)


def _namespaces(listed: bytes) -> dict[str, str]:
    """Return the namespaces of `ls -l /proc/self/ns`, by kind."""
    words = (line.split() for line in listed.decode().splitlines() if " -> " in line)
    return {line[-3]: line[-1] for line in words if not line[-3].endswith("_for_children")}


@pytest.mark.parametrize("count", [64, 400])
def test_bk_18_many_layers(each: Scene, tmp_path: Path, count: int) -> None:
    """More options than a page has room for."""

    async def work(floor: Floor) -> None:
        name = await floor.bring(deep(tmp_path / "deep", count), "deep:latest")
        await floor.launch("one", "sh", "-c", "cat /numbers/*", image=name)
        found = sorted(map(int, (await floor.output("one")).split()))
        assert found == list(range(count - 1))

    each.run(work)


def test_network_and_host_name(scene: Scene) -> None:
    async def work(floor: Floor) -> None:
        script = "ls /sys/class/net; cat /proc/sys/kernel/hostname"
        await floor.launch("none", "sh", "-c", script, hostname="mine")
        assert await floor.output("none") == b"lo\nmine\n"
        await floor.launch("host", "ls", "-l", "/proc/self/ns/net", network=Network.HOST)
        assert os.readlink("/proc/self/ns/net").encode() in await floor.output("host")

    scene.run(work)


def test_resources_are_bounded_and_measured(scene: Scene) -> None:
    async def work(floor: Floor) -> None:
        bounds = Resources(memory=32 << 20, pids=20)
        script = "(i=0; while [ $i -lt 40 ]; do sleep 1000 & i=$((i+1)); done); echo; exec sleep 1000"
        await floor.launch("one", "sh", "-c", script, resources=bounds)
        await floor.writes("one", b"can't fork")
        usage = await floor.containers.usage("one")
        assert usage.consumed
        assert usage.consumed.pids in range(10, 21)
        assert usage.consumed.memory in range(1, 32 << 20)
        assert usage.consumed.memory_limit == 32 << 20
        await floor.containers.update("one", Resources(memory=64 << 20, pids=30))
        usage = await floor.containers.usage("one")
        assert usage.consumed
        assert usage.consumed.memory_limit == 64 << 20
        assert set(usage.disk) == {"/"}

    scene.run(work)


def test_a_file_instead_of_a_program(scene: Scene, tmp_path: Path) -> None:
    async def work(floor: Floor) -> None:
        odd = archive(member("odd", data=b"\x7fELF no program", mode=0o755), member("plain", data=b"x"))
        name = await floor.bring(image(tmp_path / "odd", [odd]), "odd:latest")
        for number, (word, code) in enumerate({"/nothing": 127, "nothing": 127, "/plain": 126}.items()):
            with pytest.raises(CommandFailed, match=word) as caught:
                await floor.launch(f"c{number}", word, image=name)
            assert caught.value.code == code
            assert not floor.exists(f"c{number}")
        with pytest.raises(CommandFailed):
            await floor.launch("kept", "/nothing", image=name, keep=True)
        status = await floor.containers.status("kept")
        assert (status.state, status.exit_code) == (ContainerState.STOPPED, 127)

    scene.run(work)


def test_further_commands(each: Scene, tmp_path: Path) -> None:
    async def work(floor: Floor) -> None:
        await floor.launch("one", "sleep", "1000", env=("A=1",), cwd="/srv")
        with (tmp_path / "said").open("w+b") as said:

            async def run(*args: str, **options: Any) -> tuple[int, bytes]:
                said.seek(0)
                said.truncate()
                command = ExecOptions(args=args, **options)
                code = await floor.containers.execute("one", command, stdout=said.fileno())
                said.seek(0)
                return code, said.read()

            assert await run("sh", "-c", "echo $A $(pwd); exit 4") == (4, b"1 /srv\n")
            told = await run("sh", "-c", "id; echo $A $HOME $(pwd)", user="www", env=["A=2"], cwd="/tmp")
            assert told == (0, b"uid=33(www) gid=34(www) groups=34(www),77(extra)\n2 /srv /tmp\n")
            with pytest.raises(CommandFailed) as caught:
                await run("/none")
            assert caught.value.code == 127
            with pytest.raises(NotFound, match="nobody-here"):
                await run("id", user="nobody-here")
            with trio.move_on_after(0.05):
                await run("sleep", "999")
            assert b"999" not in (await run("ps"))[1]
        await floor.containers.stop("one", grace_s=0)
        with pytest.raises(FailedPrecondition, match="does not run"):
            await floor.containers.execute("one", ExecOptions(args=["true"]))

    each.run(work)


def test_attached(scene: Scene) -> None:
    """Who is the first client misses nothing; who comes later writes to the same input."""

    async def work(floor: Floor) -> None:
        script = "read line; echo got $line; read line; echo and $line; exit 6"
        launched = await floor.launch("one", "sh", "-c", script, stdin=True, attached=True)
        first = launched.attachment
        assert first is not None
        await first.send(b"this\n")
        async with floor.containers.attach("one") as later:
            await later.send(b"that\n")
            parts = [data async for _, data in first]
        assert b"".join(parts) == b"got this\nand that\n"
        assert first.outcome is not None
        assert first.outcome.code == 6
        await first.aclose()
        with pytest.raises(FailedPrecondition, match="does not run"):
            async with floor.containers.attach("one"):
                pass

    scene.run(work)


@pytest.mark.compat
def test_a_real_distribution(each: Scene, tmp_path: Path) -> None:
    """Debian as debootstrap makes it: dynamic programs, links for alternatives, its own users."""
    peer("debootstrap")

    async def work(floor: Floor) -> None:
        name = await floor.bring(build(tmp_path / "debian", "small", "gzip"), "debian:latest")
        script = (
            "exec 2>&1; . /etc/os-release; echo $ID; id; perl -e 'print 6*7'; ls /proc/self/fd | wc -l"
        )
        await floor.launch("one", "bash", "-c", script, image=name, user="nobody")
        assert await floor.output("one") == (
            b"debian\nuid=65534(nobody) gid=65534(nogroup) groups=65534(nogroup)\n424\n"
        )
        assert (await floor.containers.wait("one")).code == 0
        await floor.launch("two", "apt-get", "--version", image=name, readonly=True)
        assert (await floor.output("two")).startswith(b"apt 2")

    each.run(work)
