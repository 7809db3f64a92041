"""Containers made, run and removed, beside runc and podman.

All turns of a figure are taken one after the other, again and again, in one file system in memory that
was just made: a slow moment of the machine hits all. The first round warms up. Figures:

    run      provision, `runc run` of /bin/true and destroy in a process that has the engine open, and
             launch, wait and destroy, beside `runc run` of a bundle that was made beforehand
    shell    `lamina run`, beside Python with the same imports and `runc run`
    chain    provision and destroy on 20 layers, beside `podman create` and `podman rm`
    many     provision beside 1,000 containers and beside none, and recover of those

Needs root, runc and a static busybox, for `chain` podman. Exits 1 if a figure is over its target.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import count
from pathlib import Path

import msgspec
import trio

from benchmarks.contained import BEGIN, END, ContainerReport, figures, markdown, merged
from benchmarks.contenders import LAMINA
from benchmarks.fresh import fresh_file_system
from benchmarks.machine import about
from benchmarks.render import add_outputs, check_outputs
from benchmarks.tables import placed
from benchmarks.unpack import listed
from engine.app import Engine, open_engine
from engine.mount import deactivate
from engine.oci.execution import parse_execution
from engine.provision.provisioned import Provisioned
from engine.provision.provisioner import Provisioner
from engine.running.bundle import Setting, make_spec, write_bundle
from engine.running.containerizer import open_containerizer
from engine.running.options import RunOptions
from engine.stores import host_platform
from engine.testing.archives import archive, layout, member

__all__ = ["main"]

_IMAGE, _BACKEND = "bench:1", "overlay"
_COMMAND = RunOptions(args=["/bin/true"])
_LAYERS = 20

Turn = Callable[[], Awaitable[object]]
Turns = Mapping[str, Sequence[float]]


def main(arguments: Sequence[str]) -> int:
    """Measure what the options ask for, or show what was measured before."""
    options = _parser().parse_args(arguments)
    check_outputs(options)
    if options.read:
        decode = partial(msgspec.json.decode, type=ContainerReport)
        report = merged([decode(file.read_bytes()) for file in options.read])
    else:
        report = _measured(options)
    found = figures(report)
    print(*found, sep="\n")
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if options.markdown:
        page = options.markdown.read_text() if options.markdown.exists() else ""
        options.markdown.write_text(placed(page, markdown(report), BEGIN, END))
    if options.plot:
        from benchmarks.plot import draw_shares  # which alone needs matplotlib

        bounded = {f"{f.what}: {f.value:.2f}": f.value / f.most for f in found if f.most}
        draw_shares("containers", bounded, options.plot)
    return int(any(figure.misses for figure in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks containers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--figure", type=listed(*_FIGURES), default=list(_FIGURES), help=f"{','.join(_FIGURES)} (all)"
    )
    parser.add_argument("--repeat", type=int, default=30, help="turns of each, after the first (30)")
    parser.add_argument("--many", type=int, default=1000, help="containers of `many` (1000)")
    parser.add_argument("--read", nargs="+", type=Path, help="show what --json wrote instead")
    add_outputs(parser)
    return parser


def _measured(options: argparse.Namespace) -> ContainerReport:
    turns: dict[str, list[float]] = {}
    for name in options.figure:
        with fresh_file_system() as folder:
            print(f"measuring {name}", file=sys.stderr)
            found = trio.run(_FIGURES[name], folder, options)
            turns |= {turn: list(seconds) for turn, seconds in found.items()}
    return ContainerReport(about([]) | _versions(), options.many, _LAYERS, turns)


def _versions() -> dict[str, str]:
    found = {}
    for program in ("runc", "podman"):
        if shutil.which(program):
            said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
            found[program] = said.stdout.split()[2]
    return found


async def _in_turn(turns: Mapping[str, Turn], repeat: int) -> Turns:
    """Let all have their turns, and return how long each took; the first warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(repeat + 1):
        for name, turn in turns.items():
            start = time.perf_counter()
            await turn()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


