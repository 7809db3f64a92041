"""Import of every form of image that the field writes, and what it leaves in the store."""

import gzip
import json
from itertools import product

import pytest
import zstandard

from engine.archive import images
from engine.errors import AlreadyExists, EngineError, NotFound, Refused
from engine.oci.digest import digest_of
from engine.oci.platform import Platform
from engine.testing.archives import docker_archive, layout, member, pack, tar_layout
from tests.engine.image_files import (
    AMD64,
    ARM64,
    DOCKER_LIST,
    HELLO,
    LAYER,
    MANIFEST,
    WORLD,
    Files,
    config_of,
    docker_files,
    extents,
    import_image,
    records,
    state,
    tar_of,
)

LAYERS = [HELLO, WORLD]
ARM = Platform(os="linux", architecture="arm64")


def names(stores):
    return [image.name for image in stores.images.walk()]


def layers_of(stores, name, platform=None):
    """Return the stored bytes of an image's layers, verified."""
    image = stores.resolve(stores.images.get(name).target, platform)
    return [b"".join(stores.content.read_verified(layer.descriptor.key)) for layer in image.layers]


def oci_folder(tmp_path):
    return layout(tmp_path / "image", LAYERS, tag="example.org/a:1", compression="none")


def oci_archive(tmp_path):
    return tar_layout(oci_folder(tmp_path), tmp_path / "image.tar")


def docker(tmp_path):
    return docker_archive(tmp_path / "image.tar", LAYERS, ["example.org/a:1"])


def both_in_one(tmp_path):
    """What `docker save` writes since version 25: the old names beside an OCI layout."""
    files = Files()
    files.name(files.image(LAYERS))
    blobs = [name for name in files.files if name.startswith("blobs/")]
    config = next(name for name in blobs if b"rootfs" in files.files[name])
    layers = [f"blobs/sha256/{digest_of(layer)[7:]}" for layer in LAYERS]
    entry = {"Config": config, "RepoTags": ["example.org/other:1"], "Layers": layers}
    return tar_of(tmp_path / "image.tar", {**files.all(), "manifest.json": json.dumps([entry]).encode()})


FORMS = [oci_folder, oci_archive, docker, both_in_one]


@pytest.mark.parametrize("form", FORMS)
def test_form(stores, tmp_path, form):
    (image,) = import_image(stores, form(tmp_path))
    assert image.name == "example.org/a:1"
    assert names(stores) == ["example.org/a:1"]
    assert layers_of(stores, image.name) == LAYERS
    left = records(stores)
    assert not any(left[table] for table in ("leases", "lease_items", "ingests", "trash"))


@pytest.mark.parametrize("form", FORMS)
def test_import_again_changes_nothing(stores, tmp_path, form):
    path = form(tmp_path)
    import_image(stores, path)
    before = state(stores)
    import_image(stores, path)
    assert {digest for digest, _ in before[0]["blobs"]} == {d for d, _ in records(stores)["blobs"]}
    assert extents(stores) == before[1]
    assert records(stores)["images"] == before[0]["images"]


@pytest.mark.parametrize("form", FORMS)
def test_import_survives_a_collection(stores, tmp_path, form):
    import_image(stores, form(tmp_path))
    before = state(stores)
    stores.collect()
    assert state(stores) == before


@pytest.mark.parametrize("form", FORMS)
def test_nothing_stays_of_an_image_without_its_name(stores, tmp_path, form):
    empty = state(stores)
    import_image(stores, form(tmp_path))
    stores.images.remove("example.org/a:1")
    stores.collect()
    assert state(stores) == empty


@pytest.mark.parametrize(
    ("pack_file", "form"),
    list(product([gzip.compress, zstandard.ZstdCompressor().compress], [oci_archive, docker])),
)
def test_packed_archive(stores, tmp_path, pack_file, form):
    path = form(tmp_path)
    packed = tmp_path / "packed"
    packed.write_bytes(pack_file(path.read_bytes()))
    import_image(stores, packed)
    assert layers_of(stores, "example.org/a:1") == LAYERS
    assert not list(stores.root.trash.iterdir())


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_layers_stay_as_they_are_packed(stores, tmp_path, compression):
    path = layout(tmp_path / "image", LAYERS, tag="example.org/a:1", compression=compression)
    import_image(stores, path)
    assert layers_of(stores, "example.org/a:1") == [pack(layer, compression)[1] for layer in LAYERS]


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_docker_layers_are_known_by_their_bytes(stores, tmp_path, compression):
    packed = pack(HELLO, compression)[1]
    path = tar_of(tmp_path / "image.tar", {**docker_files(), "0/layer.tar": packed})
    (image,) = import_image(stores, path)
    (layer,) = stores.resolve(image.target).layers
    assert layer.compression == compression.replace("none", "any")
    assert layers_of(stores, image.name) == [packed]


