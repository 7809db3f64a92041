"""Images that must not come in, by attack row; each leaves the store as it was."""

import gzip
import json
import os
import re

import pytest

from engine import limits
from engine.archive.source import FolderSource
from engine.errors import DigestMismatch, EngineError, NotFound, PermissionDenied, Refused
from engine.failpoints import armed
from engine.oci.digest import digest_of
from engine.oci.documents import NotAnImage
from engine.testing.archives import END, archive, checksummed, member
from tests.engine.image_files import (
    AMD64,
    ARM64,
    CONFIG,
    HELLO,
    INDEX,
    LAYER,
    MANIFEST,
    WORLD,
    Files,
    config_of,
    docker_files,
    import_image,
    state,
    tar_of,
)


def name_of(entry) -> str:
    return "blobs/" + entry["digest"].replace(":", "/")


def with_layer(**changes) -> Files:
    """Return an image whose only layer's descriptor has `changes`."""
    files = Files()
    return files.name(files.image(layers=[files.blob(HELLO, LAYER, **changes)]))


def with_manifest(**changes) -> Files:
    files = Files()
    return files.name(files.image(**changes))


def with_config(**changes) -> Files:
    return with_manifest(config=config_of([HELLO], **changes))


def with_rootfs(**changes) -> Files:
    return with_config(rootfs={"type": "layers", "diff_ids": [digest_of(HELLO)], **changes})


def with_bytes(of: str, change) -> Files:
    """Return an image one of whose blobs has other bytes than its name says."""
    files = Files()
    entry = files.image()
    manifest = json.loads(files.files[name_of(entry)])
    target = {"manifest": entry, "config": manifest["config"], "layer": manifest["layers"][0]}[of]
    files.files[name_of(target)] = change(files.files[name_of(target)])
    return files.name(entry)


def without(of: str) -> Files:
    files = with_bytes(of, lambda _: b"gone")
    files.files = {name: data for name, data in files.files.items() if data != b"gone"}
    return files


def with_file(name: str, data: bytes | None) -> Files:
    files = with_manifest()
    whole = files.all()
    changed = (
        {**whole, name: data} if data is not None else {k: v for k, v in whole.items() if k != name}
    )
    files.all = lambda: changed
    return files


def index_of(*changes, **document) -> Files:
    files = Files()
    entries = [{**files.image(), "platform": AMD64, **change} for change in changes]
    return files.name(files.index(*entries, **document))


def nested_too_deep() -> Files:
    files = Files()
    entry = {**files.image(), "platform": AMD64}
    for _ in range(limits.INDEX_DEPTH + 1):
        entry = {**files.index(entry), "platform": AMD64}
    return files.name(entry)


def layer_twice_one_lie() -> Files:
    """The second descriptor of the blob lies; that the blob is here by then must not hide it."""
    files = Files()
    layer = files.blob(HELLO, LAYER)
    return files.name(files.image([HELLO, HELLO], layers=[layer, {**layer, "size": 1}]))


def listed_as(*platforms) -> Files:
    """Return an `index.json` whose first entry is an arm64 image, whatever platform it is listed for."""
    files = Files()
    entries = [files.image(config=config_of([HELLO], **ARM64)), files.image([WORLD])]
    for entry, platform in zip(entries, platforms, strict=True):
        files.name({**entry, "platform": platform} if platform else entry)
    return files


def flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


_EMPTY = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

