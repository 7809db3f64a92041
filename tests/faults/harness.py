"""Runs a command while one kind of system call fails, and checks what it leaves.

Sync. The faults are strace's: the kernel never sees the call, the command sees the error. The command is
then a typed error in one line, or it did without the call; nothing that was there is lost, and the same
command works once the cause is gone.
"""

import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from engine.images.states import parts_of
from engine.stores import host_platform, open_stores
from engine.testing.archives import archive, layout, member
from tests.command import LAMINA, environment, lamina
from tests.conftest import peer

__all__ = [
    "COMMANDS",
    "KILL",
    "Outcome",
    "assert_kept",
    "assert_whole",
    "copied",
    "run_with",
    "template",
]

_TIMEOUT_S = 120
_WORKER_DIED = 7
_CODES = {0, 1, 5, 6, _WORKER_DIED, 8, -signal.SIGKILL}
KILL = "KILL"
_KEPT, _LABEL = "kept:1", "example.org/told"

COMMANDS = {
    "import": ("import", "--snapshotter", "overlay", "--name", "new:1", "{images}/new"),
    "label": ("image", "label", _KEPT, f"{_LABEL}=yes"),
    "rm": ("image", "rm", "spare:1"),
    "gc": ("gc",),
    "fsck": ("fsck", "--repair"),
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and how many calls of it failed."""

    code: int
    messages: str
    injected: int


def template(folder: Path) -> Path:
    """Make a store with images and garbage, and an image beside it to import; return its folder."""
    folder.mkdir(exist_ok=True)
    base = archive(member("base", data=b"base" * 30_000))
    for name in ("kept", "spare", "gone", "new"):
        layout(folder / name, [base, archive(member(name, data=name.encode() * 1000))])
    for name in ("kept", "spare", "gone"):
        words = ["import", "--snapshotter", "overlay", "--name", f"{name}:1", folder / name]
        lamina(folder / "root", *words)
    lamina(folder / "root", "image", "rm", "gone:1")
    return folder


def copied(made: Path, folder: Path) -> Path:
    """Return a copy of the store of a template."""
    subprocess.run(["cp", "-a", made / "root", folder / "root"], check=True)  # knows whiteouts
    return folder / "root"


def run_with(made: Path, root: Path, command: str, call: str, error: str, when: str) -> Outcome:
    """Run a command and have those of its calls fail that `when` says, as strace(1) has it.

    Instead of an error it may be KILL, which ends the process at the call.
    """
    words = [word.format(images=made) for word in COMMANDS[command]]
    trace = root.with_name("trace")
    what = "signal=KILL" if error == KILL else f"error={error}"
    inject = ["-e", f"trace={call}", "-e", f"inject={call}:{what}:when={when}"]
    faster = [] if error == KILL else ["--seccomp-bpf"]  # with which strace 6.1 sends no signals
    traced = [peer("strace"), *faster, "-f", "-qq", "-o", trace, *inject]
    done = subprocess.run(
        [*traced, *LAMINA, "--root", str(root), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
        env=environment(),
    )
    injected = trace.read_text(encoding="utf-8", errors="replace").count("(INJECTED)")
    injected += error == KILL and done.returncode in {-signal.SIGKILL, _WORKER_DIED}
    return Outcome(done.returncode, done.stderr, injected)


def assert_whole(made: Path, root: Path, command: str, outcome: Outcome) -> None:
    """Check how a command ended, that nothing is lost, and that it works now."""
    assert outcome.code in _CODES, outcome
    assert "Traceback" not in outcome.messages, outcome.messages
    if outcome.code > 0:
        errors = [line for line in outcome.messages.splitlines() if _is_error(line)]
        assert len(errors) == 1, outcome.messages
    assert_kept(root)
    if command == "label" and outcome.code == 0:
        assert _labels(root)[_LABEL] == "yes"
    if command == "import" and outcome.code == 0:
        _assert_image(root, "new:1")
    words = [word.format(images=made) for word in COMMANDS[command]]
    done_before = command == "rm" and not _has(root, "spare:1")
    lamina(root, *words, code=3 if done_before else 0)
    _assert_image(root, _KEPT)
    if command == "import":
        _assert_image(root, "new:1")
    lamina(root, "gc")
    lamina(root, "fsck")


def _is_error(line: str) -> bool:
    """Say whether this is what a command ends with, not what it tells on the way."""
    return re.match(r"lamina: (?!kept: )", line) is not None


def _labels(root: Path) -> dict[str, str]:
    with open_stores(root, "default", host_platform()) as stores:
        return dict(stores.images.get(_KEPT).labels)


def _has(root: Path, name: str) -> bool:
    with open_stores(root, "default", host_platform()) as stores:
        return stores.images.named(name) is not None


def _assert_image(root: Path, name: str) -> None:
    with open_stores(root, "default", host_platform()) as stores:
        image = stores.resolve(stores.images.get(name).target)
        for part in (*image.path, image.manifest.config, *image.manifest.layers):
            stores.content.verify(part.key)
        assert "overlay" in parts_of(stores, image).unpacked


def assert_kept(root: Path) -> None:
    _assert_image(root, _KEPT)
    with open_stores(root, "default", host_platform()) as stores:
        checked = stores.check()
    assert not checked.left, checked.left