def test_docker_layers_that_are_links(stores, tmp_path):
    """Docker before 25 linked a layer that was in the archive already."""
    files = docker_files([HELLO, HELLO, WORLD])
    del files["1/layer.tar"]
    path = tar_of(tmp_path / "image.tar", files, member("1/layer.tar", "2", link="../0/layer.tar"))
    import_image(stores, path)
    assert layers_of(stores, "example.org/a:1") == [HELLO, HELLO, WORLD]


def test_docker_link_to_a_link(stores, tmp_path):
    files = {"real": HELLO, **{k: v for k, v in docker_files().items() if k != "0/layer.tar"}}
    links = [member("0/layer.tar", "2", link="./../b"), member("b", "1", link="real")]
    import_image(stores, tar_of(tmp_path / "image.tar", files, *links))
    assert layers_of(stores, "example.org/a:1") == [HELLO]


def test_names_in_archives_may_begin_with_a_dot(stores, tmp_path):
    """As `tar -c .` writes them."""
    files = {f"./{name}": data for name, data in docker_files().items()}
    import_image(stores, tar_of(tmp_path / "image.tar", files, member("./", "5")))
    assert layers_of(stores, "example.org/a:1") == [HELLO]


def test_m_16_equal_twins_are_one(stores, tmp_path):
    """`docker save` of several images repeats files."""
    files = docker_files()
    path = tar_of(tmp_path / "image.tar", files, member("0/layer.tar", data=HELLO))
    import_image(stores, path)
    assert layers_of(stores, "example.org/a:1") == [HELLO]


def test_m_06_sha512_blobs(stores, tmp_path):
    """Both algorithms are known, and one blob under two names is two objects."""
    files = Files()
    both = files.layers([HELLO]) + files.layers([HELLO])
    sha512 = digest_512(HELLO)
    files.files[f"blobs/sha512/{sha512[7:]}"] = HELLO
    both[1]["digest"] = sha512
    files.name(files.image([HELLO, HELLO], layers=both))
    import_image(stores, files.folder(tmp_path / "image"))
    assert layers_of(stores, "example.org/a:1") == [HELLO, HELLO]
    assert {digest_of(HELLO), sha512} <= {blob.digest for blob in stores.content.walk()}
    stores.collect()
    assert layers_of(stores, "example.org/a:1") == [HELLO, HELLO]


def digest_512(data):
    import hashlib

    return "sha512:" + hashlib.sha512(data).hexdigest()


def test_m_19_a_layer_listed_often_is_stored_once(stores, tmp_path):
    files = Files()
    files.name(files.image([HELLO] * 200))
    (image,) = import_image(stores, files.folder(tmp_path / "image"))
    assert len(list(stores.content.walk())) == 3
    assert len(set(stores.resolve(image.target).chain)) == 200


def test_m_09_config_that_is_a_layer_too(stores, tmp_path):
    """The role of a blob is the reader's: the same bytes may have two."""
    files = Files()
    config = config_of([HELLO])
    data = json.dumps(config).encode()
    layer = files.blob(data, LAYER)
    files.name(files.image([HELLO], config=config, layers=[layer]))
    (image,) = import_image(stores, files.folder(tmp_path / "image"))
    assert layers_of(stores, image.name) == [data]
    assert stores.resolve(image.target).config.architecture == "amd64"


def test_m_09_manifest_that_is_a_layer_too(stores, tmp_path):
    files = Files()
    other = files.image([HELLO])
    files.name(other, "example.org/b:1")
    files.name(files.image([WORLD], layers=[{**other, "mediaType": LAYER}]))
    import_image(stores, files.folder(tmp_path / "image"))
    stores.images.remove("example.org/b:1")
    stores.collect()
    (layer,) = layers_of(stores, "example.org/a:1")
    assert digest_of(layer) == other["digest"]


def test_m_09_attestations_are_passed_over(stores, tmp_path):
    files = Files()
    attestation = files.image([WORLD], config=config_of([WORLD], architecture="unknown", os="unknown"))
    unknown = {**attestation, "platform": {"architecture": "unknown", "os": "unknown"}}
    files.name(files.index(unknown, {**files.image(), "platform": AMD64}))
    import_image(stores, files.folder(tmp_path / "image"))
    assert layers_of(stores, "example.org/a:1") == [HELLO]
    assert attestation["digest"] not in {blob.digest for blob in stores.content.walk()}


