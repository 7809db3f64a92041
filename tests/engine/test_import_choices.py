"""What import takes from a source that holds several things, and what it says of the rest."""

import json
import re
from contextlib import nullcontext

import msgspec
import pytest

from engine import limits, plugins
from engine.archive.contents import Candidate, DockerFiles, Name
from engine.archive.importer import Brought, PassedOver
from engine.content.image import resolve
from engine.content.present import present
from engine.errors import (
    AlreadyExists,
    DigestMismatch,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    NotSupported,
    Refused,
)
from engine.oci.digest import digest_of
from engine.oci.documents import Descriptor, NotAnImage
from engine.oci.platform import Platform
from engine.snapshots import Probe
from engine.testing.archives import pack
from tests.engine.image_files import (
    AMD64,
    ARM64,
    CONFIG,
    COSIGN,
    HELLO,
    IN_TOTO,
    INDEX,
    MANIFEST,
    WORLD,
    Files,
    config_of,
    docker_files,
    import_all,
    import_image,
    state,
    tar_of,
)

HELM = "application/vnd.cncf.helm.config.v1+json"


def names(stores):
    return [image.name for image in stores.images.walk()]


def digests(stores):
    return {blob.digest for blob in stores.content.walk()}


def blob_of(entry):
    return "blobs/" + entry["digest"].replace(":", "/")


def two(files=None, **changes):
    """Return a layout of two good images."""
    files = files or Files()
    files.name(files.image([HELLO]), "example.org/a:1")
    return files.name(files.image([WORLD], **changes), "example.org/b:1")


# -- what is no image -------------------------------------------------------------------------


def others(files, image):
    """Return entries that are no images, and why not."""
    notes = files.image(
        config={}, layers=[files.blob(b"notes", "text/plain")], artifactType="application/x-notes"
    )
    blob = files.blob(b"{}", "application/octet-stream")
    return {
        "a chart": (files.chart(), f"its config is '{HELM}'"),
        "a signature": (files.signature(image), f"its layers are '{COSIGN}'"),
        "an attestation": (files.attestation(image), f"its layers are '{IN_TOTO}'"),
        "an artifact": (notes, "its layers are 'text/plain'"),
        "a blob": (blob, "its media type is 'application/octet-stream'"),
    }


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_what_is_no_image_is_passed_over_and_named(stores, tmp_path, form):
    files = Files()
    image = files.image()
    files.name(image)
    expected = []
    for name, (entry, reason) in others(files, image).items():
        files.list({**entry, "annotations": {"org.opencontainers.image.ref.name": name}})
        expected.append((name, entry["digest"], reason))
    result = import_all(stores, getattr(files, form)(tmp_path / "image"))
    assert [(one.name, one.digest, one.reason) for one in result.passed_over] == expected
    assert names(stores) == ["example.org/a:1"] == [image.name for image in result.images]
    assert not result.failed
    assert len(digests(stores)) == 3, "nothing of the others is stored"


@pytest.mark.parametrize("blob", ["large", "missing", "with a digest of another kind"])
def test_what_is_no_image_is_passed_over_unread(stores, tmp_path, blob):
    """A model or a video may stand beside an image, here or elsewhere."""
    files = Files()
    entry = files.blob(bytes(limits.MANIFEST + 1), "video/mp4")
    if blob != "large":
        del files.files[blob_of(entry)]
    if blob.startswith("with"):
        entry["digest"] = "blake3:" + "0" * 64
    files.name(files.image()).tag(entry, "film")
    result = import_all(stores, files.folder(tmp_path / "image"))
    assert [(one.name, one.reason) for one in result.passed_over] == [
        ("film", "its media type is 'video/mp4'")
    ]
    assert not result.failed
    assert len(result.images) == 1


def test_what_is_no_image_and_has_no_name_is_known_by_its_digest(stores, tmp_path):
    """As `cosign save` writes an image and its signature: neither has a name."""
    files = Files()
    image = files.image()
    signature = files.signature(image)
    result = import_all(stores, files.list(image).list(signature).folder(tmp_path / "saved"))
    assert [(one.name, one.digest) for one in result.passed_over] == [("", signature["digest"])]
    assert names(stores) == ["docker.io/library/saved:latest"], "the image is alone, so it has the name"