ROWS = {
    "M-01 manifests in a manifest": lambda: with_manifest(manifests=[]),
    "M-01 embedded type is an index's": lambda: with_manifest(mediaType=INDEX),
    "M-01 index type, manifest document": lambda: (f := Files()).name(f.image(), mediaType=INDEX),
    "M-01 manifest type, index document": lambda: (f := Files()).name(f.index(), mediaType=MANIFEST),
    "M-01 layers in index.json": lambda: with_file(
        "index.json", b'{"schemaVersion":2,"manifests":[],"layers":[]}'
    ),
    "M-01 manifest as index.json": lambda: with_file("index.json", b'{"schemaVersion":2,"layers":[]}'),
    "M-02 Layers": lambda: with_manifest(Layers=[]),
    "M-02 Manifests in index.json": lambda: with_file(
        "index.json", b'{"schemaVersion":2,"manifests":[],"Manifests":[]}'
    ),
    "M-02 index.json with a byte order mark": lambda: with_file("index.json", b"\xef\xbb\xbf{}"),
    "M-02 index.json nested deeply": lambda: with_file("index.json", b"[" * 10**5),
    "M-02 duplicate key in oci-layout": lambda: with_file(
        "oci-layout", b'{"imageLayoutVersion":"1.0.0","imageLayoutVersion":"1.0.0"}'
    ),
    "M-03 layer of 2^62 bytes": lambda: with_layer(size=1 << 62),
    "M-03 layer of -1 bytes": lambda: with_layer(size=-1),
    "M-03 layer of no bytes": lambda: with_layer(size=0),
    "M-03 manifest of 2^62 bytes": lambda: (f := Files()).name(f.image(), size=1 << 62),
    "M-03 manifest of no bytes": lambda: (f := Files()).name(f.image(), size=0),
    "M-03 manifest over 4 MiB": lambda: with_manifest(annotations={"x": "y" * limits.MANIFEST}),
    "M-03 config over 8 MiB": lambda: with_config(x="y" * limits.CONFIG),
    "M-03 index.json over 4 MiB": lambda: with_file("index.json", b" " * (limits.MANIFEST + 1)),
    "M-03 oci-layout over 4 MiB": lambda: with_file("oci-layout", b" " * (limits.MANIFEST + 1)),
    "M-04 layer longer than said": lambda: with_layer(size=len(HELLO) - 1),
    "M-04 layer shorter than said": lambda: with_layer(size=len(HELLO) + 1),
    "M-04 layer cut off": lambda: with_bytes("layer", lambda data: data[:-1]),
    "M-04 layer with more behind": lambda: with_bytes("layer", lambda data: data + b"x"),
    "M-04 layer listed twice, one size wrong": layer_twice_one_lie,
    "M-04 manifest longer than said": lambda: (f := Files()).name(f.image(), size=10),
    "M-04 config cut off": lambda: with_bytes("config", lambda data: data[:-1]),
    "M-05 layer with other bytes": lambda: with_bytes("layer", flip),
    "M-05 config with other bytes": lambda: with_bytes(
        "config", lambda data: data.replace(b"amd64", b"amd65")
    ),
    "M-05 manifest with other bytes": lambda: with_bytes(
        "manifest", lambda data: data.replace(b"tar", b"tax")
    ),
    "M-05 layer under another digest": lambda: with_layer(digest=digest_of(WORLD)),
    "M-05 empty digest on bytes": lambda: with_layer(digest=_EMPTY),
    "M-06 md5 layer": lambda: with_layer(digest="md5:" + "a" * 32),
    "M-06 sha1 manifest": lambda: (f := Files()).name(f.image(), digest="sha1:" + "a" * 40),
    "M-06 upper case layer": lambda: with_layer(digest=digest_of(HELLO).upper()),
    "M-06 layer outside": lambda: with_layer(digest="sha256:../../../etc/passwd"),
    "M-09 layer of unknown type": lambda: with_layer(mediaType="application/octet-stream"),
    "M-09 encrypted layer": lambda: with_layer(mediaType=f"{LAYER}+encrypted"),
    "M-09 config as layer": lambda: with_layer(mediaType=CONFIG),
    "M-09 empty config": lambda: (f := Files()).name(
        f.image(config={}, layers=[]), mediaType="application/vnd.oci.empty.v1+json"
    ),
    "M-11 more layers than diff IDs": lambda: with_rootfs(diff_ids=[]),
    "M-11 fewer layers than diff IDs": lambda: with_rootfs(diff_ids=[digest_of(HELLO)] * 2),
    "M-11 upper case diff ID": lambda: with_rootfs(diff_ids=[digest_of(HELLO).upper()]),
    "M-11 rootfs type missing": lambda: with_config(rootfs={"diff_ids": [digest_of(HELLO)]}),
    "M-11 rootfs type other": lambda: with_rootfs(type="squashfs"),
    "M-16 oci-layout of another version": lambda: with_file(
        "oci-layout", b'{"imageLayoutVersion":"2.0.0"}'
    ),
    "M-16 oci-layout without a version": lambda: with_file("oci-layout", b"{}"),
    "M-16 oci-layout an array": lambda: with_file("oci-layout", b"[]"),
    "M-16 index.json missing": lambda: with_file("index.json", None),
    "M-16 oci-layout missing": lambda: with_file("oci-layout", None),
    "M-16 no image listed": Files,
    "M-16 manifest missing": lambda: without("manifest"),
    "M-16 config missing": lambda: without("config"),
    "M-16 layer missing": lambda: without("layer"),
    "M-18 index says amd64, config arm64": lambda: (f := Files()).name(
        f.index({**f.image(config=config_of([HELLO], **ARM64)), "platform": AMD64})
    ),
    "M-18 no platform in the index, config arm64": lambda: (f := Files()).name(
        f.index(f.image(config=config_of([HELLO], **ARM64)))
    ),
    "M-18 index.json says amd64, config arm64": lambda: listed_as(AMD64, ARM64),
    "M-18 no platform in index.json, config arm64": lambda: listed_as(None, ARM64),
    "M-18 two entries without a platform": lambda: (f := Files()).name(
        f.index(f.image(), f.image([WORLD]))
    ),
    "M-18 platform not an object": lambda: index_of({"platform": "linux/amd64"}),
    "M-18 nothing in the index": lambda: (f := Files()).name(f.index()),
    "M-18 index in index in index": nested_too_deep,
    "bad name": lambda: (f := Files()).name(f.image(), "Not A Name:1"),
}