async def _command(*words: str | Path) -> str:
    """Run a command to its end, and return what it wrote. CalledProcessError if it fails."""
    done = await trio.run_process(list(map(str, words)), capture_stderr=True, capture_stdout=True)
    return done.stdout.decode()


# -- images and bundles -------------------------------------------------------------------------


def _image(folder: Path, layers: int = 1) -> Path:
    """Write an image of a static busybox, and above it layers of a file each."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise SystemExit("no busybox, of which the image is made: install busybox-static")
    base = archive(
        *(member(name, "5", mode=0o755) for name in ("bin", "etc", "proc", "sys", "dev", "tmp")),
        member("bin/busybox", data=Path(busybox).read_bytes(), mode=0o755),
        member("bin/true", "2", link="busybox"),
    )
    above = [archive(member(f"etc/{n}", data=b"%d" % n)) for n in range(1, layers)]
    host = host_platform()
    platform = {"os": host.os, "architecture": host.architecture}
    return layout(folder, [base, *above], platform=platform, config={"config": {"Cmd": ["/bin/true"]}})


async def _import(engine: Engine, image: Path) -> None:
    await engine.import_image(image, name=_IMAGE, snapshotter=_BACKEND)


def _bundle(folder: Path, made: Provisioned) -> None:
    """Write the bundle of a container."""
    setting = Setting(unique=made.container.unique, rootfs=made.rootfs, host=host_platform())
    write_bundle(folder, make_spec(parse_execution(made.config), _COMMAND, setting))


def _runc(folder: Path, bundle: Path, name: str) -> Sequence[str | Path]:
    return ("runc", "--root", folder / "runc", "run", "--bundle", bundle, name)


# -- the figures --------------------------------------------------------------------------------


async def _run(folder: Path, options: argparse.Namespace) -> Turns:
    image, numbers = _image(folder / "image"), count()
    async with open_engine(folder / "root") as engine, open_containerizer(engine) as containers:
        await _import(engine, image)
        provisioner = Provisioner(engine)
        standing = await provisioner.provision("standing", _IMAGE, snapshotter=_BACKEND)
        _bundle(standing.folder, standing)

        async def beforehand() -> None:
            await _command(*_runc(folder, standing.folder, f"bench-{next(numbers)}"))

        async def provisioned() -> None:
            name = f"c{next(numbers)}"
            made = await provisioner.provision(name, _IMAGE, snapshotter=_BACKEND)
            _bundle(made.folder, made)
            await _command(*_runc(folder, made.folder, made.container.unique))
            await provisioner.destroy(name)

        async def launched() -> None:
            name = f"c{next(numbers)}"
            await containers.launch(name, _IMAGE, _COMMAND, snapshotter=_BACKEND)
            await containers.wait(name)
            await containers.destroy(name)

        turns = {"runc run": beforehand, "provisioned": provisioned, "launched": launched}
        found = await _in_turn(turns, options.repeat)
        await provisioner.destroy("standing")
    return found


async def _chain(folder: Path, options: argparse.Namespace) -> Turns:
    if not shutil.which("podman"):
        raise SystemExit("no podman, which `chain` is beside; leave it out with --figure")
    image, numbers = _image(folder / "image", _LAYERS), count()
    podman = _podman(folder)
    await _command(*podman, "pull", "-q", f"oci:{image}:latest")
    podman_id = (await _command(*podman, "images", "-q")).strip()
    async with open_engine(folder / "root") as engine:
        await _import(engine, image)
        provisioner = Provisioner(engine)

        async def ours() -> None:
            name = f"c{next(numbers)}"
            await provisioner.provision(name, _IMAGE, snapshotter=_BACKEND)
            await provisioner.destroy(name)

        async def theirs() -> None:
            name = f"c{next(numbers)}"
            await _command(*podman, "create", "-q", "--name", name, "--network", "none", podman_id)
            await _command(*podman, "rm", name)

        turns = {"provision and destroy": ours, "podman create and rm": theirs}
        return await _in_turn(turns, options.repeat)


def _podman(folder: Path) -> Sequence[str]:
    """Return the beginning of a podman command that keeps all it has in a folder."""
    places = ["--root", str(folder / "podman"), "--runroot", str(folder / "run")]
    places += ["--tmpdir", str(folder / "tmp"), "--events-backend", "none"]
    config = folder / "containers.conf"
    config.write_text('[engine]\nlock_type = "file"\n')  # else they stay in /dev/shm
    driver = ["--storage-driver", "overlay", "--cgroup-manager", "cgroupfs"]
    return ["env", f"CONTAINERS_CONF={config}", "podman", *places, *driver]


async def _many(folder: Path, options: argparse.Namespace) -> Turns:
    image = _image(folder / "image", _LAYERS)
    async with AsyncExitStack() as stack:
        provisioners = {}
        for name in ("beside many", "beside none"):
            engine = await stack.enter_async_context(open_engine(folder / name.replace(" ", "-")))
            await _import(engine, image)
            provisioners[name] = Provisioner(engine)
        full = provisioners["beside many"]
        made = [await _next(full, f"many-{number}") for number in range(options.many)]
        numbers = count()
        seconds: dict[str, list[float]] = {name: [] for name in provisioners}
        for number in range(options.repeat + 1):
            for name, provisioner in provisioners.items():
                container = f"c{next(numbers)}"
                start = time.perf_counter()
                await _next(provisioner, container)
                taken = time.perf_counter() - start
                await provisioner.destroy(container)  # which is not what is measured
                if number:
                    seconds[name].append(taken)
    return seconds | await _recovered(folder / "beside-many", made)


async def _next(provisioner: Provisioner, name: str) -> Provisioned:
    return await provisioner.provision(name, _IMAGE, snapshotter=_BACKEND)


async def _recovered(root: Path, made: Sequence[Provisioned]) -> Turns:
    """Recover all containers by engines that were just opened: as they are, and with none mounted."""
    known = [one.container.id for one in made]
    seconds: dict[str, list[float]] = {}
    for name in ("recover", "recover unmounted"):
        async with open_engine(root) as engine:
            if name == "recover unmounted":
                for one in made:
                    deactivate(one.rootfs)
            start = time.perf_counter()
            found = await Provisioner(engine).recover(known)
            seconds[name] = [time.perf_counter() - start]
            if len(found.kept) != len(known):
                raise SystemExit(f"{name}: kept {len(found.kept)} of {len(known)}: {found.failed}")
    return seconds


_LOADED = """
import sys
file, *sys.argv = sys.argv[1:]
from engine.cli.program import run
code = run()
names = [name for name in sys.modules if name.partition(".")[0] in {"engine", "snapshotters"}]
with open(file, "w") as out:
    out.write("import os, " + ", ".join(names) + "; os._exit(0)")  # as the command ends, too
