"""References against a plain model: pulls step by step, releases, users' names, collections, crashes.

Each step of a pull is a transaction of its own, so that everything else comes between any two of them.
"""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.gc.collect import collect
from engine.gc.survey import Places
from engine.kv.schema import BLOBS, IMAGES, SNAPSHOTS, Snapshot
from engine.labels import PINNED, PINNED_VALUE
from engine.metadata import ledger
from engine.metadata.leases import begin, end
from engine.metadata.nodes import snapshot_node
from engine.oci.digest import Digest, digest_of
from engine.oci.documents import Descriptor
from engine.root import Root
from engine.stores import Stores
from tests.clocks import HOUR, clock_by_hand
from tests.conftest import AMD64
from tests.engine.image_files import MANIFEST
from tests.filesystems import shared_memory

OWNERS = st.sampled_from(["web", "db"])
NAMES = st.sampled_from([f"docker.io/library/{name}:1" for name in "ab"])
IMAGES_OF = st.sampled_from("xy")
HOURS = st.sampled_from([0, 1, 3])
LAST = 6  # steps of a pull
STEPS = st.sampled_from([LAST] * 5 + list(range(LAST)))


def part(image: str, kind: str) -> bytes:
    return b"shared" if kind == "layer" else f"{kind} of {image}".encode()


def target(image: str) -> Descriptor:
    data = part(image, "manifest")
    return Descriptor(media_type=MANIFEST, digest=digest_of(data), size=len(data))


@dataclass
class Pull:
    """A pull under way: for whom ("" is a user), of what, and the steps that it has made."""

    owner: str
    name: str
    image: str
    lease: str
    guards: str
    step: int = 0


@dataclass
class Model:
    """What there is to know of names and references."""

    names: dict[str, tuple[str, bool]] = field(default_factory=dict)
    refs: dict[tuple[str, str, str], int | None] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)

    def live(self, at: int) -> set[str]:
        """Return the images that somebody holds."""
        held = {image for (_, _, image), until in self.refs.items() if until is None or until > at}
        lasting = {image for image, lasts in self.names.values() if lasts}
        guarded = {pull.guards for pull in self.pulls}
        brought = {pull.image for pull in self.pulls if pull.step >= 4}
        return held | lasting | guarded | brought

    def collect(self, at: int) -> None:
        live = self.live(at)
        self.names = {name: one for name, one in self.names.items() if one[0] in live}
        self.refs = {key: until for key, until in self.refs.items() if until is None or until > at}


