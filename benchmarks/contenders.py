"""Who is timed: lamina with each backend, and what its peers (`peers`) have in common with it."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.group import Group, Step
from benchmarks.images import Image

__all__ = ["LAMINA", "STAGES", "Contender", "Ready", "Unable", "lamina"]

LAMINA = (sys.executable, "-m", "engine")

STAGES = {"unpack": "unpack only", "import": "import and unpack"}
"""What is timed: all that comes before is done by then."""

Ready = Callable[[Image, Path, Group], AbstractContextManager[Sequence[Step]]]
"""Makes all ready in an empty folder, gives the steps to time, and takes down what it started."""


class Unable(Exception):
    """A contender can't do this here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One way to get from an image to a root file system."""

    name: str
    stage: str
    ready: Ready
    is_ours: bool = False


def lamina(backend: str, stage: str, durability: str) -> Contender:
    """Return lamina: as two commands, of which the second is timed, or as one."""
    how = ["-q", "--snapshotter", backend, "--durability", durability]

    @contextmanager
    def ready(image: Image, folder: Path, group: Group) -> Iterator[Sequence[Step]]:
        command = [*LAMINA, "--root", str(folder / "root")]
        if stage == "unpack":
            group.run([[*command, "import", "-q", "--no-unpack", "--name", "bench", str(image.archive)]])
            yield [[[*command, "unpack", *how, "bench"]]]
        else:
            yield [[[*command, "import", *how, str(image.archive)]]]

    return Contender(f"lamina {backend} {durability}", stage, ready, is_ours=True)