_SIZE = r"blob sha256:\w+ has {} bytes, its descriptor says {}"
_OTHER_DIGEST = r"has digest sha256:\w+, not sha256:\w+: the image is damaged"
_MISSING = r"blob sha256:\w+ is missing; the image is incomplete"
_NO_DIGEST = "not a sha256 or sha512 digest: '{}"
_NEITHER = "it has neither oci-layout and index.json"
_CONFIG_ARM = "is listed for linux/amd64, its config says linux/arm64"
_SAYS = r"{} sha256:\w+ says it is '{}', its descriptor says '{}'"
_BAD_NAME = "its name in the archive is no image reference; give it one with --name"

WHY = {
    "M-01 manifests in a manifest": r"manifest sha256:\w+ mixes kinds of documents: \['manifests'\]",
    "M-01 embedded type is an index's": _SAYS.format("manifest", *map(re.escape, (INDEX, MANIFEST))),
    "M-01 index type, manifest document": _SAYS.format("index", *map(re.escape, (MANIFEST, INDEX))),
    "M-01 manifest type, index document": _SAYS.format("manifest", *map(re.escape, (INDEX, MANIFEST))),
    "M-01 layers in index.json": r"index.json mixes kinds of documents: \['layers'\]",
    "M-01 manifest as index.json": r"index.json mixes kinds of documents: \['layers'\]",
    "M-02 Layers": "has the key 'Layers' in another case",
    "M-02 Manifests in index.json": "index.json has the key 'Manifests' in another case",
    "M-02 index.json with a byte order mark": "index.json is not valid JSON: Unexpected UTF-8 BOM",
    "M-02 index.json nested deeply": "index.json is not valid JSON: maximum recursion depth",
    "M-02 duplicate key in oci-layout": "a doubtful or repeated key 'imageLayoutVersion'",
    "M-03 layer of 2^62 bytes": _SIZE.format(len(HELLO), 1 << 62),
    "M-03 layer of -1 bytes": r"Expected `int` >= 0 - at `\$.layers\[0\].size`",
    "M-03 layer of no bytes": _SIZE.format(len(HELLO), 0),
    "M-03 manifest of 2^62 bytes": _SIZE.format(r"\d+", 1 << 62),
    "M-03 manifest of no bytes": _SIZE.format(r"\d+", 0),
    "M-03 manifest over 4 MiB": r"blobs/sha256/\w+ is over 4194304 bytes",
    "M-03 config over 8 MiB": r"blobs/sha256/\w+ is over 8388608 bytes",
    "M-03 index.json over 4 MiB": "index.json is over 4194304 bytes",
    "M-03 oci-layout over 4 MiB": "oci-layout is over 4194304 bytes",
    "M-04 layer longer than said": _SIZE.format(len(HELLO), len(HELLO) - 1),
    "M-04 layer shorter than said": _SIZE.format(len(HELLO), len(HELLO) + 1),
    "M-04 layer cut off": _SIZE.format(len(HELLO) - 1, len(HELLO)),
    "M-04 layer with more behind": _SIZE.format(len(HELLO) + 1, len(HELLO)),
    "M-04 layer listed twice, one size wrong": _SIZE.format(len(HELLO), 1),
    "M-04 manifest longer than said": _SIZE.format(r"\d+", 10),
    "M-04 config cut off": _SIZE.format(158, 159),
    "M-05 layer with other bytes": _OTHER_DIGEST,
    "M-05 config with other bytes": _OTHER_DIGEST,
    "M-05 manifest with other bytes": _OTHER_DIGEST,
    "M-05 layer under another digest": _MISSING,
    "M-05 empty digest on bytes": _MISSING,
    "M-06 md5 layer": _NO_DIGEST.format("md5:aa"),
    "M-06 sha1 manifest": _NO_DIGEST.format("sha1:aa"),
    "M-06 upper case layer": _NO_DIGEST.format("SHA256:"),
    "M-06 layer outside": _NO_DIGEST.format(r"sha256:\.\./\.\./"),
    "M-09 layer of unknown type": "holds no container image: its layers are 'application/octet-stream'",
    "M-09 encrypted layer": f"not a layer type that lamina knows: '{LAYER}.encrypted'",
    "M-09 config as layer": f"holds no container image: its layers are '{re.escape(CONFIG)}'",
    "M-09 empty config": "holds no container image: its media type is 'application/vnd.oci.empty",
    "M-11 more layers than diff IDs": "names 0 diff IDs, its manifest 1 layers",
    "M-11 fewer layers than diff IDs": "names 2 diff IDs, its manifest 1 layers",
    "M-11 upper case diff ID": _NO_DIGEST.format("SHA256:"),
    "M-11 rootfs type missing": r"missing required field `type` - at `\$.rootfs`",
    "M-11 rootfs type other": "unknown rootfs type 'squashfs'",
    "M-16 oci-layout of another version": "oci-layout names an unknown version",
    "M-16 oci-layout without a version": "oci-layout names an unknown version",
    "M-16 oci-layout an array": "oci-layout names an unknown version",
    "M-16 index.json missing": _NEITHER,
    "M-16 oci-layout missing": _NEITHER,
    "M-16 no image listed": "holds no image: index.json is empty",
    "M-16 manifest missing": _MISSING,
    "M-16 config missing": _MISSING,
    "M-16 layer missing": _MISSING,
    "M-18 index says amd64, config arm64": _CONFIG_ARM,
    "M-18 no platform in the index, config arm64": _CONFIG_ARM,
    "M-18 index.json says amd64, config arm64": _CONFIG_ARM,
    "M-18 no platform in index.json, config arm64": _CONFIG_ARM,
    "M-18 two entries without a platform": "has nothing for linux/amd64; it has no platforms",
    "M-18 platform not an object": r"got `str` - at `\$.manifests\[0\].platform`",
    "M-18 nothing in the index": "has nothing for linux/amd64; it has no platforms",
    "M-18 index in index in index": "is nested over 8 levels",
    "bad name": f"image Not A Name:1: {_BAD_NAME}",
}


