"""What the words of `lamina run` mean: as docker's and podman's users know them."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from engine.cli.run_options import (
    parse_bind,
    parse_bytes,
    parse_environment,
    parse_labels,
    run_options,
)
from engine.errors import InvalidArgument
from engine.running.options import Bind, Network, Resources, RunOptions


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("64k", 64 << 10),
        ("512m", 512 << 20),
        ("512M", 512 << 20),
        ("512MB", 512 << 20),
        ("512MiB", 512 << 20),
        ("512 m", 512 << 20),
        ("1.5g", 3 << 29),
        ("2t", 2 << 40),
        ("10b", 10),
    ],
)
def test_sizes(text: str, size: int):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "m", "-1", "0", "0.1", "1x", "1mm", "1e3", "٣", "9" * 15 + "p", "1\n"]
)
def test_what_is_no_size(text: str):
    with pytest.raises(InvalidArgument, match="is no size; write bytes, or as 512m"):
        parse_bytes(text)


def test_variables_come_with_their_value_or_from_here():
    words = ["A=1", "B=", "C=x=y", "HOME", "NOT_THERE"]
    assert parse_environment(words, {"HOME": "/root", "A": "2"}) == ("A=1", "B=", "C=x=y", "HOME=/root")
    for word in ("", "=1"):
        with pytest.raises(InvalidArgument, match="is no variable; write KEY=VALUE, or KEY"):
            parse_environment([word], {})


def test_folders_of_the_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    here = str(tmp_path / "data")
    assert parse_bind(f"{here}:/data") == Bind(source=here, target="/data")
    assert parse_bind("./data:/data/../srv/:ro") == Bind(source=here, target="/srv", readonly=True)
    assert parse_bind(".:/data:rw") == Bind(source=str(tmp_path), target="/data")


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("data", "write SRC:DST"),
        ("/data", "write SRC:DST"),
        (":/data", "write SRC:DST"),
        ("./data:", "write SRC:DST"),
        ("./data:data", "with an absolute path as DST"),
        ("./data:/data:rx", "or SRC:DST:ro"),
        ("./data:/data:ro:rw", "or SRC:DST:ro"),
        ("data:/data", r"there are no volumes with names; name a folder, as \./data"),
        ("./nothing:/data", r"there is no \./nothing; make it first"),
        ("./data://../", "nothing can be mounted at / itself"),
    ],
)
def test_what_names_no_folder(word: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(InvalidArgument, match=says):
        parse_bind(word)


def test_labels():
    assert parse_labels(["a=1", "b", "c=x=y", "a=2"]) == {"a": "2", "b": "", "c": "x=y"}
    with pytest.raises(InvalidArgument, match="is no label; write KEY=VALUE"):
        parse_labels(["=x"])


def _asked(*words: str) -> RunOptions:
    """Return what a command line asks for."""
    found = []

    @click.command(context_settings={"allow_interspersed_args": False})
    @click.argument("arguments", nargs=-1)
    @run_options
    def command(options: RunOptions) -> None:
        found.append(options)

    CliRunner().invoke(command, words, catch_exceptions=False, standalone_mode=False)
    return found[0]


def test_nothing_asked_for_is_as_the_image_says():
    assert _asked() == RunOptions()


def test_all_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FROM_HERE", "1")
    words = [
        "-it",
        "-e",
        "A=1",
        "-e",
        "FROM_HERE",
        "-v",
        f"{tmp_path}:/data:ro",
        "-w",
        "/srv",
        "-u",
        "1:2",
    ]
    words += ["--read-only", "--hostname", "web", "--network", "host", "-m", "64m", "--cpus", "1.5"]
    words += ["--pids-limit", "10", "-l", "a=b", "--stop-signal", "INT", "--entrypoint", "/bin/sh"]
    assert _asked(*words, "--", "-c", "echo -e") == RunOptions(
        args=("-c", "echo -e"),
        entrypoint=("/bin/sh",),
        env=("A=1", "FROM_HERE=1"),
        cwd="/srv",
        user="1:2",
        hostname="web",
        terminal=True,
        stdin=True,
        readonly=True,
        binds=(Bind(source=str(tmp_path), target="/data", readonly=True),),
        network=Network.HOST,
        resources=Resources(memory=64 << 20, cpus=1.5, pids=10),
        stop_signal="INT",
        labels={"a": "b"},
    )


def test_an_empty_entrypoint_is_none():
    assert _asked("--entrypoint", "").entrypoint == ()
    assert _asked().entrypoint is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-m", "1m"), "a container needs 6m at least"),
        (("--cpus", "0"), "write how many"),
        (("--cpus", "nan"), "write how many"),
        (("--pids-limit", "-2"), "or -1 for no limit"),
        (("-w", "srv"), "is no absolute path"),
        (("--hostname", "a b"), "is no host name"),
        (("--hostname", "a" * 65), "is no host name"),
        (("--stop-signal", "SIGNOTHING"), "is not a signal"),
    ],
)
def test_what_cannot_be_asked_for(words: tuple[str, ...], says: str):
    with pytest.raises(InvalidArgument, match=says):
        _asked(*words)


def test_no_limit_of_processes():
    assert _asked("--pids-limit", "-1").resources == Resources()
