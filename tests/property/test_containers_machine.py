"""Containers made, removed, cancelled, killed and rebooted in any order, beside pulls, prunes and tags.

What is live has all that it was made of and all that was written to it, whatever became of the name;
of what is gone nothing is left: whatever there is of a container has a record at any time.
"""

import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine import labels
from engine.metadata.containers import ContainerState
from engine.mount import deactivate_below
from tests.clocks import HOUR
from tests.filesystems import shared_memory
from tests.property.containers_process import IDS
from tests.property.obeying import Server, served
from tests.property.pulls_process import BACKENDS, LAYERS, NAMES, PARTS, PLATFORMS, TARGETS

pytestmark = pytest.mark.root

_DAY = 25 * HOUR
_HALF = {ContainerState.PROVISIONING, ContainerState.PREPARING, ContainerState.DESTROYING}
_ERRORS = ("provision.prepared", "provision.mounted", "destroy.unmounted", "destroy.discarded")
_KILLS = (*_ERRORS, "provision.recorded", "provision.settled", "destroy.recorded", "destroy.emptied")
_MORE_KILLS = ("restore.held", "restore.mounted", "snapshot.prepare.recorded", "snapshot.prepare.made")

# -- what may be done ------------------------------------------------------------------------------

ID = st.sampled_from(IDS)
NAME = st.sampled_from(NAMES)
OPTIONS = st.fixed_dictionaries(
    {
        "image": NAME,
        "parent": st.sampled_from(["", "", "", *IDS[:2]]),
        "volumes": st.sampled_from([{}, {}, {}, {"/v": NAMES[0]}, {"/v": NAMES[0], "/w": NAMES[1]}]),
        "readonly": st.sampled_from([False, False, False, True]),
        "backend": st.sampled_from(BACKENDS),
        "ephemeral": st.sampled_from([False, False, False, True]),
        "pulls": st.sampled_from([True, True, True, False]),
    }
)
_USUAL = {
    "image": NAMES[0],
    "parent": "",
    "volumes": {},
    "readonly": False,
    "backend": BACKENDS[0],
    "ephemeral": False,
    "pulls": True,
}
USUAL = st.sampled_from(
    [
        ("provision", "a", _USUAL),
        ("provision", "b", {**_USUAL, "backend": BACKENDS[1]}),
        ("provision", "c", {**_USUAL, "parent": "a", "volumes": {"/v": NAMES[1]}}),
    ]
)
PROVISION = st.one_of(USUAL, USUAL, st.tuples(st.just("provision"), ID, OPTIONS))
DESTROY = st.tuples(st.just("destroy"), ID)
RECOVER = st.tuples(st.just("recover"), st.none() | st.lists(ID, unique=True))
LET = st.tuples(st.just("let"), st.integers(1, 6))
TEXT = st.sampled_from(["", "x", "y"])
ON_ONE = st.one_of(
    st.tuples(st.just("write"), ID, st.sampled_from(["both", "own"]), TEXT),
    st.tuples(st.sampled_from(["sit", "vanish", "run", "update"]), ID),
)
ON_IMAGES = st.one_of(
    st.tuples(st.just("pull"), NAME, st.sampled_from(BACKENDS)),
    st.tuples(st.just("remove"), NAME),
    st.tuples(st.just("prune"), st.lists(NAME, unique=True, max_size=2)),
    st.tuples(st.just("collect")),
    st.tuples(st.just("move"), NAME, st.sampled_from([*TARGETS])),
)
CANCEL = st.tuples(st.just("cancel"), st.integers(0, 3))
STEP = st.one_of(PROVISION, DESTROY, LET, LET, LET, CANCEL, RECOVER, ON_ONE, ON_ONE, ON_IMAGES)
STEPS = st.builds(lambda first, rest: [first, *rest], PROVISION, st.lists(STEP, min_size=2, max_size=9))
STRUCK = st.one_of(
    st.just(""),
    st.builds("{}=error@{}".format, st.sampled_from(_ERRORS), st.integers(1, 3)),
    st.builds("{}=kill@{}".format, st.sampled_from(_KILLS + _MORE_KILLS), st.integers(1, 3)),
)

# -- the model -------------------------------------------------------------------------------------


