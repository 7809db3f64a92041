"""Pulls, cancels, removals, tags that move, collections, crashes and restarts in any order, and a model.

An image with a name is whole; what no name holds is gone after its lease's end and a collection; what
is there is not fetched again, and of those who want a blob at the same time one fetches it.
"""

import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from tests.clocks import HOUR
from tests.filesystems import shared_memory
from tests.property.obeying import Server, served
from tests.property.pulls_process import BACKENDS, NAMES, PARTS, PLATFORMS, TARGETS

pytestmark = pytest.mark.root

_DAY = 25 * HOUR

PULL = st.tuples(
    st.just("pull"), st.sampled_from(NAMES), st.sampled_from(PLATFORMS), st.sampled_from(BACKENDS)
)
SAME = st.just(("pull", NAMES[0], PLATFORMS[0], BACKENDS[0]))
LET = st.tuples(st.just("let"), st.integers(1, 8))
OTHER = st.one_of(
    st.tuples(st.just("cancel"), st.integers(0, 3)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("collect")),
    st.tuples(st.just("move"), st.sampled_from(NAMES), st.sampled_from([*TARGETS])),
)
STEPS = st.tuples(PULL, st.lists(st.one_of(PULL, SAME, LET, LET, OTHER, OTHER), min_size=3, max_size=9))


@dataclass
class Op:
    """What a process did to a name, from one line of its log to another; None: it did not end."""

    what: str
    name: str
    began: int
    ended: int | None = None
    effects: frozenset[str] = frozenset()
    """What the name may mean afterwards; "" if nothing."""