@pytest.mark.parametrize("kind", ["a chart", "a signature", "an attestation", "a blob"])
def test_a_source_without_an_image_is_refused(stores, tmp_path, kind):
    files = Files()
    entry, reason = others(files, files.image())[kind]
    files.tag(entry, "one").tag(entry, "two")
    empty = state(stores)
    path = files.folder(tmp_path / "image")
    with pytest.raises(Refused, match=re.escape(f"holds no container image: {reason}")):
        import_image(stores, path)
    with pytest.raises(Refused, match=re.escape(f"is not a container image: {reason}")):
        import_image(stores, path, refs=["one"])
    assert state(stores) == empty


def test_attestations_in_an_index_are_not_worth_a_line(stores, tmp_path):
    files = Files()
    image = files.image()
    entries = ({**image, "platform": AMD64}, files.attestation(image))
    bare = {**files.attestation(image), "platform": None}
    files.name(files.index(*entries, bare))
    result = import_all(stores, files.folder(tmp_path / "image"))
    assert not result.passed_over
    assert len(digests(stores)) == 4
    flat = Files()
    image = flat.image()
    flat.name({**image, "platform": AMD64}, "example.org/flat:1")
    flat.list({**flat.attestation(image), "annotations": flat.entries[0]["annotations"]})
    assert not import_all(stores, flat.folder(tmp_path / "flat")).passed_over


def test_an_attestation_does_not_make_the_choice_a_guess(stores, tmp_path):
    """Of two manifests without a platform neither would be taken."""
    files = Files()
    image = files.image()
    bare = {**files.attestation(image), "platform": None}
    assert import_image(stores, files.name(files.index(image, bare)).folder(tmp_path / "image"))


def test_an_artifact_in_an_index_is_never_chosen(stores, tmp_path):
    files = Files()
    artifact = {**files.chart(), "artifactType": HELM}
    listed = {**files.image(), "artifactType": CONFIG}
    files.name(files.index(files.blob(b"{}", "text/plain"), artifact, listed))
    import_image(stores, files.folder(tmp_path / "image"))
    assert names(stores) == ["example.org/a:1"]


# -- one bad image beside good ones -----------------------------------------------------------


def spoiled(files, of=1):
    """Take the layer of one of two images away."""
    manifest = json.loads(files.files["blobs/" + files.entries[of]["digest"].replace(":", "/")])
    del files.files["blobs/" + manifest["layers"][0]["digest"].replace(":", "/")]
    return files


def test_a_bad_image_does_not_keep_out_the_others(stores, tmp_path):
    path = spoiled(two()).folder(tmp_path / "image")
    result = import_all(stores, path)
    assert names(stores) == ["example.org/a:1"]
    (bad,) = result.failed
    assert bad.name == "example.org/b:1"
    assert isinstance(bad.error, Refused)
    assert str(bad.error).startswith("image example.org/b:1: blob sha256:")
    assert "is missing; the image is incomplete" in str(bad.error)


def test_a_document_that_is_too_large_does_not_keep_out_the_others(stores, tmp_path):
    """It is not read, so what it says it has is nothing that the others could not have."""
    files = two()
    folder = files.folder(tmp_path / "image")
    with (folder / blob_of(files.entries[0])).open("wb") as file:
        file.truncate(1 << 40)
    result = import_all(stores, folder)
    assert names(stores) == ["example.org/b:1"]
    assert "is over 4194304 bytes" in str(result.failed[0].error)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(
    "shared", [NotFound("gone"), DigestMismatch("layer", "a", "b"), NotAnImage("it", "odd")]
)
def test_an_error_that_two_imports_share_names_the_image_of_each(shared, asked):
    """They unpack one bad layer once, and both are told with the same object."""
    said = str(shared)
    for name in ("one:1", "two:1"):
        brought = Brought("source", asked=asked)
        listed = Candidate((Name(name, name),), "", DockerFiles("", ()))
        ending = pytest.raises(type(shared)) if asked else nullcontext()
        with ending as raised, brought.collecting(listed):
            raise shared
        if raised or brought.failed:
            error = raised.value if raised else brought.failed[0].error
            assert str(error) == f"image {name}: {said}"
            assert vars(error) == vars(shared)
        else:
            assert brought.passed_over == [PassedOver(name, "", "odd")]
    assert str(shared) == said
    assert shared.__traceback__


def test_what_a_bad_image_brought_in_goes(stores, tmp_path):
    """Its layers are read, and only the last is wrong; what the good one needs too stays."""
    files = Files()
    files.name(files.image([WORLD]), "example.org/good:1")
    bad = files.image([WORLD, HELLO], config=config_of([WORLD, HELLO]))
    files.name(bad, "example.org/bad:1")
    layer = json.loads(files.files["blobs/" + bad["digest"].replace(":", "/")])["layers"][1]
    files.files["blobs/" + layer["digest"].replace(":", "/")] = HELLO[:-1] + b"x"
    result = import_all(stores, files.folder(tmp_path / "image"))
    assert isinstance(result.failed[0].error, DigestMismatch)
    kept = state(stores)
    assert len(digests(stores)) == 3
    stores.collect()
    assert state(stores) == kept, "nothing is left for a collection"