def test_m_10_one_config_two_manifests(stores, tmp_path):
    """What a config says is shared; which layers there are is each manifest's own."""
    files = Files()
    plain, packed = files.image([HELLO]), files.image([HELLO], compression="gzip")
    files.name(plain, "example.org/plain:1")
    files.name(packed, "example.org/packed:1")
    import_image(stores, files.folder(tmp_path / "image"))
    stores.images.remove("example.org/plain:1")
    stores.collect()
    assert layers_of(stores, "example.org/packed:1") == [pack(HELLO, "gzip")[1]]
    assert digest_of(HELLO) not in {blob.digest for blob in stores.content.walk()}


# -- platforms --------------------------------------------------------------------------------


def two_platforms(files):
    arm = files.image([WORLD], config=config_of([WORLD], **ARM64))
    return [{**arm, "platform": ARM64}, {**files.image([HELLO]), "platform": AMD64}]


def nested(files):
    files.name(files.index(files.index(*two_platforms(files))))


def one_index(files):
    files.name(files.index(*two_platforms(files)))


def docker_list(files):
    entries = two_platforms(files)
    value = {"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": entries}
    files.name(files.document(value, DOCKER_LIST))


def flat(files):
    for entry in two_platforms(files):
        files.name(entry)


@pytest.mark.parametrize("shape", [one_index, docker_list, flat])
@pytest.mark.parametrize(("platform", "layer"), [(None, HELLO), (ARM, WORLD)])
def test_m_18_platform_is_chosen(stores, tmp_path, shape, platform, layer):
    files = Files()
    shape(files)
    import_image(stores, files.folder(tmp_path / "image"), platform=platform)
    assert layers_of(stores, "example.org/a:1", platform) == [layer]
    stored = {blob.digest for blob in stores.content.walk()}
    assert len(stored & {digest_of(HELLO), digest_of(WORLD)}) == 1


def test_platforms_add_up(stores, tmp_path):
    """Importing another platform of an index keeps the first."""
    files = Files()
    one_index(files)
    path = files.folder(tmp_path / "image")
    import_image(stores, path)
    import_image(stores, path, platform=ARM)
    stores.collect()
    assert layers_of(stores, "example.org/a:1") == [HELLO]
    assert layers_of(stores, "example.org/a:1", ARM) == [WORLD]


def test_an_image_for_another_platform_may_be_brought_in_alone(stores, tmp_path):
    files = Files()
    files.name(files.image([HELLO], config=config_of([HELLO], **ARM64)))
    import_image(stores, files.folder(tmp_path / "image"))
    assert layers_of(stores, "example.org/a:1") == [HELLO]


@pytest.mark.parametrize("shape", [one_index, flat])
def test_no_such_platform(stores, tmp_path, shape):
    files = Files()
    shape(files)
    empty = state(stores)
    with pytest.raises(NotFound, match="riscv64"):
        import_image(
            stores,
            files.folder(tmp_path / "image"),
            platform=Platform(os="linux", architecture="riscv64"),
        )
    assert state(stores) == empty


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotations", "name"),
    [
        ({}, "docker.io/library/my-image:latest"),
        ({"org.opencontainers.image.ref.name": "v1"}, "docker.io/library/my-image:v1"),
        ({"org.opencontainers.image.ref.name": "quay.io/a:v1"}, "quay.io/a:v1"),
        ({"io.containerd.image.name": "quay.io/b:v1"}, "quay.io/b:v1"),
        (
            {"io.containerd.image.name": "quay.io/b:v1", "org.opencontainers.image.ref.name": "v2"},
            "quay.io/b:v1",
        ),
    ],
)
def test_name_of_an_entry(stores, tmp_path, annotations, name):
    files = Files()
    files.entries.append({**files.image(), "annotations": annotations})
    assert [i.name for i in import_image(stores, files.tar(tmp_path / "My_image.oci.tar"))] == [name]


def test_docker_names(stores, tmp_path):
    tags = ["example.org/b:1", "a:2"]
    import_image(stores, tar_of(tmp_path / "x.tar", docker_files(entry={"RepoTags": tags})))
    assert names(stores) == ["docker.io/library/a:2", "example.org/b:1"]


def test_docker_image_without_a_tag(stores, tmp_path):
    import_image(stores, tar_of(tmp_path / "saved.tar", docker_files(entry={"RepoTags": None})))
    assert names(stores) == ["docker.io/library/saved:latest"]


def test_name_of_the_caller(stores, tmp_path):
    import_image(stores, oci_archive(tmp_path), name="mine")
    assert names(stores) == ["docker.io/library/mine:latest"]


def test_one_name_is_not_for_two_images(stores, tmp_path):
    """One of them would be lost without a word."""
    files = Files()
    files.name(files.image([HELLO]), "example.org/a:1").name(files.image([WORLD]), "example.org/b:1")
    empty = state(stores)
    with pytest.raises(EngineError):
        import_image(stores, files.folder(tmp_path / "image"), name="mine")
    assert state(stores) == empty


