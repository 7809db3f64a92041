"""The example of docs/containers.md does what it says, when it is killed in the middle too."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.testing.archives import tar_layout
from tests.command import dump
from tests.conftest import peer
from tests.processes import until
from tests.running.images import image, scratch
from tests.running.scene import Scene, mounted_below

pytestmark = pytest.mark.root

_DEADLINE_S = 60
_EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "runtime.py"


class Running:
    """The example at work, and what it says."""

    def __init__(self, root: Path, file: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, _EXAMPLE, root, file],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []

    def says(self, what: str) -> str:
        """Return the next line that has some words in it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if what in line:
                return line
        raise AssertionError(f"it never said {what!r}, but {self.said} {self.process.communicate()}")

    def ends(self, code: int = 0) -> str:
        """Wait for its end; return what else it said."""
        out, errors = self.process.communicate(timeout=60)
        assert self.process.returncode == code, errors
        return out


@contextmanager
def running(root: Path, file: Path, tasks: Mapping[str, Any]) -> Iterator[Running]:
    """Have the example run some tasks."""
    file.write_text(json.dumps(tasks))
    started = Running(root, file)
    deadline = threading.Timer(_DEADLINE_S, started.process.kill)  # then it says nothing more
    deadline.start()
    try:
        yield started
    finally:
        deadline.cancel()
        started.process.kill()
        started.process.communicate()


@pytest.fixture(name="root")
def _root(tmp_path: Path) -> Iterator[Path]:
    """A place for a store, where no container stays whatever fails."""
    yield tmp_path / "root"
    Scene(tmp_path / "root", tmp_path).clear()


def test_mc_09_10_it_goes_on_where_it_was_killed(tmp_path: Path, root: Path) -> None:
    """Tasks outlive it, are found again, and go with their images when not wanted."""
    peer("runc")
    file = tmp_path / "tasks.json"
    archive = str(tar_layout(image(tmp_path / "layout"), tmp_path / "box.tar"))
    other = str(scratch(tmp_path / "scratch"))
    lasting = {"image": archive, "args": ["sleep", "1000"], "restart": True}
    passing = {"image": other, "args": ["sleep", "0.1"]}
    failing = {"image": archive, "args": ["sh", "-c", "exit 5"]}

    with running(root, file, {"lasting": lasting, "passing": passing, "failing": failing}) as first:
        pid = int(first.says("lasting runs as process").split()[-1])
        first.process.send_signal(signal.SIGKILL)
        first.ends(-signal.SIGKILL)
    os.kill(pid, 0)

    with running(root, file, {"lasting": lasting, "failing": failing}) as second:
        second.says("failing ended with 5")
        assert "lasting is still running\n" in second.said
        assert not any("lasting runs as process" in line for line in second.said)
        os.kill(pid, signal.SIGKILL)
        second.says("lasting ended with 137")
        pid = int(second.says("lasting runs as process").split()[-1])
        second.process.send_signal(signal.SIGTERM)
        second.ends(-signal.SIGTERM)

    with running(root, file, {}) as third:
        third.says("lasting was cleared away")
        third.ends()
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert not mounted_below(root)
    left = dump(root)
    assert (left["containers"], left["images"], left["snapshots"], left["blobs"]) == ([], [], [], [])
