"""What can be typed: other names of commands, names and digests, -q, what a shell completes."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from engine.cli.program import ALIASES, Listed
from tests.cli.failing import assert_fails
from tests.cli.test_commands import CHAIN
from tests.command import LAMINA, commands, environment, lamina, lamina_json
from tests.test_architecture import TOP

pytestmark = pytest.mark.root


# -- commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "listed"), [pytest.param(*both, id=" ".join(both[0])) for both in commands()]
)
def test_the_list_of_commands_says_what_each_says_itself(words: tuple[str, ...], listed: Listed):
    module, _, attribute = listed.place.partition(":")
    command = getattr(import_module(f"engine.cli.{module}"), attribute)
    assert command.help.splitlines()[0] == listed.help
    assert len(f"  {words[-1]:<10}  {listed.help}") <= 80


@pytest.mark.parametrize("alias", ALIASES, ids=" ".join)
def test_other_names_of_commands(tmp_path: Path, alias: tuple[str, ...]):
    shown = lamina(tmp_path, *alias, "--help").stdout
    meant = lamina(tmp_path, *ALIASES[alias], "--help").stdout
    assert shown.splitlines()[2:] == meant.splitlines()[2:]
    assert " ".join(alias) in " ".join(lamina(tmp_path, "--help").stdout.split())


@pytest.mark.parametrize("words", [[], ["image"], ["snapshot"]])
def test_lamina_alone_prints_its_help(words: list[str]):
    done = subprocess.run([*LAMINA, *words], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: ")
    assert "Commands:" in done.stdout
    assert done.stderr == ""


_LOADED = """
import sys
from engine.cli.program import run
run()
print(*sorted(sys.modules), file=sys.stderr)
"""


def test_what_a_command_does_not_need_is_not_loaded(stocked: Path):
    loaded = {}
    for words in (["--help"], ["--root", str(stocked), "images"], ["--root", str(stocked), "umount"]):
        command = [sys.executable, "-P", "-c", _LOADED, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        loaded[words[-1]] = set(done.stderr.split())
        assert "engine.cli.program" in loaded[words[-1]]
        assert not {"trio", "rich.progress", "engine.app"} & loaded[words[-1]], words
    assert "engine.cli.images" not in loaded["--help"]


def test_every_command_is_in_the_readme():
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    table = readme.partition("| command |")[2].partition("\n\n")[0]
    for words, _ in commands():
        assert all(word in table for word in words), words


# -- names and digests ------------------------------------------------------------------------


def test_an_image_is_named_by_digits_wherever_one_is_asked_for(stocked: Path, target: Path):
    digest = lamina_json(stocked, "images")[0]["digest"]
    for text in (digest, digest[7:19], digest[:15]):
        assert lamina_json(stocked, "image", "inspect", text)["digest"] == digest
        assert lamina_json(stocked, "unpack", text)["chain_id"] == CHAIN[-1]
        lamina_json(stocked, "mount", text, target)
        lamina(stocked, "umount", target)
        lamina(stocked, "image", "tag", text, "again:1", "--replace")
    says = "has 2 names (again:1, app:1); say which"
    assert_fails(stocked, "image", "rm", digest[7:19], code=6, says=says)
    lamina(stocked, "rmi", "app:1")
    lamina(stocked, "rmi", digest[7:19])
    assert lamina_json(stocked, "images") == []


def test_the_name_of_what_is_kept_goes_before_digits(stocked: Path, target: Path):
    digits = lamina_json(stocked, "images")[0]["digest"][7:15]
    lamina(stocked, "mount", "app:1", target, "--rw", "--name", digits)
    (target / "written").touch()
    lamina(stocked, "umount", target)
    assert lamina_json(stocked, "mount", digits, target)["rw"]
    assert (target / "written").exists()
    lamina(stocked, "umount", target)


def test_blobs_and_snapshots_by_digits(stocked: Path):
    config = lamina_json(stocked, "image", "inspect", "app:1")["manifest"]["config"]["digest"]
    assert lamina(stocked, "content", "get", config[7:19]).stdout.startswith("{")
    assert lamina_json(stocked, "content", "verify", config[7:19])["blobs"] == 1
    (row,) = lamina_json(stocked, "snapshots", "usage", CHAIN[1][7:19])
    assert row["key"] == CHAIN[1]
    lamina(stocked, "snapshots", "rm", CHAIN[1][7:19], CHAIN[0][7:19])
    lamina(stocked, "image", "rm", "app:1")
    assert lamina_json(stocked, "content", "rm", config[7:19])["removed"] == [config]


def test_a_mount_is_unmounted_by_its_name(
    stocked: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    lamina(stocked, "mount", "app:1", target, "--name", "web")
    assert lamina(stocked, "mounts", "-q").stdout == "web\n"
    (tmp_path / "web").mkdir()
    assert_fails(stocked, "umount", "web", code=3, says="has mounted nothing")  # a folder goes first
    (tmp_path / "web").rmdir()
    lamina(stocked, "unmount", "web")
    assert lamina_json(stocked, "mounts") == []


def test_the_name_of_what_is_kept_unmounts_nothing(stocked: Path, target: Path):
    """At the target that it had another mount may be by now."""
    lamina(stocked, "mount", "app:1", target, "--rw", "--name", "web")
    lamina(stocked, "umount", target)
    lamina(stocked, "mount", "app:1", target)
    assert_fails(stocked, "umount", "web", code=3, says="has mounted nothing")
    assert target.is_mount()
    lamina(stocked, "umount", target)


# -- quietly ----------------------------------------------------------------------------------


def test_quiet_listings_are_what_can_be_typed_back(stocked: Path):
    assert lamina(stocked, "images", "-q").stdout == "app:1\n"
    blobs = lamina(stocked, "content", "ls", "-q").stdout.split()
    assert blobs == [row["digest"] for row in lamina_json(stocked, "content", "ls")]
    for words in (["snapshots", "ls", "-q"], ["snapshots", "usage", "-q"]):
        assert set(lamina(stocked, *words).stdout.split()) == set(CHAIN)
    assert "overlay" in lamina(stocked, "backends", "-q").stdout.split()
    (digest,) = lamina(stocked, "image", "inspect", "app:1", "-q").stdout.split()
    assert digest == lamina_json(stocked, "images")[0]["digest"]
    assert lamina(stocked, "snapshots", "tree", "-q").stdout.splitlines()[1].endswith(CHAIN[0])


def test_quiet_commands_say_nothing(tmp_path: Path, image: Path, target: Path):
    root = tmp_path / "root"
    for words in (
        ["import", image],
        ["image", "tag", "app:1", "app:2"],
        ["mount", "app:1", target, "--rw", "--name", "web"],
        ["umount", target],
        ["snapshots", "rm", "web"],
        ["content", "verify"],
        ["image", "rm", "app:1", "app:2"],
        ["gc"],
    ):
        done = lamina(root, *words, "--quiet")
        assert (done.stdout, done.stderr) == ("", ""), words
    assert lamina(root, "image", "rm", "app:1", "-q", code=3).stderr


# -- completion -------------------------------------------------------------------------------

_TRY = r"""
source <(lamina completion bash)
complete -p lamina
for words in "lamina ima" "lamina image " "lamina --root $ROOT mount a" "lamina --root $ROOT umount " \
    "lamina --root $ROOT images --n" "lamina --root /nowhere mount a"; do
    IFS=' ' read -ra COMP_WORDS <<< "$words"
    [ "${words: -1}" = " " ] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _lamina_completion lamina "${COMP_WORDS[COMP_CWORD]}" ""
    echo "${COMPREPLY[@]}"
done
"""


def test_bash_completes_words(stocked: Path, target: Path, tmp_path: Path):
    lamina(stocked, "mount", "app:1", target)
    command = tmp_path / "bin" / "lamina"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {" ".join(LAMINA)} "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}:{os.environ['PATH']}"
    variables = environment() | {"PATH": path, "ROOT": str(stocked)}
    try:
        done = subprocess.run(
            ["bash", "-c", _TRY], capture_output=True, text=True, check=False, env=variables
        )
    finally:
        lamina(stocked, "umount", target)
    assert done.stderr == ""
    setup, *completed = done.stdout.splitlines()
    assert setup == "complete -o nosort -F _lamina_completion lamina"
    assert completed == [
        "images image",
        "ls inspect tag label pin unpin rm prune",
        "app:1",
        str(target),
        "--no-trunc",
        "",
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_usual_variable_works_too(tmp_path: Path, shell: str, monkeypatch: pytest.MonkeyPatch):
    script = lamina(tmp_path, "completion", shell).stdout
    monkeypatch.setenv("_LAMINA_COMPLETE", f"{shell}_source")
    assert lamina(tmp_path).stdout.rstrip() == script.rstrip()
    assert "_LAMINA_COMPLETE" in script
