"""What is shown of an image: its platform, what is missing of it, what it says of itself."""

import json
from pathlib import Path

import pytest

from engine.cli import shapes
from engine.cli.output import View
from engine.content.image import ResolvedImage
from engine.kv.schema import BLOBS
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor
from engine.oci.mediatypes import OCI_INDEX
from engine.root import Root
from engine.snapshots import Snapshotter
from engine.stores import Stores, host_platform, open_stores
from engine.testing.archives import archive, layout, member
from tests.cli.failing import assert_fails
from tests.command import lamina, lamina_json
from tests.engine.image_files import HELLO, WORLD, Files

pytestmark = pytest.mark.root


def _index(folder: Path, *architectures: str) -> Path:
    """Make an image of several platforms, as registries have them: an index below the layout's own."""
    for architecture in architectures:
        platform = {"os": "linux", "architecture": architecture}
        layout(folder, [archive(member(architecture, data=b"x"))], tag="1", platform=platform)
    index = (folder / "index.json").read_bytes()
    digest = digest_of(index)
    (folder / "blobs" / "sha256" / digest[7:]).write_bytes(index)
    entry = {"mediaType": OCI_INDEX, "digest": digest, "size": len(index)}
    entry |= {"annotations": {"org.opencontainers.image.ref.name": "1"}}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return folder


def test_an_image_of_another_platform_is_shown_as_it_is(tmp_path: Path):
    root, many = tmp_path / "root", _index(tmp_path / "many", "arm64", "s390x", "ppc64le")
    lamina(root, "import", "--platform", "linux/s390x", many)
    (row,) = lamina_json(root, "images")
    blobs = lamina_json(root, "content", "ls")
    assert (row["platform"], row["platforms"], row["layers"]) == ("linux/s390x", ["linux/s390x"], 1)
    assert row["size"] == sum(blob["size"] for blob in blobs)
    assert row["unpacked"]
    assert lamina_json(root, "image", "inspect", "many:1")["config"]["architecture"] == "s390x"
    lamina(root, "import", "--platform", "linux/arm64", many, "--no-unpack")
    (row,) = lamina_json(root, "images")
    assert sorted(row["platforms"]) == ["linux/arm64", "linux/s390x"]
    assert "linux/arm64, linux/s390x" in lamina(root, "images").stdout
    assert "ALSO FOR" in lamina(root, "image", "inspect", "many:1").stdout
    assert_fails(root, "unpack", "many:1", code=3, says="nothing for linux/amd64")


def test_an_index_of_several_prefers_this_machine(tmp_path: Path):
    root, many = tmp_path / "root", _index(tmp_path / "many", "s390x", "amd64")
    for platform in ("linux/s390x", "linux/amd64"):
        lamina(root, "import", "--no-unpack", "--platform", platform, many)
    (row,) = lamina_json(root, "images")
    assert (row["platform"], row["platforms"]) == ("linux/amd64", ["linux/amd64", "linux/s390x"])


def test_an_image_that_lost_a_part_is_a_row_with_an_error(stocked: Path):
    manifest = lamina_json(stocked, "image", "inspect", "app:1")["manifest"]
    for part in (manifest["layers"][1]["digest"], manifest["config"]["digest"]):
        with Root(stocked) as root, root.meta.write() as txn:
            BLOBS.delete(txn, "default", part)
        (row,) = lamina_json(stocked, "images")
        assert (row["name"], row["error"]) == ("docker.io/library/app:1", f"no blob {part}")
        assert lamina(stocked, "images").stdout.split()[:2] == ["app:1", "no"]
    assert_fails(stocked, "image", "inspect", "app:1", code=3, says="no blob")


def test_images_are_looked_at_as_they_are_shown_and_once_for_all_names(
    stocked: Path, monkeypatch: pytest.MonkeyPatch
):
    lamina(stocked, "tag", "app:1", "app:2")
    looked: list[str] = []

    def backends(stores: Stores) -> list[Snapshotter]:
        looked.append("backends")
        return all_backends(stores)

    def present(stores: Stores, target: Descriptor) -> list[ResolvedImage]:
        looked.append(target.digest)
        return all_present(stores, target)

    all_backends, all_present = Stores.snapshotters, Stores.present
    monkeypatch.setattr(Stores, "snapshotters", backends)
    monkeypatch.setattr(Stores, "present", present)
    with open_stores(stocked, "default", host_platform(), readonly=True) as stores:
        records = stores.images.walk()
        rows = map(shapes.images(stores), records)
        assert looked == ["backends"]
        assert [row.name for row in rows] == [record.name for record in records]
    assert looked == ["backends", records[0].target.digest]