@pytest.mark.root
@pytest.mark.root
@pytest.mark.parametrize("snapshotter", [None, "copy"])
def test_strict_keeps_out_only_the_image_whose_bytes_disagree(stores, tmp_path, snapshotter):
    files = Files()
    said = {**files.layers([WORLD])[0], "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"}
    two(files, layers=[said])
    result = import_all(stores, files.folder(tmp_path / "two"), snapshotter=snapshotter, strict=True)
    assert [image.name for image in result.images] == names(stores) == ["example.org/a:1"]
    (failed,) = result.failed
    assert failed.name == "example.org/b:1"
    assert "gzip by its media type; without --strict" in str(failed.error)


def test_an_image_that_cannot_be_unpacked_gets_no_name(stores, tmp_path):
    files = Files()
    files.name(files.image([HELLO]), "example.org/good:1")
    files.name(files.image([b"no archive" * 100]), "example.org/bad:1")
    result = import_all(stores, files.folder(tmp_path / "image"), snapshotter="overlay")
    assert names(stores) == ["example.org/good:1"]
    assert [one.name for one in result.failed] == ["example.org/bad:1"]
    assert list(result.unpacked) == [result.images[0].target.digest]
    kept = state(stores)
    stores.collect()
    assert state(stores) == kept


def test_a_bad_image_that_was_asked_for_is_refused(stores, tmp_path):
    path = spoiled(two()).folder(tmp_path / "image")
    empty = state(stores)
    with pytest.raises(Refused, match=r"image example.org/b:1: .*incomplete"):
        import_image(stores, path, refs=["example.org/a:1", "example.org/b:1"])
    assert state(stores) == empty
    import_image(stores, path, refs=["example.org/a:1"])


def test_two_bad_images_are_an_error(stores, tmp_path):
    path = spoiled(spoiled(two()), of=0).folder(tmp_path / "image")
    empty = state(stores)
    with pytest.raises(Refused, match=r"image example.org/a:1: .*incomplete"):
        import_image(stores, path)
    assert state(stores) == empty


def test_one_bad_image_of_three_in_a_docker_archive(stores, tmp_path):
    files = docker_files()
    entry = json.loads(files["manifest.json"])[0]
    entries = [{**entry, "RepoTags": [f"a:{n}"], "Layers": [f"{n}/layer.tar"]} for n in range(3)]
    files["manifest.json"] = json.dumps(entries).encode()
    files["2/layer.tar"] = HELLO
    result = import_all(stores, tar_of(tmp_path / "image.tar", files))
    assert names(stores) == ["docker.io/library/a:0", "docker.io/library/a:2"]
    assert [str(one.error) for one in result.failed] == [
        "image a:1: layer '1/layer.tar' is missing; the image is incomplete, copy it again"
    ]


def test_an_image_for_another_platform_beside_one_for_this(stores, tmp_path):
    files = Files()
    files.name(files.image([HELLO]), "example.org/a:1")
    arm = {**files.image([WORLD], config=config_of([WORLD], **ARM64)), "platform": ARM64}
    files.name(files.index(arm), "example.org/b:1")
    result = import_all(stores, files.folder(tmp_path / "image"))
    assert names(stores) == ["example.org/a:1"]
    assert isinstance(result.failed[0].error, NotFound)
    assert "example.org/b:1: the image has nothing for linux/amd64" in str(result.failed[0].error)


# -- choosing with --ref ----------------------------------------------------------------------


def tagged():
    files = Files()
    for number, layer in enumerate([HELLO, WORLD, HELLO + WORLD]):
        files.tag(files.image([layer]), f"v{number}")
    return files


@pytest.mark.parametrize(
    ("refs", "tags"),
    [
        (["v1"], ["v1"]),
        (["image:v1"], ["v1"]),
        (["docker.io/library/image:v1"], ["v1"]),
        (["v2", "v0"], ["v0", "v2"]),
        (["v1", "image:v1", "v1"], ["v1"]),
    ],
    ids=str,
)
def test_ref_chooses_by_name(stores, tmp_path, refs, tags):
    import_image(stores, tagged().folder(tmp_path / "image"), refs=refs)
    assert names(stores) == [f"docker.io/library/image:{tag}" for tag in tags]


