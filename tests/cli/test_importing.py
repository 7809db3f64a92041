"""The command `import` on sources that hold several things, and on standard input."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from engine.testing.archives import archive, member
from tests.cli.failing import assert_fails
from tests.command import LAMINA, dump, environment, lamina, lamina_json
from tests.engine.image_files import HELLO, WORLD, Files

pytestmark = pytest.mark.root


def mixed(folder: Path) -> Path:
    """A layout of a good image, a bad one, and a chart."""
    files = Files()
    files.tag(files.image([HELLO]), "good").tag(files.chart(), "chart")
    bad = files.image([WORLD])
    files.tag(bad, "bad")
    layer = json.loads(files.files["blobs/" + bad["digest"].replace(":", "/")])["layers"][0]
    del files.files["blobs/" + layer["digest"].replace(":", "/")]
    return files.folder(folder / "mixed")


def _good(folder: Path) -> Path:
    """A layout of a good image and a chart."""
    files = Files()
    return files.tag(files.image([HELLO]), "1").tag(files.chart(), "chart").folder(folder / "app")


CHART = "its config is 'application/vnd.cncf.helm.config.v1+json'"


def test_what_is_no_image_is_said(tmp_path: Path):
    done = lamina(tmp_path / "root", "import", "--no-unpack", _good(tmp_path))
    first, second = done.stderr.splitlines()
    assert first.startswith("imported app:1 (")
    assert second == f"passed over chart: {CHART}"
    assert not done.stdout
    assert not lamina(tmp_path / "root", "import", "--no-unpack", "-q", tmp_path / "app").stderr


def test_what_is_no_image_is_in_the_json(tmp_path: Path):
    found = lamina_json(tmp_path / "root", "import", "--no-unpack", _good(tmp_path))
    (row,) = lamina_json(tmp_path / "root", "images")
    assert found["images"] == [row]
    (passed,) = found["passed_over"]
    assert (passed["name"], passed["reason"]) == ("chart", CHART)
    assert passed["digest"].startswith("sha256:")
    assert found["failed"] == found["unpacked"] == []


def test_a_bad_image_beside_a_good_one(tmp_path: Path):
    source = mixed(tmp_path)
    done = lamina(tmp_path / "root", "import", "--no-unpack", source, code=5)
    said = done.stderr.splitlines()
    assert [line[:20] for line in said] == [
        "imported mixed:good ",
        "passed over chart: i",
        "lamina: image mixed:",
    ]
    assert "image mixed:bad: blob sha256:" in said[-1]
    assert "is missing; the image is incomplete" in said[-1]
    assert [row["name"] for row in lamina_json(tmp_path / "root", "images")] == [
        "docker.io/library/mixed:good"
    ]


def test_no_error_is_kept_quiet(tmp_path: Path):
    files = Files()
    files.tag(files.image([HELLO]), "good")
    for number in range(30):
        files.tag({**files.image([WORLD]), "digest": f"sha256:{number:064}"}, f"bad{number}")
    source = files.folder(tmp_path / "mixed")
    said = lamina(tmp_path / "root", "import", "--no-unpack", "-q", source, code=5).stderr.splitlines()
    assert said.pop(-2) == "and 9 more such; --json lists them"
    assert [line.split(":")[2] for line in said] == [f"bad{n}" for n in (*range(1, 21), 0)]


def test_a_bad_image_in_the_json(tmp_path: Path):
    done = lamina(tmp_path / "root", "import", mixed(tmp_path), "--json", code=5)
    found = json.loads(done.stdout)
    assert [row["name"] for row in found["images"]] == ["docker.io/library/mixed:good"]
    assert [row["name"] for row in found["failed"]] == ["bad"]
    assert found["error"]["exit_code"] == 5
    assert found["error"]["message"] == found["failed"][0]["error"]
    assert found["unpacked"][0]["digest"] == found["images"][0]["digest"]


def test_a_bad_image_that_is_asked_for(tmp_path: Path):
    root, source = tmp_path / "root", mixed(tmp_path)
    lamina(root, "import", "--no-unpack", "--ref", "good", source)
    before = dump(root)
    words = ("import", "--no-unpack", "--ref", "good", "--ref")
    assert_fails(root, *words, "bad", source, code=5, says="image mixed:bad: blob sha256:")
    assert_fails(root, *words, "chart", source, code=5, says=CHART)
    assert_fails(root, *words, "none", source, code=3, says="it has mixed:good, mixed:chart, mixed:bad")
    assert dump(root) == before


def test_many_lines_are_cut(tmp_path: Path):
    files = Files()
    files.tag(files.image(), "good")
    for number in range(50):
        files.tag(files.document({"n": number}, "text/plain"), f"n{number}")
    done = lamina(tmp_path / "root", "import", "--no-unpack", files.folder(tmp_path / "many"))
    assert len(done.stderr.splitlines()) == 22
    assert done.stderr.endswith("and 30 more such; --json lists them\n")


def test_a_tag_that_is_no_reference(tmp_path: Path):
    files = Files()
    source = files.tag(files.image(), "1.0+build.5").folder(tmp_path / "app")
    root = tmp_path / "root"
    done = lamina(root, "import", source, code=5)
    assert done.stderr.startswith("lamina: image app:1.0+build.5: its name in the archive is no image")
    lamina(root, "import", "--no-unpack", source, "--name", "app:1.0")


def test_what_unpacking_left_out_is_said(tmp_path: Path):
    layer = archive(member("f", pax={b"SCHILY.xattr.trusted.mine": b"1"}))
    files = Files()
    packed = {**files.layers([layer])[0], "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"}
    source = files.tag(files.image([layer], layers=[packed]), "1").folder(tmp_path / "app")
    root = tmp_path / "root"
    for further in ([], ["--no-unpack"]):
        assert_fails(root, "import", "--strict", *further, source, code=5, says="gzip by its media type")
    done = lamina(root, "import", source)
    first, second = done.stderr.splitlines()
    assert first.endswith(", 1 xattrs left out")
    assert second.endswith("packed with none by its bytes, gzip by its media type")


# -- standard input ---------------------------------------------------------------------------


def test_standard_input(tmp_path: Path):
    files = Files()
    file = files.name(files.image()).tar(tmp_path / "image.tar")
    with file.open("rb") as source:
        lamina(tmp_path / "root", "import", "--no-unpack", "-", stdin=source)
    data = file.read_bytes()
    reader, writer = os.pipe()
    assert len(data) < 1 << 16, "a pipe holds it"
    os.write(writer, data)
    os.close(writer)
    with open(reader, "rb") as source:
        lamina(tmp_path / "root", "import", "--no-unpack", "-", "--name", "piped", stdin=source)
    assert [row["name"] for row in lamina_json(tmp_path / "root", "images")] == [
        "docker.io/library/piped:latest",
        "example.org/a:1",
    ]


def test_a_file_called_as_standard_input_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = Files()
    files.name(files.image()).tar(tmp_path / "-")
    monkeypatch.chdir(tmp_path)
    lamina(tmp_path / "root", "import", "--no-unpack", "./-")


def test_standard_input_that_is_closed(tmp_path: Path):
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *LAMINA, "--root", str(tmp_path / "root"), "import", "-"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 2
    assert done.stderr == (
        "lamina: there is no archive on standard input; pipe one to `lamina import -`\n"
    )


def test_standard_input_that_is_a_terminal(tmp_path: Path):
    parent, child = os.openpty()
    done = lamina(tmp_path / "root", "import", "-", code=2, stdin=child)
    os.close(parent)
    os.close(child)
    assert "there is no archive on standard input" in done.stderr


def test_a_pipe_that_stalls_is_left_by_an_interrupt(tmp_path: Path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", _good(tmp_path))
    before = dump(root)
    command = [*LAMINA, "--root", str(root), "import", str(fifo)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment())
    with fifo.open("wb") as pipe:  # waits until the child has opened it
        pipe.write(b"oci-layout")
        pipe.flush()
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said == b"lamina: interrupted\n"
    assert dump(root) == before
