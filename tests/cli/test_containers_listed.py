"""Containers as they are shown: to people, on 80 columns too, and to programs."""

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from engine.cli import container_shapes
from engine.cli.container_shapes import ShownContainer, list_containers, shown, state_of
from engine.cli.output import View
from engine.kv.table import Damaged
from engine.metadata.containers import ContainerState
from engine.running.statuses import ContainerStatus

_SECOND = 10**9
_NOW = 1_700_000_000 * _SECOND
_HOUR = 3600 * _SECOND
_LONG = "docker.io/some-team/an-image-with-a-long-name:1.2.3-with-a-tag"


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container_shapes, "now", lambda: _NOW)
    monkeypatch.setattr("engine.cli.output.time.time_ns", lambda: _NOW)


def _status(state: ContainerState = ContainerState.RUNNING, **changes: Any) -> ContainerStatus:
    created = _NOW - 2 * _HOUR
    about: dict[str, Any] = {
        "id": "c-0123abcd",
        "unique": "0123456789abcdef",
        "state": state,
        "since": {"provisioning": created, str(state): _NOW - 300 * _SECOND},
        "created": created,
        "image": "docker.io/library/busybox:latest",
        "target": "sha256:" + "a" * 64,
        "backend": "overlay",
        "command": ("sh", "-c", "echo a b; sleep 1"),
    }
    return ContainerStatus(**(about | changes))


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (_status(pid=7), "running 5 min"),
        (_status(ContainerState.STOPPED, exit_code=1, ended=_NOW - _HOUR), "exited (1) 1 h ago"),
        (_status(ContainerState.STOPPED, ended=_NOW - _HOUR), "exited 1 h ago"),
        (_status(ContainerState.STOPPED), "stopped"),
        (_status(ContainerState.STARTING, since={}), "starting 2 h"),
        (_status(ContainerState.DESTROYING, error="it is in use"), "destroying: it is in use"),
    ],
)
def test_how_a_container_is_and_since_when(status: ContainerStatus, says: str):
    assert state_of(status) == says


def _lines(capsys: pytest.CaptureFixture[str], width: int | None, *found: ContainerStatus) -> list[str]:
    class Wide(View):
        @property
        def width(self) -> int | None:
            return width

    list_containers(Wide(), found, [Damaged("bad", "a record cannot be read")], "none")
    return re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()


def test_a_listing_fits_a_terminal(capsys: pytest.CaptureFixture[str]):
    long = _status(id="web", image=_LONG, command=("a command that is long",) * 5)
    header, first, second, lost = _lines(capsys, 80, _status(pid=7), long)
    assert max(map(len, (header, first, second))) <= 80
    assert header.split() == ["NAME", "IMAGE", "STATE"]
    assert first.startswith("c-0123abcd  busybox")
    assert "running 5 min" in first
    assert second.startswith("web ")
    assert lost.split(maxsplit=1) == ["bad", "a record cannot be read"]


def test_all_is_shown_where_there_is_room(capsys: pytest.CaptureFixture[str]):
    header, first, _ = _lines(capsys, None, _status(pid=7))
    assert header.split() == ["NAME", "IMAGE", "COMMAND", "STATE", "CREATED"]
    row = ["c-0123abcd", "busybox:latest", "sh -c 'echo a b; sleep 1'", "running 5 min", "2 h ago"]
    assert re.split(" {2,}", first) == row


def test_json_says_what_there_is_to_say():
    running = msgspec.to_builtins(shown(_status(pid=7, labels={"a": "b"})))
    assert running == {
        "name": "c-0123abcd",
        "unique": "0123456789abcdef",
        "image": "docker.io/library/busybox:latest",
        "digest": "sha256:" + "a" * 64,
        "snapshotter": "overlay",
        "command": ["sh", "-c", "echo a b; sleep 1"],
        "state": "running",
        "created": "2023-11-14T20:13:20.000000000Z",
        "started": "2023-11-14T22:08:20.000000000Z",
        "pid": 7,
        "labels": {"a": "b"},
    }
    ended = msgspec.to_builtins(shown(_status(ContainerState.STOPPED, exit_code=0, ended=_NOW)))
    assert (ended["exit_code"], ended["ended"]) == (0, "2023-11-14T22:13:20.000000000Z")
    assert not {"pid", "started", "error"} & ended.keys()


@pytest.mark.parametrize(
    ("view", "read", "empty"),
    [
        (View(json=True), lambda text: [row["name"] for row in json.loads(text)], "[]\n"),
        (View(quiet=True), str.split, ""),
    ],
)
def test_names_for_programs(
    view: View, read: Callable[[str], list[str]], empty: str, capsys: pytest.CaptureFixture[str]
):
    list_containers(view, [_status(), _status(id="web")], [Damaged("bad", "lost")], "none")
    assert read(capsys.readouterr().out) == ["c-0123abcd", "web", "bad"]
    list_containers(view, [], [], "none")
    assert capsys.readouterr() == (empty, "")


def test_of_a_damaged_record_there_is_a_name():
    assert msgspec.to_builtins(ShownContainer(name="bad", error="lost")) == {
        "name": "bad",
        "error": "lost",
    }