def test_ref_chooses_by_digest(stores, tmp_path):
    files = tagged()
    path = files.folder(tmp_path / "image")
    digest = files.entries[1]["digest"]
    for text in (digest, digest[:19], digest[7:19], digest[7:]):
        (image,) = import_image(stores, path, refs=[text])
        assert image.name == "docker.io/library/image:v1"


def test_ref_of_a_docker_image_may_be_its_id(stores, tmp_path):
    files = docker_files()
    data = files.pop("config.json")
    name = f"{digest_of(data)[7:]}.json"
    (entry,) = json.loads(files["manifest.json"])
    files["manifest.json"] = json.dumps([{**entry, "Config": name}]).encode()
    path = tar_of(tmp_path / "image.tar", {**files, name: data})
    assert import_image(stores, path, refs=[digest_of(data)[7:19]])


def test_ref_takes_only_the_name_that_was_asked_for(stores, tmp_path):
    path = tar_of(tmp_path / "x.tar", docker_files(entry={"RepoTags": ["a:1", "a:2", "a:3"]}))
    import_image(stores, path, refs=["a:1", "a:3"])
    assert names(stores) == ["docker.io/library/a:1", "docker.io/library/a:3"]


def test_ref_chooses_among_the_platforms_of_its_name(stores, tmp_path):
    files = Files()
    for platform, layer in ((ARM64, WORLD), (AMD64, HELLO)):
        entry = files.image([layer], config=config_of([layer], **platform))
        for name in ("example.org/a:1", "example.org/b:1"):
            files.name({**entry, "platform": platform}, name)
    refs = ["example.org/a:1", "example.org/b:1"]
    first, second = import_image(stores, files.folder(tmp_path / "image"), refs=refs)
    assert first.target.digest == second.target.digest == files.entries[2]["digest"]


def test_ref_that_names_nothing(stores, tmp_path):
    files = tagged()
    for number in range(20):
        files.tag(files.entries[0], f"more{number}\x1b[2J")
    empty = state(stores)
    path = files.folder(tmp_path / "image")
    for ref in ("v9", "abcd", "v1\n", "sha256:abcd"):
        with pytest.raises(
            NotFound, match=r"it has image:v0, image:v1, .*:more6\\x1b\[2J and 13 more"
        ) as raised:
            import_image(stores, path, refs=["v1", ref])
        assert str(raised.value).isprintable()
    assert state(stores) == empty


def test_ref_of_several_digests(stores, tmp_path):
    files = Files()
    entry = files.image()
    files.tag(entry, "a").tag({**entry, "digest": entry["digest"][:-2] + "00"}, "b")
    with pytest.raises(InvalidArgument, match=r"begins 2 images .*; type more digits"):
        import_image(stores, files.folder(tmp_path / "image"), refs=[entry["digest"][:30]])


# -- names ------------------------------------------------------------------------------------


def test_a_tag_that_is_no_reference(stores, tmp_path):
    """Versions with a build number are tags of charts and of anyone's layouts."""
    files = Files()
    path = files.tag(files.image(), "1.0+build.5").folder(tmp_path / "image")
    empty = state(stores)
    for refs in ((), ("1.0+build.5",)):
        with pytest.raises(
            Refused, match=r"image image:1.0\+build.5: .*is no image reference; .*--name"
        ):
            import_image(stores, path, refs=refs)
    assert state(stores) == empty
    import_image(stores, path, name="a:1.0")
    assert names(stores) == ["docker.io/library/a:1.0"]


def test_a_bad_name_beside_good_ones(stores, tmp_path):
    files = Files()
    files.tag(files.image([HELLO]), "1.0+build.5").tag(files.image([WORLD]), "1.0")
    path = files.folder(tmp_path / "image")
    result = import_all(stores, path)
    assert names(stores) == ["docker.io/library/image:1.0"]
    assert [one.name for one in result.failed] == ["1.0+build.5"]
    import_image(stores, path, refs=["1.0+build.5"], name="five")
    assert names(stores) == ["docker.io/library/five:latest", "docker.io/library/image:1.0"]


def test_a_bad_name_of_an_image_that_has_a_good_one(stores, tmp_path):
    files = Files()
    entry = files.image()
    files.tag(entry, "1.0\u202e\x1b[31m").tag(entry, "1.0")
    result = import_all(stores, files.folder(tmp_path / "image"))
    assert names(stores) == ["docker.io/library/image:1.0"]
    assert str(result.failed[0].error).isprintable()