@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("row", ROWS)
def test_oci_image_is_refused(stores, tmp_path, row, form):
    assert_refused(stores, getattr(ROWS[row](), form)(tmp_path / "image"), WHY[row])


def assert_refused(stores, path, why):
    """Check that nothing stays, and that the reason is the one that the row is about."""
    empty = state(stores)
    kind = NotFound if "nothing for" in why else DigestMismatch if why == _OTHER_DIGEST else Refused
    with pytest.raises(kind, match=why) as raised:
        import_image(stores, path)
    assert type(raised.value) in {kind, NotAnImage}
    assert str(raised.value).isprintable()
    assert state(stores) == empty


_LIES = [row for row in ROWS if (row[:4] in {"M-03", "M-04"} and " than said" in row) or "2^62" in row]


@pytest.mark.parametrize("row", _LIES)
def test_a_lie_is_refused_beside_the_truth(stores, tmp_path, row):
    """That the store has the blob already must not hide that its descriptor is wrong."""
    good = Files()
    import_image(stores, good.name(good.image(), "example.org/good:1").folder(tmp_path / "good"))
    before = state(stores)
    with pytest.raises(Refused):
        import_image(stores, ROWS[row]().folder(tmp_path / "bad"))
    assert state(stores) == before


@pytest.mark.parametrize("of", ["layer", "config", "manifest"])
def test_m_05_damage_in_an_archive_does_not_reach_the_store(stores, tmp_path, of):
    good = Files()
    import_image(stores, good.name(good.image(), "example.org/good:1").folder(tmp_path / "good"))
    try:
        import_image(stores, with_bytes(of, flip).folder(tmp_path / "bad"))
    except DigestMismatch:
        assert len(stores.images.walk()) == 1
    for blob in stores.content.walk():
        stores.content.verify(blob.digest)


