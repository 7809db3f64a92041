"""What an import and an unpack cost in calls, not in time: a change that makes them dearer is seen here.

The bounds are what was counted, and a little. Who raises one says in the commit what is had for it.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from engine.app import Engine, open_engine
from engine.testing.archives import archive, layout, member
from tests.command import LAMINA, environment, lamina
from tests.conftest import AMD64, peer

pytestmark = pytest.mark.root

FILES, FOLDERS, SIZE = 2000, 40, 3000
# A call that another thread's stands within is two lines; the second says what came of it.
_CALL = re.compile(r"^[0-9]+ +(?:<\.\.\. )?(\w+)(?:\(| resumed>).* = ([0-9]+)", re.MULTILINE)
# What a scheduler decides, how an interpreter starts, and memory.
_ELSEWHERE = {"futex", "brk", "mmap", "munmap", "madvise", "sched_yield", "rt_sigaction", "mprotect"}


def many_files(number: int = 0) -> bytes:
    folders = [member(f"{number}-{folder}/", "5") for folder in range(FOLDERS)]
    files = [member(f"{number}-{n % FOLDERS}/{n}", data=b"x" * SIZE) for n in range(FILES)]
    return archive(*folders, *files)


def traced(root: Path, calls: str, *words: object) -> list[tuple[str, int]]:
    """Run a command; return the system calls of its processes that succeeded, and what they returned."""
    trace = root.with_name("trace")
    strace = [peer("strace"), "-f", "-qq", "-s", "0", "-e", f"trace={calls}", "-o", trace]
    command = [*LAMINA, "--root", root, *words]
    subprocess.run([*strace, *command], check=True, capture_output=True, env=environment())
    found = _CALL.findall(trace.read_text(encoding="utf-8"))
    return [(call, int(result)) for call, result in found]


def test_system_calls_of_a_file(tmp_path: Path) -> None:
    """A file takes openat, write, utimensat and close, a folder mkdirat, openat, close and utimensat."""
    root = tmp_path / "root"
    counts = []
    for number, layer in enumerate((archive(member("one")), many_files())):
        image = layout(tmp_path / f"image-{number}", [layer], tag=f"x/{number}:1", compression="none")
        lamina(root, "import", "--no-unpack", image)
        calls = traced(root, "all", "unpack", "--snapshotter", "overlay", f"x/{number}:1")
        counts.append(Counter(call for call, _ in calls if call not in _ELSEWHERE))
    more = counts[1] - counts[0]
    per_file = {call: more[call] / FILES for call in ("openat", "write", "utimensat", "close")}
    assert per_file == pytest.approx(dict.fromkeys(per_file, 1.0), abs=0.1), per_file
    assert sum(more.values()) / (FILES + FOLDERS) < 4.3, more.most_common(10)


def test_bytes_that_are_written(tmp_path: Path) -> None:
    """Packed bytes once, into the store; unpacked ones once, into files; and little else."""
    root, layer = tmp_path / "root", many_files()
    image = layout(tmp_path / "image", [layer], compression="none")
    calls = traced(root, "write,writev,pwrite64,pwritev", "import", "--snapshotter", "overlay", image)
    written = sum(result for _, result in calls)
    assert written < len(layer) * 1.15 + FILES * SIZE + (3 << 20), written


def counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Engine], Awaitable[object]]
) -> tuple[int, int]:
    """Return how often `work` hops to a thread, and how many transactions change records."""
    hops = 0
    run_sync = trio.to_thread.run_sync

    async def watched(*arguments: object, **more: object) -> object:
        nonlocal hops
        hops += 1
        return await run_sync(*arguments, **more)  # type: ignore[arg-type]

    async def main() -> int:
        async with open_engine(tmp_path / "root", platform=AMD64) as engine:
            before = engine.stores.root.meta.transactions()
            monkeypatch.setattr(trio.to_thread, "run_sync", watched)
            await work(engine)
            monkeypatch.setattr(trio.to_thread, "run_sync", run_sync)
            return engine.stores.root.meta.transactions() - before

    return trio.run(main), hops


@pytest.mark.parametrize("layers", [1, 20])
def test_transactions_and_thread_hops_of_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    image = layout(tmp_path / "image", [archive(member(f"{n}")) for n in range(layers)], tag="x:1")

    async def import_it(engine: Engine) -> None:
        await engine.import_image(image)

    async def unpack_it(engine: Engine) -> None:
        await engine.unpack("x:1", snapshotter="overlay")

    transactions, hops = counted(tmp_path, monkeypatch, import_it)
    assert transactions <= 5 + layers  # a blob each
    assert hops <= 4, "the import is one piece of work on one thread"
    transactions, hops = counted(tmp_path, monkeypatch, unpack_it)
    # A layer is prepared in one and committed in one, if no other is committed with it.
    assert transactions <= 8 + 2 * layers
    # A lock, a look for its data, its folder; then what to seal and the commit, if it is alone in that.
    assert hops <= 16 + 5 * layers