def test_two_images_of_one_name(stores, tmp_path):
    """One of them would be lost without a word."""
    files = Files()
    files.name(files.image([HELLO])).name(files.image([WORLD]))
    files.name(files.image([HELLO + WORLD]), "example.org/b:1")
    path = files.folder(tmp_path / "image")
    result = import_all(stores, path)
    assert names(stores) == ["example.org/b:1"]
    assert [one.name for one in result.failed] == ["example.org/a:1"] * 2
    assert "2 images in the archive have this name" in str(result.failed[0].error)
    import_image(stores, path, refs=[files.entries[1]["digest"]], name="one")


def test_one_image_twice(stores, tmp_path):
    files = Files()
    entry = files.image()
    import_image(
        stores, files.name(entry).name(entry).list(entry).list(entry).folder(tmp_path / "image")
    )
    assert names(stores) == ["example.org/a:1"]
    docker = docker_files()
    docker["manifest.json"] = json.dumps(json.loads(docker["manifest.json"]) * 3).encode()
    import_image(stores, tar_of(tmp_path / "image.tar", docker), replace=True)
    assert names(stores) == ["example.org/a:1"]


def test_what_an_entry_says_of_one_name_is_not_kept_for_others(stores, tmp_path):
    files = Files()
    entry = files.image()
    path = files.name(entry, "example.org/a:1").name(entry, "example.org/b:1").folder(tmp_path / "image")
    assert [image.target.annotations for image in import_image(stores, path)] == [{}, {}]
    assert import_image(stores, path, refs=["example.org/a:1"], name="c")[0].target.annotations


def test_images_without_names_come_in_under_their_digests(stores, tmp_path):
    files = Files()
    files.list(files.image([HELLO])).list(files.image([WORLD]))
    found = import_image(stores, files.tar(tmp_path / "Two.tar.gz"))
    assert [image.name for image in found] == [
        f"docker.io/library/two@{entry['digest']}" for entry in files.entries
    ]
    stores.collect()
    for image in found:
        assert stores.images.get(image.name) == image
        assert stores.resolve(image.target)
    (again,) = import_image(stores, tmp_path / "Two.tar.gz", refs=[files.entries[0]["digest"]])
    assert again.name == found[0].name, "an image is called the same however it was chosen"


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_docker_images_without_names(stores, tmp_path, compression):
    files = docker_files([HELLO, WORLD])
    entry = json.loads(files["manifest.json"])[0]
    for number, layer in enumerate([HELLO, WORLD]):
        files[f"{number}/layer.tar"] = pack(layer, compression)[1]
        files[f"{number}.json"] = json.dumps(config_of([layer])).encode()
    entries = [
        {**entry, "RepoTags": None, "Config": f"{n}.json", "Layers": [f"{n}/layer.tar"]}
        for n in range(2)
    ]
    files["manifest.json"] = json.dumps(entries).encode()
    found = import_image(stores, tar_of(tmp_path / "two.tar", files))
    assert [i.name for i in found] == [f"docker.io/library/two@{i.target.digest}" for i in found]
    assert len(names(stores)) == 2


@pytest.mark.parametrize(
    ("file", "name"),
    [("App v2.OCI.tar", "app-v2"), ("_.tar", "image"), ("x" * 200 + ".tar", "x" * 128)],
)
def test_an_image_without_a_name_has_that_of_its_file(stores, tmp_path, file, name):
    files = Files()
    files.list(files.image([HELLO]))
    (image,) = import_image(stores, files.tar(tmp_path / file))
    assert image.name == f"docker.io/library/{name}:latest"


def test_images_of_one_platform_without_a_name_are_two(stores, tmp_path):
    files = Files()
    for layer in (HELLO, WORLD):
        files.list({**files.image([layer]), "platform": AMD64})
    assert len(import_image(stores, files.folder(tmp_path / "image"))) == 2


def test_a_name_and_its_short_form_are_one(stores, tmp_path):
    files = Files()
    arm = files.image([WORLD], config=config_of([WORLD], **ARM64))
    files.name({**arm, "platform": ARM64}, "docker.io/library/a:1")
    files.name({**files.image([HELLO]), "platform": AMD64}, "a:1")
    (image,) = import_image(stores, files.folder(tmp_path / "image"))
    assert image.target.digest == files.entries[1]["digest"]


def test_platforms_without_a_name_are_one_image(stores, tmp_path):
    files = Files()
    for platform, layer in ((ARM64, WORLD), (AMD64, HELLO)):
        entry = files.image([layer], config=config_of([layer], **platform))
        files.list({**entry, "platform": platform})
    (image,) = import_image(stores, files.folder(tmp_path / "image"))
    assert image.name == "docker.io/library/image:latest"
    assert image.target.digest == files.entries[1]["digest"]


