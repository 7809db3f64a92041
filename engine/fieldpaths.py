"""Field paths: which parts of an object an update is about, as in containerd.

Pure.
"""

from collections.abc import Sequence

from engine.errors import InvalidArgument, printable
from engine.labels import Labels, check

__all__ = ["LABELS", "change_labels"]

LABELS = "labels"
_ONE = f"{LABELS}."


def change_labels(labels: Labels, wanted: Labels, paths: Sequence[str] = ()) -> dict[str, str]:
    """Return `labels` once an update to `wanted` is done: of all, or of those that `paths` name.

    `labels` is all of them, `labels.KEY` one, whatever is in its key. A label that is wanted empty, or
    named and not wanted, goes. InvalidArgument for any other path, and for labels that break a rule.
    """
    changed = dict(labels)
    for path in paths or (LABELS,):
        key = path.removeprefix(_ONE)
        if path == LABELS:
            changed = dict(wanted)
        elif key not in {path, ""}:
            changed[key] = wanted.get(key, "")
        else:
            raise InvalidArgument(
                f"field {printable(path)!r} cannot be changed; labels and labels.KEY can"
            )
    check(changed)
    return {key: value for key, value in changed.items() if value}