def test_inspect_of_an_incomplete_image_fails_and_shows_what_there_is(stocked: Path):
    whole = lamina_json(stocked, "image", "inspect", "app:1")
    layer, size = (whole["manifest"]["layers"][1][key] for key in ("digest", "size"))
    with Root(stocked) as root, root.meta.write() as txn:
        BLOBS.delete(txn, "default", layer)
    done = lamina(stocked, "image", "inspect", "app:1", "--json", code=5)
    shown = json.loads(done.stdout)
    error = {"kind": "DataLoss", "message": f"image app:1: no blob {layer}", "exit_code": 5}
    assert shown["error"] == error
    assert {key: whole[key] for key in shown if key != "error"} | {
        "error": error,
        "uses": ["run"],
        "size": whole["size"] - size,
    } == shown
    assert {"manifest", "config", "chain_ids", "layers"} <= shown.keys()
    done = lamina(stocked, "image", "inspect", "app:1", code=5)
    assert done.stderr == f"lamina: {error['message']}\n"
    assert "PLATFORM" in done.stdout


def test_inspect_shows_the_manifest_as_it_is_stored(tmp_path: Path):
    files = Files()
    files.name(files.image(subject=files.image(), odd={"of": ["someone's"]}))
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", files.folder(tmp_path / "image"))
    shown = lamina_json(root, "image", "inspect", "example.org/a:1")
    assert shown["manifest"] == json.loads(lamina(root, "content", "get", shown["digest"]).stdout)


def test_inspect_shows_how_an_image_is_run_and_was_made(tmp_path: Path):
    evil = "\x1b]0;owned\x07"
    config = {
        "created": "2024-01-02T03:04:05Z",
        "config": {
            "Entrypoint": ["/bin/sh", "-c"],
            "Cmd": ["echo", f"a b{evil}"],
            "Env": ["PATH=/bin", "LONG=" + "x" * 5000, *(f"N{n}=" for n in range(200))],
            "Labels": {"maintainer": "someone", "odd": "5"},
            "User": "nobody",
            "WorkingDir": "/srv",
            "ExposedPorts": {"80/tcp": {}},
            "Volumes": None,
            "StopSignal": "9",
        },
        "history": [
            {"created": "2024-01-02T03:04:05Z", "created_by": "COPY  . \n/srv"},
            {"created_by": "ENV PATH=/bin", "empty_layer": True},
            "nonsense",
            {"created": 5, "comment": f"{evil}imported"},
        ],
    }
    layers = [archive(member("a")), archive(member("b"))]
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", layout(tmp_path / "app", layers, tag="1", config=config))
    text = lamina(root, "image", "inspect", "app:1").stdout
    facts = {line[:11].strip(): line[13:] for line in text.partition("\n\n")[0].splitlines()}
    assert facts["ENTRYPOINT"] == '["/bin/sh", "-c"]'
    assert facts["COMMAND"].startswith('["echo", "a b')
    assert facts["ENVIRONMENT"] == "PATH=/bin"
    assert (facts["USER"], facts["WORKDIR"], facts["PORTS"]) == ("nobody", "/srv", "80/tcp")
    assert facts["LABELS"] == "maintainer=someone"
    assert "odd=5" in text
    assert facts["STOP SIGNAL"] == "9"
    assert "… and 102 more" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) < 2100
    *_, history = text.split("\n\n")
    shown = lamina_json(root, "image", "inspect", "app:1")
    first, second = (layer["digest"] for layer in shown["manifest"]["layers"])
    steps = [line.split(maxsplit=2) for line in history.splitlines()[1:]]
    assert [step[:2] for step in steps] == [[first, "2024-01-02"], ["-", "-"], [second, "5"]]
    assert steps[0][2] == "COPY . /srv"
    assert shown["config"]["config"]["Entrypoint"] == ["/bin/sh", "-c"]
    assert shown["config"]["history"][1]["empty_layer"] is True


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"config": None}, ""),
        ({"history": {}}, ""),
        ({"config": []}, "Expected"),
        ({"config": "x"}, "Expected"),
        ({"config": {"Labels": {"odd": 5}}}, "Expected `str`, got `int`"),
        ({"config": {"StopSignal": "KI\x1bLL"}}, "LL' is not a signal"),
    ],
)
def test_m_15_inspect_of_an_odd_config(tmp_path: Path, config: dict[str, object], why: str):
    """What could not be run is said to be so, and the rest shown."""
    root = tmp_path / "root"
    image = layout(tmp_path / "app", [archive(member("a"))], tag="1", config=config)
    lamina(root, "import", "--no-unpack", image)
    text = lamina(root, "image", "inspect", "app:1").stdout
    assert "PLATFORM" in text
    assert ("NO RUN" in text) == bool(why)
    assert why in text


def test_a_digest_in_a_name_is_short_on_a_terminal_and_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = Files()
    for layer in (HELLO, WORLD):
        files.list(files.image([layer]))
    root = tmp_path / "root"
    lamina(root, "import", "--no-unpack", files.folder(tmp_path / "two"))
    monkeypatch.setattr(View, "width", 80)
    header, *lines = lamina(root, "images").stdout.splitlines()
    assert "UPDATED" in header
    for line in lines:
        name, digest, *_ = line.split()
        assert name == f"two@{digest}"
        assert lamina_json(root, "image", "inspect", name)["digest"].startswith(f"sha256:{digest}")