@dataclass
class Op:
    """What a process did, from one line of the log to another; None: it did not end."""

    what: str
    words: list[Any]
    began: int
    ended: int | None = None
    told: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.words[0] if self.what in {"provision", "destroy"} else ""

    @property
    def is_done(self) -> bool:
        return self.told.get("ends") == "done"

    def settles(self, container: str) -> bool:
        """Say whether there is, or is not, a container for certain in the end."""
        return self.id == container and self.is_done

    def may_remove(self, container: str, parents: Mapping[str, set[str]]) -> bool:
        """Say whether a container may be gone by this, or be on its way out."""
        if self.what == "recover":
            return True
        # So may a provision, that of a parent which a crash left half made.
        return self.id in parents[container] or (self.what, self.id) == ("destroy", container)


def ops_of(told: Iterable[dict[str, Any]]) -> list[Op]:
    """Return what the processes did, as they began it."""
    ops: dict[tuple[int, int], Op] = {}
    for at, line in enumerate(told):
        key = line.get("process", -1), line.get("step", -1)
        if "begins" in line:
            ops[key] = Op(line["begins"], line["words"], at)
        elif "ends" in line:
            ops[key].ended, ops[key].told = at, line
    return list(ops.values())


def tree_of(target: str) -> dict[str, str]:
    """Return the files of an image."""
    (layers,) = (LAYERS[name] for name, digest in TARGETS.items() if digest == target)
    return {"both": str(layers[-1]), **{f"only{n}": "" for n in layers}}


