"""The made-up corpora: the same bytes each time, valid images, with what they say they have."""

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from benchmarks.contents import read_contents
from benchmarks.cores import CORES
from benchmarks.images import image_at, made_or_found, read_image
from benchmarks.packing import pack_image
from benchmarks.rooflines import rooflines
from benchmarks.synthetic import SHAPES, made_layers
from tests.command import lamina, lamina_json
from tests.conftest import peer


def tiny(name: str, folder: Path, compression: str = "none") -> Path:
    shape = SHAPES[name]
    small = dataclasses.replace(shape, files=min(shape.files, 20), size=20_000)
    return pack_image(folder / "image", made_layers(small), compression)


@pytest.mark.root
@pytest.mark.parametrize("name", SHAPES)
def test_a_corpus_is_an_image_that_unpacks(tmp_path: Path, name: str):
    archive = tiny(name, tmp_path)
    lamina(tmp_path / "root", "import", "--snapshotter", "overlay", archive)
    shape = SHAPES[name]
    assert len(lamina_json(tmp_path / "root", "snapshots", "ls")) == shape.layers
    contents = read_contents(image_at(name, tmp_path / "image", archive))
    assert len(contents.layers) == shape.layers
    assert contents.entries >= shape.layers * min(shape.files, 20)
    assert contents.size >= shape.layers * 20_000


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_the_same_shape_gives_the_same_bytes(tmp_path: Path, compression: str):
    peer("pigz" if compression == "gzip" else compression)
    first, second = (tiny("many-files", tmp_path / place, compression) for place in ("a", "b"))
    digests = [image_at("", f.with_suffix(""), f).target for f in (first, second)]
    assert digests[0] == digests[1]


def test_an_image_is_found_as_a_layout_or_as_an_archive(tmp_path: Path):
    archive = tiny("one-file", tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    by_archive, by_layout = (
        read_image(archive, tmp_path / "a"),
        read_image(tmp_path / "image", tmp_path / "b"),
    )
    assert by_archive.target == by_layout.target
    assert read_contents(by_archive) == read_contents(by_layout)
    assert (by_archive.tag, len(by_archive.layers)) == ("latest", 1)
    with pytest.raises(SystemExit, match="no such file"):
        made_or_found(str(tmp_path / "none"), tmp_path)


@pytest.mark.root
def test_rooflines_make_the_same_files(tmp_path: Path):
    archive = tiny("equal-layers", tmp_path)
    image = image_at("", tmp_path / "image", archive)
    contents = read_contents(image)
    target = tmp_path / "target"
    target.mkdir()
    found = {name: run(target) for name, run in rooflines(image, contents).items()}
    assert set(found) == {"hash", "write"}
    assert CORES >= 1
    for number, layer in enumerate(contents.layers):
        for entry in layer.entries:
            stat = os.lstat(target / str(number) / entry.path)
            assert (stat.st_mtime_ns, stat.st_mode & 0o7777) == (entry.mtime_ns, entry.mode)
            assert entry.is_folder or stat.st_size == entry.size
    shutil.rmtree(target)