class PullsMachine(RuleBasedStateMachine):
    """One store and one registry; processes one after the other, each with several pulls at once."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.memory = shared_memory()
        self.folder = self.memory.__enter__()
        self.at = 500_000 * HOUR
        self.tags = dict.fromkeys(NAMES, "one")
        self.names: dict[str, str] = {}
        self.whole: dict[str, set[tuple[str, str]]] = {}
        """By name: for what it was pulled since it was put, by platform and backend."""
        self.tried: set[tuple[str, str, str]] = set()
        """Target, platform and backend of all that was ever pulled."""
        self.blobs: set[str] = set()
        self.is_new = False

    def teardown(self) -> None:
        self.memory.__exit__(None, None, None)

    def does(self, kind: str, **job: Any) -> tuple[int, list[dict[str, Any]]]:
        """Have a process do something; return how it ended and what it told."""
        job |= {"kind": kind, "root": str(self.folder / "root"), "at": self.at}
        (code,), told = self.server.does(self.folder / "log", job)
        return code, told

    @rule(steps=STEPS, dies=st.booleans())
    def a_process(self, steps: tuple[Any, list[Any]], dies: bool) -> None:
        self.at += HOUR // 60
        self.is_new = True
        first, rest = steps
        told_to = [first, *rest, *[("die",)] * dies]
        code, told = self.does("steps", steps=told_to, tags=self.tags)
        assert code == (-signal.SIGKILL if dies else 0), told
        event("died" if dies else "ended")
        moved = [line for line in told if line.get("begins") == "move"]
        targets = {name: {TARGETS[target]} for name, target in self.tags.items()}
        for line in moved:
            targets[line["name"]].add(line["target"])
        self.fetched_once(told)
        self.names_are_as_if_one_after_the_other(told, targets)
        for line in moved:
            (target,) = (one for one, digest in TARGETS.items() if digest == line["target"])
            self.tags[line["name"]] = target

    def fetched_once(self, told: list[dict[str, Any]]) -> None:
        """MS-10, MS-14, UP-15: a blob that is there is not asked for, one that is not once."""
        asked = Counter(line["asked"] for line in told if line.get("kind") == "blobs")
        collections = sum(line.get("begins") == "collect" for line in told)
        cancels = sum(line.get("ends") == "cancelled" for line in told)
        for digest, count in asked.items():
            most = cancels + (0 if digest in self.blobs else 1) + 2 * collections
            assert count <= most, f"{digest} was asked for {count} times: {told}"

    def names_are_as_if_one_after_the_other(
        self, told: list[dict[str, Any]], targets: dict[str, set[str]]
    ) -> None:
        """CRI-08, CRI-12, CRI-13, GC-04: what names mean after a process is what some order gives."""
        ops: dict[int, Op] = {}
        pulls: dict[int, tuple[str, str]] = {}
        for at, line in enumerate(told):
            number = line.get("step", -1)
            if line.get("begins") == "pull":
                ops[number] = Op("pull", line["name"], at, None, frozenset(targets[line["name"]]))
                pulls[number] = line["platform"], line["backend"]
                self.tried |= {(one, *pulls[number]) for one in targets[line["name"]]}
            elif line.get("begins") == "remove":
                ops[number] = Op("remove", line["name"], at, None, frozenset({""}))
            elif line.get("ends") in {"pulled", "removed"}:
                ops[number].ended = at
                ops[number].effects = frozenset({line.get("target", "")})
        found = self.look()
        for name in NAMES:
            mine = {number: op for number, op in ops.items() if op.name == name}
            done = [op for op in mine.values() if op.ended is not None]
            last = [
                op
                for op in mine.values()
                if not any(op.ended is not None and other.began > op.ended for other in done)
            ]
            possible = {effect for op in last for effect in op.effects}
            if not done:
                possible.add(self.names.get(name, ""))
            is_now = found["images"].get(name, {}).get("target", "")
            assert is_now in possible, f"{name} means {is_now!r}, not {possible}: {told}"
            if is_now != self.names.get(name) or any(op.what == "remove" for op in mine.values()):
                self.whole[name] = set()
            for number, op in mine.items():
                is_last = op.ended is not None and op in last and op.effects == {is_now}
                is_removed = any(other.what == "remove" for other in mine.values())
                if op.what == "pull" and is_last and not is_removed:
                    self.whole[name].add(pulls[number])
            self.names[name] = is_now
        self.named_is_whole(found)

    def named_is_whole(self, found: dict[str, Any]) -> None:
        for name, image in found["images"].items():
            whole = {
                (platform, backend)
                for platform, backends in image["whole"].items()
                for backend in backends
            }
            assert whole, f"{name} is not whole for anything: {found}"
            assert self.whole[name] <= whole, f"{name} is whole for {whole}, not {self.whole[name]}"

    def look(self, *, collects: bool = False) -> dict[str, Any]:
        code, told = self.does("look", collects=collects)
        assert code == 0, told
        self.blobs = set(told[0]["blobs"])
        return told[0] | told[1]

    @precondition(lambda self: self.is_new)
    @rule()
    def a_day_passes(self) -> None:
        """MS-15, CRI-13, P2: what no name holds is gone, and nothing else."""
        self.at += _DAY
        self.is_new = False
        found = self.look(collects=True)
        assert found["left"] == dict.fromkeys(found["left"], 0)
        assert {name: image["target"] for name, image in found["images"].items()} == {
            name: target for name, target in self.names.items() if target
        }
        self.named_is_whole(found)
        named = {target for target in self.names.values() if target}
        tried = {one for one in self.tried if one[0] in named}
        most = {blob for target, platform, _ in tried for blob in PARTS.get((target, platform), [])}
        assert self.blobs <= most, "what no name holds is still there"
        backends = {backend for _, _, backend in tried}
        assert {one.split()[0] for one in found["snapshots"]} <= backends
        event("a day later there is " + ("something" if self.blobs else "nothing"))


@pytest.fixture
def server() -> Iterator[Server]:
    with served("tests.property.pulls_process") as server:
        yield server


def test_ms_10_ms_14_cri_12_cri_13_pulls_in_any_order(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PullsMachine, "server", server, raising=False)
    examples = settings.default.max_examples // 3  # each has some processes
    run_state_machine_as_test(
        PullsMachine, settings=settings(max_examples=max(5, examples), stateful_step_count=6)
    )