def docker(**changes):
    return docker_files(entry=changes)


def without_file(name):
    return {k: v for k, v in docker_files().items() if k != name}


_NAME = "x" * 5000
_WIDE_NAME = "\U00010348" * 1010  # four bytes each

DOCKER_ROWS = {
    "M-02 duplicate Layers": lambda: {
        **docker_files(),
        "manifest.json": b'[{"Config":"config.json","Layers":[],"Layers":["0/layer.tar"]}]',
    },
    "M-02 not an array": lambda: {**docker_files(), "manifest.json": b"{}"},
    "M-02 nested deeply": lambda: {**docker_files(), "manifest.json": b"[" * 10**5},
    "M-03 config over 8 MiB": lambda: docker_files(config=config_of([HELLO], x="y" * limits.CONFIG)),
    "M-03 501 layers": lambda: docker(Layers=["0/layer.tar"] * 501),
    "M-05 layer with other bytes": lambda: {**docker_files(), "0/layer.tar": flip(HELLO)},
    "M-11 fewer layers than diff IDs": lambda: docker(Layers=[]),
    "M-11 more layers than diff IDs": lambda: docker(Layers=["0/layer.tar"] * 2),
    "M-11 swapped": lambda: {**docker_files([HELLO, WORLD]), "0/layer.tar": WORLD, "1/layer.tar": HELLO},
    "M-11 rootfs type other": lambda: docker_files(config=config_of([HELLO], rootfs={"type": "x"})),
    "M-16 layer outside": lambda: docker(Layers=["../../../../../../../../etc/passwd"]),
    "M-16 layer of the host": lambda: docker(Layers=["/etc/passwd"]),
    "M-16 config outside": lambda: docker(Config="../../../../../../../../etc/passwd"),
    "M-16 config of the host": lambda: docker(Config="/etc/passwd"),
    "M-16 name with NUL": lambda: docker(Config="config.json\0"),
    "M-16 long name": lambda: docker(Config=_NAME),
    "M-16 long name in few characters": lambda: docker(Config=_WIDE_NAME),
    "M-16 long name in many parts": lambda: docker(Config="x/" * 5000),
    "M-16 a folder as layer": lambda: docker(Layers=["0"]),
    "M-16 a file as folder": lambda: docker(Layers=["config.json/x"]),
    "M-16 empty name": lambda: docker(Layers=[""]),
    "M-16 layer missing": lambda: without_file("0/layer.tar"),
    "M-16 config missing": lambda: without_file("config.json"),
    "M-16 manifest.json missing": lambda: without_file("manifest.json"),
    "M-16 manifest.json empty": lambda: {**docker_files(), "manifest.json": b"[]"},
    "M-16 manifest.json over 20 MiB": lambda: {
        **docker_files(),
        "manifest.json": b" " * (20 * limits.MIB + 1),
    },
    "M-16 tags not text": lambda: docker(RepoTags=[1]),
    "bad name": lambda: docker(RepoTags=["Not A Name"]),
}