def test_many_bad_images_hold_nothing_back(stores, tmp_path):
    """Each error kept what it came through, read transactions among that, of which there are 1024."""
    files = Files()
    entry = files.image()
    for number in range(1100):
        files.list({**entry, "digest": f"sha256:{number:064x}"})
    result = import_all(stores, files.list(entry).tar(tmp_path / "image.tar"))
    assert (len(result.images), len(result.failed)) == (1, 1100)
    assert not any(one.error.__traceback__ or one.error.__context__ for one in result.failed)


def test_reading_many_documents_can_be_ended(stores, tmp_path):
    class StopError(Exception):
        pass

    told = []

    def report(step, item, _total, _done):
        told.append(item)
        if told.count("documents") == 4:
            raise StopError

    with pytest.raises(StopError):
        import_all(stores, two().folder(tmp_path / "image"), report=report)
    assert told == ["documents"] * 4


def test_many_images_without_names(stores, tmp_path):
    files = Files()
    entry = files.image()
    manifest = json.loads(files.files["blobs/" + entry["digest"].replace(":", "/")])
    for number in range(30):
        files.list(files.document({**manifest, "annotations": {"n": str(number)}}, MANIFEST))
    import_image(stores, files.tar(tmp_path / "image.tar"))
    assert len(names(stores)) == 30


# -- found out before the work ----------------------------------------------------------------


def never(*_arguments, **_options):
    raise AssertionError("bytes are copied")


@pytest.fixture
def no_copy(monkeypatch):
    monkeypatch.setattr("engine.archive.intake.Intake.begin", never)


def test_a_taken_name_is_found_before_the_work(stores, tmp_path, monkeypatch):
    import_image(stores, (f := Files()).name(f.image([WORLD])).folder(tmp_path / "first"))
    monkeypatch.setattr("engine.archive.intake.Intake.begin", never)
    path = (f := Files()).name(f.image([HELLO])).folder(tmp_path / "second")
    docker = tar_of(tmp_path / "image.tar", docker_files())
    for source, more in ((path, {}), (docker, {}), (path, {"name": "example.org/a:1"})):
        with pytest.raises(
            AlreadyExists, match=r"^image example.org/a:1 exists and is another one; .*--replace"
        ):
            import_image(stores, source, **more)


@pytest.mark.usefixtures("no_copy")
def test_a_name_of_the_callers_is_checked_before_the_source_is_read(stores, tmp_path):
    with pytest.raises(InvalidArgument, match="is not an image reference"):
        import_image(stores, tmp_path / "absent", name="Not A Name")


@pytest.mark.usefixtures("no_copy")
def test_one_name_is_for_one_image(stores, tmp_path):
    with pytest.raises(InvalidArgument, match="holds 2 images; choose one with --ref"):
        import_image(stores, two().folder(tmp_path / "image"), name="a")


@pytest.mark.root
@pytest.mark.usefixtures("no_copy")
def test_more_layers_than_the_backend_stacks(stores, tmp_path, monkeypatch):
    class Flat:
        name = "overlay"
        capabilities = type(stores.snapshotter("overlay").capabilities)(
            rebase=True, layers=1, name_bytes=255, whiteout_names=True
        )

        def close(self):
            pass

    monkeypatch.setattr(stores, "working", lambda _name: Flat())
    path = (f := Files()).name(f.image([HELLO, WORLD])).folder(tmp_path / "image")
    with pytest.raises(FailedPrecondition, match=r"image example.org/a:1: overlay stacks at most 1"):
        import_image(stores, path, snapshotter="overlay")


def test_the_backend_is_looked_up_before_the_source_is_read(stores, tmp_path, monkeypatch):
    with pytest.raises(InvalidArgument, match="no snapshotter 'other'"):
        import_image(stores, tmp_path / "absent", snapshotter="other")
    probe = Probe(unpacks=False, mounts=False, reason="not on Tuesdays")
    monkeypatch.setattr(plugins, "_probe", lambda _root, _plugin: probe)
    with pytest.raises(NotSupported, match="overlay does not work here: not on Tuesdays"):
        import_image(stores, tmp_path / "absent", snapshotter="overlay")


@pytest.mark.usefixtures("no_copy")
def test_a_missing_layer_is_found_before_the_others_are_copied(stores, tmp_path):
    path = spoiled(two()).folder(tmp_path / "image")
    with pytest.raises(Refused, match="incomplete"):
        import_image(stores, path, refs=["example.org/b:1"])


