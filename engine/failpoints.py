"""Named points in the code at which a test can make the process die, fail or wait.

Sync; safe from any thread. Nothing happens unless a point is armed. A test arms a point in its own
process (`armed`), or in a child through the command line's LAMINA_FAILPOINTS=name=action[@nth],…
with the actions `kill` (SIGKILL to itself), `stop` (SIGSTOP: it hangs), `error` (EngineError), `enospc`
and `eio` (OSError).
"""

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import EngineError, InvalidArgument

__all__ = ["NAMES", "arm", "armed", "hit", "rearm", "terms"]

NAMES = frozenset(
    {
        "content.ingest.begun",
        "content.ingest.written",
        "content.commit.before",
        "content.commit.after",
        "import.labelled",
        "import.named",
        "pull.labelled",
        "pull.named",
        "hold.pulled",
        "hold.taken",
        "hold.released",
        "pull.resolved",
        "snapshot.prepare.recorded",
        "snapshot.prepare.made",
        "snapshot.commit.settled",
        "snapshot.commit.flushed",
        "snapshot.commit.recorded",
        "apply.entry",
        "apply.finish",
        "unpack.anchored",
        "mount.recorded",
        "mount.prepared",
        "mount.activated",
        "umount.done",
        "provision.recorded",
        "provision.brought",
        "provision.held",
        "provision.prepared",
        "provision.mounted",
        "provision.settled",
        "destroy.recorded",
        "destroy.unmounted",
        "destroy.discarded",
        "destroy.emptied",
        "launch.preparing",
        "launch.prepared",
        "launch.starting",
        "launch.started",
        "destroy.killed",
        "destroy.deleted",
        "restore.held",
        "restore.mounted",
        "snapshot.replace.recorded",
        "fsck.blob.dropped",
        "fsck.extents.removed",
        "fsck.folder.moved",
        "fsck.snapshot.prepared",
        "fsck.snapshot.applied",
        "recover.begun",
        "recover.emptied",
        "recover.checked",
        "recover.swept",
        "gc.marked",
        "gc.swept",
        "space.punched",
        "compact.written",
        "compact.flushed",
        "compact.unlocked",
        "compact.renamed",
        "snapshot.flush.done",
        "doubts.checked",
        "doubts.mended",
        "doubts.dropped",
        "trash.moved",
        "trash.emptied",
    }
)

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}

_lock = threading.Lock()
_armed: dict[str, tuple[str, int]] = {}


def hit(name: str) -> None:
    """Do what `name` is armed for; return at once when it is not."""
    if _armed:
        _fire(name)


def _fire(name: str) -> None:
    with _lock:
        action, left = _armed.get(name, ("off", 0))
        if action == "off":
            return
        if left > 1:
            _armed[name] = (action, left - 1)
            return
        del _armed[name]
    if action in _SIGNALS:
        # To this very thread: it does not get on until others of the process have noticed.
        signal.pthread_kill(threading.get_ident(), _SIGNALS[action])
        return
    if action == "error":
        raise EngineError(f"failpoint {name}")
    raise OSError(getattr(errno, action.upper()), f"failpoint {name}")


def arm(terms: str) -> None:
    """Arm each `name=action[@nth]` of a comma-separated list."""
    for term in filter(None, terms.split(",")):
        name, _, rest = term.partition("=")
        action, _, nth = rest.partition("@")
        if name not in NAMES or action not in {*_SIGNALS, "error", "enospc", "eio"}:
            raise InvalidArgument(f"no such failpoint: {term}")
        with _lock:
            _armed[name] = (action, int(nth or 1))


def rearm(terms: str) -> None:
    """Arm these and no others: for a process that is told anew with each piece of work."""
    with _lock:
        _armed.clear()
    arm(terms)


@contextmanager
def armed(name: str, action: str, nth: int = 1) -> Iterator[None]:
    """Arm one point for the length of a block."""
    arm(f"{name}={action}@{nth}")
    try:
        yield
    finally:
        with _lock:
            _armed.pop(name, None)


def terms() -> str:
    """Return what is armed, in the form that `arm` takes: for a child process."""
    with _lock:
        return ",".join(f"{name}={action}@{nth}" for name, (action, nth) in _armed.items())