sys.exit(code)
"""


async def _shell(folder: Path, options: argparse.Namespace) -> Turns:
    image, bundle, numbers = _image(folder / "image"), folder / "bundle", count()
    root = folder / "root"
    async with open_engine(root) as engine:
        await _import(engine, image)
        provisioner = Provisioner(engine)
        made = await provisioner.provision("standing", _IMAGE, snapshotter=_BACKEND)
        bundle.mkdir()
        _bundle(bundle, made)
        words = ("--root", str(root), "run", "--rm", _IMAGE, "/bin/true")
        loaded = folder / "loaded"
        await _command(sys.executable, "-c", _LOADED, loaded, "lamina", *words)
        imports = loaded.read_text()
        turns: dict[str, Turn] = {
            "runc run from the shell": lambda: _command(
                *_runc(folder, bundle, f"bench-{next(numbers)}")
            ),
            "imports": lambda: _command(sys.executable, "-c", imports),
            "lamina run": lambda: _command(*LAMINA, *words),
        }
        found = await _in_turn(turns, options.repeat)
        await provisioner.destroy("standing")
    return found


_FIGURES: Mapping[str, Callable[[Path, argparse.Namespace], Awaitable[Turns]]] = {
    "run": _run,
    "shell": _shell,
    "chain": _chain,
    "many": _many,
}