def test_the_end_still_checks_names(stores, tmp_path, monkeypatch):
    """Another process may take the name meanwhile."""
    import_image(stores, (f := Files()).name(f.image([WORLD])).folder(tmp_path / "first"))
    monkeypatch.setattr(stores.images, "check_all", lambda *_arguments, **_options: None)
    with pytest.raises(AlreadyExists):
        import_image(stores, (f := Files()).name(f.image([HELLO])).folder(tmp_path / "second"))


# -- indexes in indexes -----------------------------------------------------------------------


def platforms(files):
    arm = files.image([WORLD], config=config_of([WORLD], **ARM64))
    return {**arm, "platform": ARM64}, {**files.image([HELLO]), "platform": AMD64}


def nested(files):
    arm, amd = platforms(files)
    return files.name(files.index(files.index(arm), files.index(files.index(amd))))


@pytest.mark.parametrize("platform", [AMD64, ARM64], ids=lambda p: p["architecture"])
def test_indexes_without_a_platform_are_looked_through(stores, tmp_path, platform):
    wanted = Platform(**platform)
    (image,) = import_image(stores, nested(Files()).folder(tmp_path / "image"), platform=wanted)
    stores.collect()
    assert stores.resolve(image.target, wanted).config.architecture == platform["architecture"]


def test_platforms_of_indexes_in_indexes_add_up(stores, tmp_path):
    path = nested(Files()).folder(tmp_path / "image")
    arm = Platform(**ARM64)
    import_image(stores, path)
    (image,) = import_image(stores, path, platform=arm)
    stores.collect()
    for platform in (Platform(**AMD64), arm):
        found = stores.resolve(image.target, platform)
        assert found.config.architecture == platform.architecture
        assert stores.content.read_all(found.layers[0].descriptor.key, limits.MIB)


@pytest.mark.parametrize("platform", [AMD64, ARM64], ids=lambda p: p["architecture"])
def test_a_layout_may_lack_the_indexes_of_other_platforms(stores, tmp_path, platform):
    """As a copy for one platform alone does; an unpack passes them over, too."""
    wanted = Platform(**platform)
    files = nested(Files())
    arm, amd = json.loads(files.files[blob_of(files.entries[0])])["manifests"]
    del files.files[blob_of(amd if platform is ARM64 else arm)]
    (image,) = import_image(stores, files.folder(tmp_path / "image"), platform=wanted)
    assert stores.resolve(image.target, wanted).config.architecture == platform["architecture"]


def test_the_index_that_an_image_is_named_by_must_be_there(stores, tmp_path):
    files = nested(Files())
    del files.files[blob_of(files.entries[0])]
    with pytest.raises(Refused, match=r"blob sha256:\w+ is missing; the image is incomplete"):
        import_image(stores, files.folder(tmp_path / "image"))


def test_the_best_of_all_indexes_is_chosen(stores, tmp_path):
    files = Files()
    v1 = {**files.image([WORLD], config=config_of([WORLD], variant="v1")), "platform": AMD64}
    v2 = {
        **files.image([HELLO], config=config_of([HELLO], variant="v2")),
        "platform": {**AMD64, "variant": "v2"},
    }
    files.name(files.index(files.index(v1), files.index(v2)))
    wanted = Platform(**AMD64, variant="v3")
    (image,) = import_image(stores, files.folder(tmp_path / "image"), platform=wanted)
    assert stores.resolve(image.target, wanted).path[-1].digest == v2["digest"]


def test_the_first_listed_of_all_indexes_is_chosen(stores, tmp_path):
    files = Files()
    entries = [{**files.image([layer]), "platform": AMD64} for layer in (WORLD, HELLO, HELLO + WORLD)]
    files.name(files.index(files.index(entries[0]), files.index(entries[1]), entries[2]))
    (image,) = import_image(stores, files.folder(tmp_path / "image"))
    assert stores.resolve(image.target).path[-1].digest == entries[0]["digest"]


def test_one_manifest_that_is_listed_twice_is_one(stores, tmp_path):
    files = Files()
    entry = files.image()
    files.name(files.index(entry, entry, files.index(entry)))
    assert import_image(stores, files.folder(tmp_path / "image"))


