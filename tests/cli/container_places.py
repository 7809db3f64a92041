"""A store with an image that runs, for tests of the commands on containers, which clears up after them.

Sync.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.command import LAMINA, environment, lamina, lamina_json
from tests.processes import until

__all__ = ["Place", "place_at"]


class Place:
    """A store with an image `busybox:latest`, and commands on it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(
        self, *words: object, code: int = 0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in a process of its own if it needs one."""
        if words[0] in {"run", "exec", "attach", "logs"}:
            options = {"stdin": subprocess.DEVNULL, **options}
            if "input" in options:
                options.pop("stdin")
        return lamina(self.root, *words, code=code, **options)

    def start(self, *words: object, **options: Any) -> subprocess.Popen[bytes]:
        """Start a command, whose streams are pipes unless something else is said."""
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [*LAMINA, "--root", str(self.root), *map(str, words)]
        return subprocess.Popen(command, env=environment(), **{**streams, **options})

    def listed(self) -> dict[str, dict[str, Any]]:
        """Return all containers by name."""
        return {row["name"]: row for row in lamina_json(self.root, "ps", "-a")}

    def until_state(self, name: str, state: str) -> None:
        """Wait until a container is so."""
        until(lambda: self.listed().get(name, {}).get("state") == state)

    def until_gone(self, name: str) -> None:
        """Wait until there is no such container."""
        until(lambda: name not in self.listed())

    def clear(self) -> None:
        """Remove all containers; nothing of them may stay."""
        names = list(self.listed())
        if names:
            lamina(self.root, "rm", "-f", *names)
        left = [path.name for path in (self.root / "containers").glob("*")]
        assert left == []


@contextmanager
def place_at(root: Path, image: Path) -> Iterator[Place]:
    """Give a store at `root` with an image, for the length of a block."""
    lamina(root, "import", "--snapshotter", "overlay", "--name", "busybox", image)
    place = Place(root)
    try:
        yield place
    finally:
        place.clear()
