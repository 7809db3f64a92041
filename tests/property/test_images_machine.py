"""Names of images against dictionaries: made, moved, labelled, expired and removed."""

from collections.abc import Callable
from typing import Any

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from engine.errors import AlreadyExists, EngineError, InvalidArgument, NotFound
from tests.property.records_machine import BLOBS, EXPIRE, RecordsMachine, digest, target

NAMES = st.sampled_from(["a", "b"])
PATHS = st.lists(
    st.sampled_from(["target", "labels", "labels.k", f"labels.{EXPIRE}", "labels.absent", "name"]),
    max_size=2,
)


def full(name: str) -> str:
    return f"docker.io/library/{name}:latest"


class ImageMachine(RecordsMachine):
    """Names for blobs, beside a lease that may keep some."""

    def calls(self, wrong: type[EngineError] | None, call: Callable[[], object]) -> bool:
        """Make a call that must fail so, or must not; say whether it did its work."""
        if wrong:
            self.fails(wrong, call)
        else:
            call()
        return not wrong

    @precondition(lambda self: not self.model.leases)
    @rule()
    def lend(self) -> None:
        self.stores.leases.create("mine", life=None)
        self.model.leases["mine"] = (True, {})
        self.model.members["mine"] = set()

    @precondition(lambda self: self.model.leases)
    @rule()
    def end(self) -> None:
        self.stores.leases.delete("mine")
        del self.model.leases["mine"], self.model.members["mine"]

    @precondition(lambda self: self.model.blobs)
    @rule(name=NAMES, blob=BLOBS, data=st.data())
    def create(self, name: str, blob: str, data: Any) -> None:
        labels, lease = self.labels(data), self.lease(data)
        there = full(name) in self.model.images
        wrong = AlreadyExists if there else None if digest(blob) in self.model.blobs else NotFound
        make = self.stores.images.create
        if self.calls(wrong, lambda: make(name, target(blob), labels=labels, lease=lease)):
            self.model.images[full(name)] = (digest(blob), labels)
            if EXPIRE in labels:
                self.join(lease, ("images", "", full(name)))

    @precondition(lambda self: self.model.blobs)
    @rule(names=st.sets(NAMES, min_size=1), blob=BLOBS, replace=st.booleans())
    def name(self, names: set[str], blob: str, replace: bool) -> None:
        """GC-04: a name appears only for what is there; of several all are given or none."""
        wrong: type[EngineError] | None = None
        for name in sorted(names, reverse=True):  # the first that is wrong is told
            there = self.model.images.get(full(name))
            if there and there[0] == digest(blob):
                continue  # also if it lost it: it is left as it is
            if there and not replace:
                wrong = AlreadyExists
            elif digest(blob) not in self.model.blobs:
                wrong = NotFound
        targets = dict.fromkeys(sorted(names), target(blob))
        if self.calls(wrong, lambda: self.stores.images.put_all(targets, replace=replace)):
            for name in names:
                _, labels = self.model.images.get(full(name), ("", {}))
                self.model.images[full(name)] = (digest(blob), labels)

    @precondition(lambda self: self.model.images)
    @rule(name=NAMES, blob=BLOBS, paths=PATHS, data=st.data())
    def update(self, name: str, blob: str, paths: list[str], data: Any) -> None:
        wanted = self.labels(data)
        moves = not paths or "target" in paths
        wrong: type[EngineError] | None = None
        if full(name) not in self.model.images or (moves and digest(blob) not in self.model.blobs):
            wrong = NotFound
        elif "name" in paths:
            wrong = InvalidArgument
        change = self.stores.images.update
        if not self.calls(wrong, lambda: change(name, target=target(blob), labels=wanted, paths=paths)):
            return
        held, labels = self.model.images[full(name)]
        for path in paths or ["target", "labels"]:
            key = path.removeprefix("labels.")
            if path == "target":
                held = digest(blob)
            elif path == "labels":
                labels = dict(wanted)
            else:
                labels = {k: v for k, v in labels.items() if k != key}
                labels |= {key: wanted[key]} if key in wanted else {}
        event("updated")
        self.model.images[full(name)] = (held, labels)

    @precondition(lambda self: self.model.images)
    @rule(names=st.lists(NAMES, min_size=1, max_size=2, unique=True), data=st.data())
    def label(self, names: list[str], data: Any) -> None:
        changes = {"k": data.draw(st.sampled_from(["", "3"])), **self.labels(data)}
        wrong = None if all(full(name) in self.model.images for name in names) else NotFound
        if self.calls(wrong, lambda: self.stores.images.label(changes, *names)):
            for name in names:
                held, labels = self.model.images[full(name)]
                labels = {k: v for k, v in (labels | changes).items() if v}
                self.model.images[full(name)] = (held, labels)

    @precondition(lambda self: self.model.images)
    @rule(names=st.lists(NAMES, min_size=1, max_size=2, unique=True), blob=st.none() | BLOBS)
    def remove(self, names: list[str], blob: str | None) -> None:
        means = [self.model.images.get(full(name)) for name in names]
        fits = all(one and (blob is None or one[0] == digest(blob)) for one in means)
        expected = None if blob is None else target(blob)
        remove = self.stores.images.remove
        if self.calls(None if fits else NotFound, lambda: remove(*names, target=expected)):
            for name in names:
                del self.model.images[full(name)]


TestImages = ImageMachine.TestCase
TestImages.settings = settings(
    settings.default, max_examples=2 * settings.default.max_examples, stateful_step_count=30
)