def test_each_index_is_read_once():
    """Ten indexes of ten indexes, eight deep, would be a hundred million."""
    below = {**Files().image(), "platform": AMD64}
    files, read = Files(), []
    for _ in range(limits.INDEX_DEPTH - 1):
        below = files.index(*[below] * 10)

    def reader(descriptor, _limit):
        read.append(descriptor.digest)
        return files.files["blobs/" + descriptor.digest.replace(":", "/")]

    target = Descriptor(media_type=INDEX, digest=below["digest"], size=below["size"])
    with pytest.raises(KeyError):  # the manifest itself is not there
        resolve(target, Platform(**AMD64), reader)
    assert len(read) == limits.INDEX_DEPTH
    assert len(set(read)) == len(read)


def test_what_is_listed_often_is_looked_at_once(stores, tmp_path):
    """A listing of images goes through all that is here, and must not either."""
    files = Files()
    below = files.image()
    for _ in range(limits.INDEX_DEPTH - 1):
        below = files.index(*[below] * 10)
    (image,) = import_image(stores, files.name(below).folder(tmp_path / "image"))
    assert len(stores.present(image.target)) == 1


def test_an_entry_with_a_digest_of_another_kind_disturbs_nobody(stores, tmp_path):
    files = Files()
    odd = {**files.image([WORLD]), "digest": "blake3:" + "0" * 64}
    entry = {**files.image(), "platform": AMD64}
    files.name(files.index({**odd, "platform": ARM64}, entry, odd)).list(odd)
    result = import_all(stores, files.folder(tmp_path / "image"))
    (image,) = result.images
    assert "not a sha256 or sha512 digest: 'blake3:" in str(result.failed[0].error)
    assert [found.path[-1].digest for found in stores.present(image.target)] == [entry["digest"]]


def test_a_bomb_of_indexes_ends(monkeypatch):
    monkeypatch.setattr(limits, "INDEXES", 5)
    files, read = Files(), []
    entries = [files.index(annotations={"n": str(number)}) for number in range(20)]
    top = files.index(*entries)

    def reader(descriptor, _limit):
        read.append(descriptor.digest)
        return files.files["blobs/" + descriptor.digest.replace(":", "/")]

    target = Descriptor(media_type=INDEX, digest=top["digest"], size=top["size"])
    with pytest.raises(Refused, match="leads to over 10000 manifests or 5 indexes"):
        resolve(target, Platform(**AMD64), reader)
    assert len(read) == 6
    monkeypatch.setattr(limits, "INDEXES", 1000)
    monkeypatch.setattr(limits, "INDEX_ENTRIES", 20)
    with pytest.raises(NotFound):
        resolve(target, Platform(**AMD64), reader)
    wide = files.index(files.index(*entries[:10]), files.index(*entries[5:]))
    target = Descriptor(media_type=INDEX, digest=wide["digest"], size=wide["size"])
    with pytest.raises(Refused, match="leads to over 20 manifests"):
        resolve(target, Platform(**AMD64), reader)


# -- null -------------------------------------------------------------------------------------


def test_null_in_every_document(stores, tmp_path):
    files = Files()
    config = config_of([], variant=None, history=None, config=None, created=None)
    config["rootfs"]["diff_ids"] = None
    image = files.image([], config=config, layers=None, annotations=None, subject=None)
    platform = {**AMD64, "variant": None, "os.features": None}
    index = files.index({**image, "platform": platform, "annotations": None, "urls": None})
    files.list({**index, "platform": None, "annotations": {"org.opencontainers.image.ref.name": None}})
    files.files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0", "x": null}'
    (image,) = import_image(stores, files.folder(tmp_path / "image"))
    assert stores.resolve(image.target).chain == []


def test_null_in_a_docker_archive(stores, tmp_path):
    files = docker_files([], entry={"Layers": None, "RepoTags": None, "LayerSources": None})
    assert import_image(stores, tar_of(tmp_path / "scratch.tar", files))[0].name.endswith(
        "scratch:latest"
    )


def test_what_may_not_be_chosen_is_not_shown_either():
    """Told by annotation and artifact type, too: some write no platform beside them."""
    files = Files()
    image = files.image()
    attestation = {**files.attestation(image), "platform": AMD64}
    artifact = {**files.image([WORLD]), "artifactType": "application/vnd.example"}
    unsure = {**files.image([HELLO, WORLD]), "platform": {"architecture": "amd64", "os": "unknown"}}
    index = files.index(attestation, artifact, unsure, image)
    top = msgspec.convert(index, Descriptor)

    def read(one, _limit):
        return files.files[f"blobs/sha256/{one.digest[7:]}"]

    shown = present(top, Platform(**AMD64), read, lambda _: True)
    assert {one.path[-1].digest for one in shown} == {image["digest"], unsure["digest"]}