class ContainersMachine(RuleBasedStateMachine):
    """One store and one registry; processes one after the other or two at once."""

    server: Server

    def __init__(self) -> None:
        super().__init__()
        self.memory = shared_memory()
        self.folder = self.memory.__enter__()
        self.root = self.folder / "root"
        self.boots = 0
        self.is_new = False
        """Whether anything was done since all went: what is there is no other each time."""
        self.at = 500_000 * HOUR
        self.tags = dict.fromkeys(NAMES, "one")
        self.found: dict[str, Any] = {"containers": []}
        """What was there when somebody last looked."""
        self.written: dict[str, dict[str, set[str]]] = {}
        """By container's `unique` and file: what it may say, "" if it may be gone."""
        self.targets: dict[str, str] = {}
        """By container's `unique`: what it was made of."""
        self.unseen: set[str] = set()
        """The containers, by `unique`, that need not be mounted."""

    def teardown(self) -> None:
        deactivate_below(self.folder)
        self.memory.__exit__(None, None, None)

    @initialize()
    def boot(self) -> None:
        (self.folder / "boot").write_text(f"boot-{self.boots}\n")

    def does(self, *jobs: dict[str, Any]) -> tuple[list[int], list[dict[str, Any]]]:
        about = {"root": str(self.root), "boot": str(self.folder / "boot"), "at": self.at}
        return self.server.does(self.folder / "log", *(about | job for job in jobs))

    def works(self, *work: tuple[list[Any], str]) -> tuple[list[Op], bool]:
        """Have processes do steps at once; return what they did, and whether one was killed."""
        self.at += HOUR // 60
        self.is_new = True
        codes, told = self.does(
            *(
                {
                    "kind": "steps",
                    "process": number,
                    "steps": steps,
                    "failpoints": struck,
                    "tags": self.tags,
                }
                for number, (steps, struck) in enumerate(work)
            )
        )
        assert set(codes) <= {0, -signal.SIGKILL}, told
        for line in told:
            if "writes" in line:
                self.may_say(line).add(line["text"])
            elif "wrote" in line:
                self.written[line["unique"]][line["wrote"]] = {line["text"]}
            elif "vanishes" in line:
                self.unseen.add(line["vanishes"])
            elif line.get("begins") == "move":
                name, target = line["words"]
                self.tags[name] = target
        return ops_of(told), -signal.SIGKILL in codes

    def may_say(self, line: dict[str, Any]) -> set[str]:
        files = self.written.setdefault(line["unique"], {})
        known = tree_of(self.targets[line["unique"]]) if line["unique"] in self.targets else {}
        # Of what was made in the same process nobody looked at the target yet.
        return files.setdefault(line["writes"], {known.get(line["writes"], ""), *LAYER_TEXTS})

    # -- rules ----------------------------------------------------------------------------

    @rule(steps=STEPS, struck=STRUCK, dies=st.booleans())
    def a_process(self, steps: list[Any], struck: str, dies: bool) -> None:
        ops, was_killed = self.works((steps + [("die",)] * dies, struck))
        event("killed" if was_killed else "ended")
        self.as_if_one_after_the_other(ops, struck)

    @rule(steps=STEPS, others=STEPS, dies=st.booleans())
    def two_processes(self, steps: list[Any], others: list[Any], dies: bool) -> None:
        ops, _ = self.works((steps + [("die",)] * dies, ""), (others, ""))
        self.as_if_one_after_the_other(ops, "")

    @rule(step=st.one_of(PROVISION, DESTROY))
    def alone(self, step: Any) -> None:
        """Nobody else is there: it is known what comes of it."""
        before = {one["id"]: one for one in self.found["containers"]}
        (op,), _ = self.works(([step], ""))
        self.as_if_one_after_the_other([op], "")
        what, container, *_ = step
        after = {one["id"]: one for one in self.found["containers"]}
        if what == "destroy":
            assert op.told["was_there"] is (container in before), op
        else:
            self.provisioned_alone(op, before, after)

    def provisioned_alone(
        self, op: Op, before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]
    ) -> None:
        container, options = op.words
        old = before.get(container)
        if old and old["state"] == ContainerState.PROVISIONING:
            old = None  # it is removed first
        expected: set[str] = set()
        if old and any(old[key] != options[key] for key in ASKED):
            expected = {"AlreadyExists"}
        elif old and old["state"] == ContainerState.DESTROYING:
            expected = {"FailedPrecondition"}
        elif old is None and options["parent"]:
            parent = before.get(options["parent"])
            if parent is None or parent["id"] == container:
                expected = {"NotFound"}
            elif parent["state"] == ContainerState.DESTROYING:
                expected = {"FailedPrecondition"}
        if expected:
            assert op.told.get("error") in expected, op
        elif op.is_done:
            assert after[container]["unique"] == op.told["unique"]
            assert old is None or old["unique"] == op.told["unique"]
            event("provisioned again" if old else "provisioned")
        else:
            # What its parent was a child of may have been removed with what was half made.
            assert op.told["error"] == "NotFound", op
            assert not options["pulls"] or options["parent"], op

    @precondition(lambda self: self.is_new)
    @rule()
    def reboot(self) -> None:
        """Mounts and the state of runtimes are gone; files are as they were."""
        deactivate_below(self.root)
        shutil.rmtree(self.root / "runtime", ignore_errors=True)
        self.boots += 1
        self.boot()
        self.unseen = {one["unique"] for one in self.found["containers"]}

    @precondition(lambda self: self.is_new)
    @rule(known=st.none() | st.lists(ID, unique=True))
    def recover(self, known: list[str] | None) -> None:
        """MC-10, BK-15: what is known and whole stays, all else goes, children with their parents."""
        before = {one["id"]: one for one in self.found["containers"]}
        (op,), _ = self.works(([("recover", known)], ""))
        assert op.is_done, op
        going = {
            name
            for name, one in before.items()
            if one["state"] in _HALF
            or (known is not None and (name not in known or labels.EPHEMERAL in one["labels"]))
        }
        while more := {name for name, one in before.items() if one["parent"] in going} - going:
            going |= more
        assert op.told["failed"] == {}, op
        assert set(op.told["destroyed"]) == going, op
        assert set(op.told["kept"]) == before.keys() - going, op
        self.unseen.clear()
        self.look()
        after = {one["id"]: one for one in self.found["containers"]}
        assert after.keys() == before.keys() - going
        for name, one in after.items():
            assert one["unique"] == before[name]["unique"]
            ran = before[name]["state"] == ContainerState.RUNNING and before[name]["boot"] != one["boot"]
            assert one["state"] == (ContainerState.STOPPED if ran else before[name]["state"])
        assert self.found["folders"] == sorted(one["unique"] for one in after.values())
        event(f"recovered: {len(going)} of {len(before)} went")

    @precondition(lambda self: self.is_new)
    @rule()
    def all_go(self) -> None:
        """P2: nothing is left of containers that are gone, nor of images that nobody names."""
        steps = [("recover", []), *[("remove", name) for name in NAMES]]
        ops, _ = self.works((steps, ""))
        (op,) = (op for op in ops if op.what == "recover")
        assert op.told.get("failed") == {}, op
        self.at += _DAY
        (op,), _ = self.works(([("collect",)], ""))
        assert op.is_done, op
        self.look()
        assert self.found["containers"] == self.found["mounts"] == self.found["mounted"] == []
        assert self.found["folders"] == self.found["blobs"] == self.found["snapshots"] == []
        assert self.found["left"] == dict.fromkeys(self.found["left"], 0)
        self.is_new = False

    # -- what holds at any time -----------------------------------------------------------

    def look(self) -> None:
        (code,), told = self.does({"kind": "look"})
        assert code == 0, told
        self.found = told[0] | told[1]
        self.everything_has_a_record()
        for one in self.found["containers"]:
            if one["state"] not in _HALF:
                self.is_live(one)
        live = {one["unique"] for one in self.found["containers"]}
        self.targets = {one["unique"]: one["target"] for one in self.found["containers"]}
        self.written = {unique: said for unique, said in self.written.items() if unique in live}
        self.unseen &= live

    def everything_has_a_record(self) -> None:
        found = self.found
        containers = {one["id"]: one for one in found["containers"]}
        uniques = {one["unique"] for one in containers.values()}
        assert set(found["folders"]) <= uniques
        targets = [target for one in containers.values() for target in one["targets"]]
        assert sorted(found["mounted"]) == sorted(set(found["mounted"]) & set(targets)), "mounted twice"
        assert {mount["container"] for mount in found["mounts"]} <= containers.keys()
        keys = {key for one in containers.values() for key in keys_of(one)}
        assert {mount["key"] for mount in found["mounts"]} <= keys
        assert {key for _, key in found["snapshots"] if key.startswith("container-")} <= keys
        assert found["held"].keys() <= containers.keys()
        for one in containers.values():
            assert one["state"] in [*ContainerState]
            assert not one["parent"] or one["parent"] in containers
            assert not one["is_held"], "nobody is at work"

    def is_live(self, one: dict[str, Any]) -> None:
        """Check that a container has its mounts, its image and what was written to it."""
        unique = one["unique"]
        assert one["target"] == self.targets.get(unique, one["target"])
        assert one["target"] in self.found["held"][one["id"]]
        assert len(set(self.found["held"][one["id"]])) <= 1 + len(one["volumes"])
        absent = set(PARTS[one["target"], PLATFORMS[0]]) - set(self.found["blobs"])
        assert not absent, (one, absent)
        assert one["config"] in PARTS[one["target"], PLATFORMS[0]]
        snapshots = {tuple(snapshot) for snapshot in self.found["snapshots"]}
        missing = {(one["backend"], key) for key in [one["top"], *keys_of(one)]} - snapshots
        assert not missing, (one, missing, snapshots)
        if unique not in self.unseen:
            assert set(one["targets"]) <= set(self.found["mounted"]), one
        trees = {target: tree_of(target) for target in self.found["held"][one["id"]]}
        for path, files in one["files"].items():
            if path != "/":
                assert files in trees.values(), one
                continue
            expected = dict(trees[one["target"]])
            for name, said in self.written.get(unique, {}).items():
                said_now = files.get(name, "")
                assert said_now in said, f"{name} says {said_now!r}, not {said}: {one}"
                self.written[unique][name] = {said_now}
                expected.pop(name, None)
                if said_now:
                    expected[name] = said_now
            assert files == expected, one

    def as_if_one_after_the_other(self, ops: list[Op], struck: str) -> None:
        """Look, and check that each container is, or is not, as some order of what was done gives."""
        before = {one["id"]: one for one in self.found["containers"]}
        self.look()
        after = {one["id"]: one for one in self.found["containers"]}
        parents = self.ancestors(ops, before)
        for op in ops:
            if op.what == "provision" and op.told.get("ends") == "failed" and not struck:
                self.failed_for_a_reason(op, ops, before, parents)
            if op.what == "provision" and op.is_done and not op.told["mounted"]:
                assert any(
                    other.what == "vanish" or other.may_remove(op.id, parents) for other in ops
                ), (op, ops)
        for name in IDS:
            self.is_possible(name, ops, before.get(name), after.get(name), parents)

    def ancestors(self, ops: list[Op], before: dict[str, Any]) -> dict[str, set[str]]:
        """Return what may be above each container."""
        above: dict[str, set[str]] = {name: set() for name in IDS}
        links = [(one["id"], one["parent"]) for one in before.values()]
        links += [(op.id, op.words[1]["parent"]) for op in ops if op.what == "provision"]
        for _ in IDS:
            for name, parent in links:
                if parent:
                    above[name] |= {parent} | above[parent]
        return above

    def is_possible(
        self,
        name: str,
        ops: list[Op],
        old: dict[str, Any] | None,
        one: dict[str, Any] | None,
        parents: Mapping[str, set[str]],
    ) -> None:
        done = [op for op in ops if op.settles(name)]
        last = [op for op in done if not any(op.ended < other.began for other in done)]  # type: ignore[operator]
        over = [op for op in ops if op not in done and not any(is_after(other, op) for other in done)]
        may_go = any(op.may_remove(name, parents) for op in over) or (
            # Who finds what a crash left half made removes it, and then makes it.
            old is not None and old["state"] in _HALF and any(op.id == name for op in over)
        )
        cut = [op for op in ops if op.ended is None]
        came = any(op.what == "provision" and op.id == name for op in cut)
        there = {op.told["unique"] for op in last if op.what == "provision"}
        if not done and old is not None:
            there.add(old["unique"])
        if one is None:
            is_gone = any(op.what == "destroy" for op in last) or (not done and old is None)
            assert is_gone or may_go, f"{name} is gone: {ops}"
        elif one["state"] in _HALF:
            tried = [op for op in over if op.id == name or op.may_remove(name, parents)]
            is_left = old is not None and old["state"] in _HALF and not done
            # Who could not remove it, was killed, or found that it had become a parent.
            assert is_left or tried or cut, f"{name} is {one['state']}: {ops}"
        else:
            assert one["unique"] in there or came, f"{name} is there: {ops}"

    def failed_for_a_reason(
        self, op: Op, ops: list[Op], before: dict[str, Any], parents: Mapping[str, set[str]]
    ) -> None:
        """What is whole, or can be pulled, is made, if nobody removes it or wants it otherwise."""
        others = [other for other in ops if other is not op]
        near = {op.id} | parents[op.id]
        wants = op.words[1]
        why = op.told["error"]
        is_removed = any(
            other.what == "recover"
            or (other.what == "destroy" and other.id in near)
            # What cannot be made is removed again.
            or (other.what == "provision" and other.id in near and not other.is_done)
            for other in others
        )
        if why == "AlreadyExists":
            known = [before[op.id]] if op.id in before else []
            known += [
                other.words[1] for other in others if other.what == "provision" and other.id == op.id
            ]
            assert any(one[key] != wants[key] for one in known for key in ASKED), (op, ops)
        elif why == "FailedPrecondition":
            was_going = any(before[name]["state"] in _HALF for name in near if name in before)
            is_in_use = any(other.what == "sit" for other in others)
            assert is_removed or was_going or is_in_use, (op, ops)
        else:
            assert why == "NotFound", (op, ops)
            assert wants["parent"] or not wants["pulls"], (op, ops)


ASKED = ("image", "parent", "volumes", "readonly", "backend")
LAYER_TEXTS = frozenset({""} | {str(layers[-1]) for layers in LAYERS.values()})


def is_after(one: Op, other: Op) -> bool:
    """Say whether one began only when another had ended."""
    return other.ended is not None and other.ended < one.began


def keys_of(one: dict[str, Any]) -> list[str]:
    """Return the keys of a container's mounts."""
    own = f"container-{one['unique']}"
    return [own, *(f"{own}-{number}" for number in range(1, len(one["volumes"]) + 1))]


@pytest.fixture
def server() -> Iterator[Server]:
    with served("tests.property.containers_process") as server:
        yield server


def test_mc_02_10_bk_15_ms_36_containers_in_any_order(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ContainersMachine, "server", server, raising=False)
    examples = settings.default.max_examples // 2  # each has some processes
    run_state_machine_as_test(
        ContainersMachine, settings=settings(max_examples=max(5, examples), stateful_step_count=8)
    )