def test_m_17_a_name_moves_only_when_told(stores, tmp_path):
    first, second = Files(), Files()
    first.name(first.image([HELLO]))
    second.name(second.image([WORLD]))
    import_image(stores, first.folder(tmp_path / "first"))
    before = state(stores)
    with pytest.raises(AlreadyExists, match="--replace"):
        import_image(stores, second.folder(tmp_path / "second"))
    assert state(stores) == before
    import_image(stores, tmp_path / "second", replace=True)
    assert layers_of(stores, "example.org/a:1") == [WORLD]
    stores.collect()
    assert digest_of(HELLO) not in {blob.digest for blob in stores.content.walk()}


def test_names_move_together_or_not_at_all(stores, tmp_path):
    first, second = Files(), Files()
    first.name(first.image([HELLO]), "example.org/b:1")
    second.name(second.image([WORLD]), "example.org/a:1").name(
        second.image([WORLD, HELLO]), "example.org/b:1"
    )
    import_image(stores, first.folder(tmp_path / "first"))
    with pytest.raises(AlreadyExists):
        import_image(stores, second.folder(tmp_path / "second"))
    assert names(stores) == ["example.org/b:1"]


# -- what an archive leaves out ---------------------------------------------------------------


def test_blobs_that_are_here_need_not_be_in_the_archive(stores, tmp_path):
    files = Files()
    files.name(files.image(LAYERS))
    import_image(stores, files.folder(tmp_path / "whole"))
    del files.files[f"blobs/sha256/{digest_of(HELLO)[7:]}"]
    files.entries[0]["annotations"] = {"io.containerd.image.name": "example.org/b:1"}
    import_image(stores, files.folder(tmp_path / "part"))
    assert layers_of(stores, "example.org/b:1") == LAYERS


# -- unpacking -------------------------------------------------------------------------------

_M_11 = {
    "M-11 wrong": [digest_of(WORLD), digest_of(b"?")],
    "M-11 swapped": [digest_of(WORLD), digest_of(HELLO)],
    "M-11 one twice": [digest_of(HELLO), digest_of(HELLO)],
}


@pytest.mark.root
@pytest.mark.parametrize("diff_ids", _M_11.values(), ids=_M_11)
def test_layers_that_are_not_their_diff_ids(stores, tmp_path, diff_ids):
    files = Files()
    config = config_of(LAYERS, rootfs={"type": "layers", "diff_ids": diff_ids})
    files.name(files.image(LAYERS, config=config))
    with pytest.raises(Refused, match="digest"):
        import_image(stores, files.folder(tmp_path / "image"), snapshotter="overlay")
    assert not extents(stores)
    # What is right at the bottom may be committed before the fault shows, but nothing holds it.
    assert not any(records(stores).values())


def test_empty_archive_of_the_right_kind(stores, tmp_path):
    files = Files()
    files.name(files.image([]))
    (image,) = import_image(stores, files.tar(tmp_path / "image.tar"))
    assert stores.resolve(image.target).chain == []
    assert image.target.media_type == MANIFEST


def test_an_image_of_many_names_is_read_once(tmp_path, stores, monkeypatch):
    # An index of 4 MiB can name one manifest 10,000 times.
    image = layout(tmp_path / "image", [HELLO])
    index = json.loads((image / "index.json").read_text())
    (entry,) = index["manifests"]
    index["manifests"] = [
        {**entry, "annotations": {"io.containerd.image.name": f"docker.io/x/y:{number}"}}
        for number in range(300)
    ]
    (image / "index.json").write_text(json.dumps(index))
    read = []
    real = images.resolve
    monkeypatch.setattr(images, "resolve", lambda *a, **k: read.append(1) or real(*a, **k))
    import_image(stores, image)
    assert len(names(stores)) == 300
    assert len(read) == 1


def test_a_blob_that_is_here_has_the_size_that_is_promised(stores, tmp_path):
    """Also where the source has a file of its name that has it, which is not read then."""
    good, bad = Files(), Files()
    import_image(stores, good.name(good.image()).folder(tmp_path / "good"))
    before = state(stores)
    layer = bad.layers([HELLO])[0]
    bad.name(bad.image(layers=[{**layer, "size": layer["size"] + 1}]), "example.org/b:1")
    bad.files["blobs/" + layer["digest"].replace(":", "/")] += b"x"
    with pytest.raises(Refused, match="its descriptor says"):
        import_image(stores, bad.folder(tmp_path / "bad"))
    assert state(stores) == before