_NO_LAYER = "layer '{}' is missing; the image is incomplete"
_NO_FILE = "there is no file '{}"
_OUT = "image file '.*/etc/passwd' leads out of the image"

# In a folder, and in a tar file where that differs.
DOCKER_WHY = {
    "M-02 duplicate Layers": ("manifest.json has a doubtful or repeated key 'Layers'",),
    "M-02 not an array": ("manifest.json is not a list of images",),
    "M-02 nested deeply": ("manifest.json is not valid JSON: maximum recursion depth",),
    "M-03 config over 8 MiB": ("config.json is over 8388608 bytes",),
    "M-03 501 layers": ("it has over 500 layers",),
    "M-05 layer with other bytes": (_OTHER_DIGEST,),
    "M-11 fewer layers than diff IDs": ("config.json names 1 diff IDs, its manifest 0 layers",),
    "M-11 more layers than diff IDs": ("config.json names 1 diff IDs, its manifest 2 layers",),
    "M-11 swapped": (_OTHER_DIGEST,),
    "M-11 rootfs type other": ("unknown rootfs type 'x'",),
    "M-16 layer outside": (_OUT, _NO_LAYER.format(".*/etc/passwd")),
    "M-16 layer of the host": (_OUT, _NO_LAYER.format("/etc/passwd")),
    "M-16 config outside": (_OUT, _NO_FILE.format(".*/etc/passwd")),
    "M-16 config of the host": (_OUT, _NO_FILE.format("/etc/passwd")),
    "M-16 name with NUL": ("config.json.*x00' is no name for a file", _NO_FILE.format("config")),
    "M-16 long name": ("'x+…' is no name for a file", _NO_FILE.format("x+…'")),
    "M-16 long name in few characters": ("…' is no name for a file", _NO_FILE.format("\U00010348+…'")),
    "M-16 long name in many parts": ("' is no name for a file", _NO_FILE.format("x/x/")),
    "M-16 a folder as layer": (_NO_LAYER.format("0"),),
    "M-16 a file as folder": (_NO_LAYER.format("config.json/x"),),
    "M-16 empty name": (_NO_LAYER.format(""),),
    "M-16 layer missing": (_NO_LAYER.format("0/layer.tar"),),
    "M-16 config missing": (_NO_FILE.format("config.json'"),),
    "M-16 manifest.json missing": (_NEITHER,),
    "M-16 manifest.json empty": ("holds no image: manifest.json is empty",),
    "M-16 manifest.json over 20 MiB": ("manifest.json is over 20971520 bytes",),
    "M-16 tags not text": (r"Expected `str`, got `int` - at `\$.RepoTags\[0\]`",),
    "bad name": (f"image Not A Name: {_BAD_NAME}",),
}