class References(RuleBasedStateMachine):
    """Owners, users, and the machine that goes down."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = shared_memory()
        self.folder = self.memory.__enter__()
        self.time = clock_by_hand()
        self.clock = self.time.__enter__()
        self.model = Model()
        self.open()

    def open(self) -> None:
        self.root = Root(self.folder / "root")
        self.stores = Stores(self.root, "default", AMD64)

    def teardown(self) -> None:
        self.time.__exit__(None, None, None)
        self.root.close()
        self.memory.__exit__(None, None, None)

    # -- pulls ----------------------------------------------------------------------------

    @rule(owner=st.sampled_from(["web", "db", "web", ""]), name=NAMES, image=IMAGES_OF, steps=STEPS)
    def pull(self, owner: str, name: str, image: str, steps: int) -> None:
        if len(self.model.pulls) == 3:
            return
        with self.root.meta.write() as txn:
            lease = begin(txn, "default", self.root.owners.me)
        if owner:
            self.stores.references.guard(lease, name)
        guards = self.model.names.get(name, ("",))[0] if owner else ""
        self.model.pulls.append(Pull(owner, name, image, lease, guards))
        self._advance(self.model.pulls[-1], steps)

    @precondition(lambda self: self.model.pulls)
    @rule(data=st.data(), steps=STEPS)
    def go_on(self, data: Any, steps: int) -> None:
        self._advance(data.draw(st.sampled_from(self.model.pulls)), steps)

    def _advance(self, pull: Pull, steps: int) -> None:
        for _ in range(min(steps, LAST - pull.step)):
            pull.step += 1
            self._step(pull)
        if pull.step == LAST:
            self.model.pulls.remove(pull)

    def _step(self, pull: Pull) -> None:
        stores, image = self.stores, pull.image
        match pull.step:
            case 1:
                self._blob(pull, "layer", {})
            case 2:
                key = f"chain of {image}"
                self._blob(pull, "config", {"containerd.io/gc.ref.snapshot.overlay": key})
            case 3:
                with self.root.meta.write() as txn:
                    record = Snapshot(key=key_of(image), id=1, kind="committed", parent="", **TIMES)
                    ledger.put_snapshot(txn, "overlay", "default", record)
                    ledger.pin(txn, "default", pull.lease, snapshot_node("overlay", key_of(image)))
            case 4:
                about = {
                    f"containerd.io/gc.ref.content.{kind}": digest_of(part(image, kind))
                    for kind in ("config", "layer")
                }
                self._blob(pull, "manifest", about)
            case 5:
                with self.root.meta.write() as txn:
                    put = stores.images.put(
                        txn, pull.name, target(image), replace=True, lasting=not pull.owner
                    )
                lasts = not pull.owner or self.model.names.get(pull.name, ("", False))[1]
                self.model.names[pull.name] = (image, lasts)
                assert put.target == target(image)
            case 6:
                if pull.owner:
                    config = digest_of(part(image, "config"))
                    stores.references.take(pull.owner, config, target(image).digest, pull.name)
                    self.model.refs[pull.owner, pull.name, image] = None
                end(self.root.meta, "default", pull.lease)

    def _blob(self, pull: Pull, kind: str, labels: dict[str, str]) -> None:
        data = part(pull.image, kind)
        content, digest = self.stores.content, digest_of(data)
        if digest in self.blobs():
            content.info(Digest(digest), lease=pull.lease)
            content.update(Digest(digest), labels)
            return
        with content.ingest(f"{pull.lease} {kind}", lease=pull.lease) as writer:
            writer.write(data)
            writer.commit(labels)

    # -- owners ---------------------------------------------------------------------------

    @rule(owner=OWNERS, hours=HOURS, data=st.data())
    def release(self, owner: str, hours: int, data: Any) -> None:
        """ND-05, ND-06, ND-09: a release ends what is held of it, later; of nothing, nothing."""
        mine = sorted(key for key in self.model.refs if key[0] == owner)
        known = {digest_of(part(key[2], "config")) for key in mine} | {key[1] for key in mine}
        what = data.draw(st.sampled_from([*sorted(known), "sha256:unknown"]))
        released = self.stores.references.release(owner, {what}, delay_s=hours * 3600)
        meant = [key for key in mine if what in {digest_of(part(key[2], "config")), key[1]}]
        assert sorted(one.name for one in released) == sorted(key[1] for key in meant)
        self.released(meant, hours)

    @rule(owners=st.sets(OWNERS), hours=HOURS)
    def restart(self, owners: set[str], hours: int) -> None:
        """ND-13 (j): who comes back says who there is still."""
        self.stores.references.retain(owners, delay_s=hours * 3600)
        self.released([key for key in self.model.refs if key[0] not in owners], hours)

    def released(self, keys: list[tuple[str, str, str]], hours: int) -> None:
        for key in keys:
            if self.model.refs[key] is None and hours:
                self.model.refs[key] = self.clock.at + hours * HOUR
            elif self.model.refs[key] is None:
                del self.model.refs[key]

    # -- users ----------------------------------------------------------------------------

    @precondition(lambda self: self.model.names)
    @rule(name=NAMES, data=st.data())
    def tag(self, name: str, data: Any) -> None:
        image, _ = self.model.names[data.draw(st.sampled_from(sorted(self.model.names)))]
        self.stores.images.put_all({name: target(image)}, replace=True)
        self.model.names[name] = (image, True)

    @precondition(lambda self: self.model.names)
    @rule(data=st.data())
    def pin(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.names)))
        self.stores.images.label({PINNED: PINNED_VALUE}, name)
        self.model.names[name] = (self.model.names[name][0], True)

    @precondition(lambda self: self.model.names)
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.names)))
        self.stores.images.remove(name)
        del self.model.names[name]

    # -- the world ------------------------------------------------------------------------

    @rule(hours=st.sampled_from([0.5, 1, 24, 0]))
    def time_passes(self, hours: float) -> None:
        """Without hours the process dies."""
        self.clock.at += int(hours * HOUR)
        if not hours:
            event(f"crash with {len(self.model.pulls)} pulls under way")
            self.root.close()
            self.model.pulls.clear()
            self.open()

    @rule()
    def collect(self) -> None:
        """ND-13: what nobody holds is gone after its delay and one collection."""
        self.model.collect(self.clock.at)
        collected = collect(self.root.meta, Places(namespace="default", backends=["overlay"]))
        event(f"collected {'something' if collected.blobs else 'nothing'}")
        coming = {pull.image for pull in self.model.pulls}
        for image in {"x", "y"} - self.model.live(self.clock.at) - coming:
            parts = {digest_of(part(image, kind)) for kind in ("config", "manifest")}
            assert not self.blobs() & parts
            assert not self.snapshot(image)
        if not (self.model.live(self.clock.at) | coming):
            assert not self.blobs()

    @invariant()
    def what_is_held_is_complete(self) -> None:
        at = self.clock.at
        refs = self.model.refs.items()
        held = {image for (_, _, image), until in refs if until is None or until > at}
        for image in held | {image for image, _ in self.model.names.values()}:
            parts = {digest_of(part(image, kind)) for kind in ("config", "manifest", "layer")}
            assert parts <= self.blobs()
            assert self.snapshot(image)

    @invariant()
    def names_and_references_are_as_in_the_model(self) -> None:
        with self.root.meta.read() as txn:
            names = {one.name: one.target.digest for one in IMAGES.scan(txn, "default")}
        assert names == {name: target(image).digest for name, (image, _) in self.model.names.items()}
        found = {(one.owner, one.name, one.target): one.until for one in self.stores.references.walk()}
        assert found == {
            (owner, name, target(image).digest): until
            for (owner, name, image), until in self.model.refs.items()
        }

    def blobs(self) -> set[str]:
        with self.root.meta.read() as txn:
            return {blob.digest for blob in BLOBS.scan(txn, "default")}

    def snapshot(self, image: str) -> bool:
        with self.root.meta.read() as txn:
            return SNAPSHOTS.any(txn, "overlay", "default", key_of(image))


TIMES: dict[str, int] = {"created": 1, "updated": 1}


def key_of(image: str) -> str:
    return f"chain of {image}"


TestReferences = References.TestCase
TestReferences.settings = settings(
    settings.default, max_examples=2 * settings.default.max_examples, stateful_step_count=40
)