def write_folder(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("write", [write_folder, tar_of], ids=["folder", "tar"])
@pytest.mark.parametrize("row", DOCKER_ROWS)
def test_docker_image_is_refused(stores, tmp_path, row, write):
    path = write(tmp_path / "image", DOCKER_ROWS[row]())
    assert_refused(stores, path, DOCKER_WHY[row][-1 if write is tar_of else 0])


_LAYER = docker_files()["0/layer.tar"]
_LINK = {k: v for k, v in docker_files().items() if k != "0/layer.tar"}

TAR_ROWS = {
    "M-16 two oci-layout": lambda p: with_manifest().tar(
        p, member("oci-layout", data=b'{"imageLayoutVersion": "1.0.1"}')
    ),
    "M-16 two index.json": lambda p: with_manifest().tar(p, member("./index.json", data=b"{}")),
    "M-16 blob twice": lambda p: tar_of(p, docker_files(), member("0/layer.tar", data=flip(_LAYER))),
    "M-16 blob twice, other size": lambda p: tar_of(
        p, docker_files(), member("0/../0/layer.tar", data=b"x")
    ),
    "M-16 file, then link": lambda p: tar_of(
        p, docker_files(), member("manifest.json", "2", link="config.json")
    ),
    "M-16 link, then file": lambda p: tar_of(
        p,
        {},
        member("manifest.json", "2", link="x"),
        *(member(k, data=v) for k, v in docker_files().items()),
    ),
    "M-16 two links": lambda p: tar_of(
        p,
        {**_LINK, "a": _LAYER, "b": WORLD},
        *(member("0/layer.tar", "2", link=f"../{x}") for x in "ba"),
    ),
    "M-16 link to itself": lambda p: tar_of(p, _LINK, member("0/layer.tar", "2", link="layer.tar")),
    "M-16 links in a circle": lambda p: tar_of(
        p, _LINK, member("0/layer.tar", "2", link="../b"), member("b", "2", link="0/layer.tar")
    ),
    "M-16 17 links": lambda p: tar_of(
        p,
        {**_LINK, "18": _LAYER},
        member("0/layer.tar", "2", link="../1"),
        *(member(str(n), "2", link=str(n + 1)) for n in range(1, 18)),
    ),
    "M-16 link to the host": lambda p: tar_of(p, _LINK, member("0/layer.tar", "2", link="/etc/passwd")),
    "M-16 link outside": lambda p: tar_of(
        p, _LINK, member("0/layer.tar", "2", link="../../../../../../etc/passwd")
    ),
    "M-16 hard link to the host": lambda p: tar_of(
        p, _LINK, member("0/layer.tar", "1", link="/etc/passwd")
    ),
    "M-16 device as layer": lambda p: tar_of(p, _LINK, member("0/layer.tar", "3", device=(1, 5))),
    "M-16 pipe as layer": lambda p: tar_of(p, _LINK, member("0/layer.tar", "6")),
    "M-04 archive cut off": lambda p: p.write_bytes(archive(member("x", data=bytes(2000)))[:1500]),
    "M-04 header cut off": lambda p: p.write_bytes(member("x", data=b"x")[:300]),
    "M-04 member of 8 GiB": lambda p: p.write_bytes(checksummed(_huge()) + END),
    "M-16 no archive": lambda p: p.write_bytes(b"#!/bin/sh\nexit\n" * 100),
    "M-16 nothing": lambda p: p.write_bytes(b""),
    "M-16 packed, cut off": lambda p: p.write_bytes(
        gzip.compress(archive(member("x", data=os.urandom(999))))[:-20]
    ),
    "M-16 packed, no archive": lambda p: p.write_bytes(gzip.compress(b"hello")),
    "M-16 packed twice": lambda p: p.write_bytes(gzip.compress(gzip.compress(archive(member("x"))))),
}


def _huge() -> bytes:
    return member("x", fields={124: b"77777777777\0"})


_TWO = "archive has two different files '{}'"
_CIRCLE = "archive has links in a circle at '{}'"
_NO_LAYER_TAR = _NO_LAYER.format("0/layer.tar")

TAR_WHY = {
    "M-16 two oci-layout": _TWO.format("oci-layout"),
    "M-16 two index.json": _TWO.format("index.json"),
    "M-16 blob twice": _TWO.format("0/layer.tar"),
    "M-16 blob twice, other size": _TWO.format("0/layer.tar"),
    "M-16 file, then link": _TWO.format("manifest.json"),
    "M-16 link, then file": _TWO.format("manifest.json"),
    "M-16 two links": _TWO.format("0/layer.tar"),
    "M-16 link to itself": _CIRCLE.format("0/layer.tar"),
    "M-16 links in a circle": _CIRCLE.format("0/layer.tar"),
    "M-16 17 links": _CIRCLE.format("16"),
    "M-16 link to the host": _NO_LAYER_TAR,
    "M-16 link outside": _NO_LAYER_TAR,
    "M-16 hard link to the host": _NO_LAYER_TAR,
    "M-16 device as layer": _NO_LAYER_TAR,
    "M-16 pipe as layer": _NO_LAYER_TAR,
    "M-04 archive cut off": "archive is cut off; copy it again",
    "M-04 header cut off": "archive is cut off within a header",
    "M-04 member of 8 GiB": "archive is cut off; copy it again",
    "M-16 no archive": "archive has a malformed checksum",
    "M-16 nothing": _NEITHER,
    "M-16 packed, cut off": "the gzip stream is cut off",
    "M-16 packed, no archive": "archive is cut off within a header",
    "M-16 packed twice": "archive is cut off within a header",
}


@pytest.mark.parametrize("row", TAR_ROWS)
def test_archive_is_refused(stores, tmp_path, row):
    TAR_ROWS[row](tmp_path / "image.tar")
    assert_refused(stores, tmp_path / "image.tar", TAR_WHY[row])


def test_m_16_too_many_files(stores, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "ARCHIVE_ENTRIES", 3)
    with pytest.raises(Refused, match="over 3 files"):
        import_image(stores, tar_of(tmp_path / "image.tar", {str(n): b"" for n in range(4)}))


@pytest.mark.parametrize("linked", ["index.json", "blobs", "oci-layout", "layer"])
def test_m_16_folder_with_links(stores, tmp_path, linked):
    """A folder may be anybody's: a link in it must not bring in files of the host."""
    files = with_manifest()
    folder = files.folder(tmp_path / "image")
    name = f"blobs/sha256/{digest_of(HELLO)[7:]}" if linked == "layer" else linked
    (folder / name).rename(tmp_path / "away")
    (folder / name).symlink_to(tmp_path / "away")
    empty = state(stores)
    with pytest.raises(Refused, match="link"):
        import_image(stores, folder)
    assert state(stores) == empty


def test_m_16_folder_with_links_in_a_circle(stores, tmp_path):
    folder = with_manifest().folder(tmp_path / "image")
    (folder / "index.json").unlink()
    (folder / "index.json").symlink_to("index.json")
    with pytest.raises(Refused, match="link"):
        import_image(stores, folder)


def test_m_16_folder_with_a_pipe(stores, tmp_path):
    """Opening it would wait for ever."""
    folder = with_manifest().folder(tmp_path / "image")
    (folder / "index.json").unlink()
    os.mkfifo(folder / "index.json")
    with pytest.raises(Refused):
        import_image(stores, folder)


def test_m_03_a_huge_file_is_not_read(stores, tmp_path):
    folder = with_manifest().folder(tmp_path / "image")
    with (folder / "index.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Refused, match="over"):
        import_image(stores, folder)


def test_no_such_file(stores, tmp_path):
    with pytest.raises(NotFound):
        import_image(stores, tmp_path / "absent")


def test_a_file_that_cannot_be_read():
    """Reading `mem` of /proc fails with EIO, which no caller should see as OSError."""
    folder = os.open("/proc/self", os.O_RDONLY)
    try:
        with pytest.raises(EngineError):
            next(FolderSource(folder).read("mem"))
    finally:
        os.close(folder)


def test_kind_of_wrong_bytes(stores, tmp_path):
    with pytest.raises(DigestMismatch):
        import_image(stores, with_bytes("layer", flip).folder(tmp_path / "image"))


@pytest.mark.parametrize("action", ["error", "enospc", "eio"])
@pytest.mark.parametrize("point", ["content.ingest.begun", "content.commit.before", "import.labelled"])
def test_a_fault_leaves_nothing(stores, tmp_path, point, action):
    empty = state(stores)
    path = with_manifest().folder(tmp_path / "image")
    with armed(point, action), pytest.raises((EngineError, OSError)):
        import_image(stores, path)
    assert state(stores) == empty
    import_image(stores, path)


def test_m_16_nothing_of_the_host_is_named_in_the_store(stores, tmp_path):
    """A layer that names a file outside of the folder is not read, whoever may read it."""
    secret = tmp_path / "secret"
    secret.write_bytes(HELLO)
    for name in ("../secret", str(secret)):
        folder = write_folder(tmp_path / "image", docker(Layers=[name]))
        with pytest.raises((Refused, NotFound, PermissionDenied)):
            import_image(stores, folder)
