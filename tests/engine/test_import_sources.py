"""Where images may come from: folders with links, skopeo's `dir:`, pipes, archives that are packed."""

import bz2
import gzip
import lzma
import os
import shutil
import threading
from contextlib import suppress

import pytest
import trio

from engine import limits
from engine.app import Engine
from engine.archive.opening import open_source
from engine.archive.packed import unpacked
from engine.errors import InvalidArgument, Refused, ResourceExhausted
from engine.fs import kernel
from engine.oci.digest import digest_of
from engine.progress import Step
from engine.testing.archives import END, SPARSE_FORMS, archive, member, sparse_member
from engine.unpack.workshop import open_workshop
from tests.engine.image_files import (
    AMD64,
    ARM64,
    DOCKER_LIST,
    HELLO,
    INDEX,
    WORLD,
    Files,
    config_of,
    docker_files,
    import_all,
    import_image,
    state,
    tar_of,
)
from tests.filesystems import in_memory


def one_image():
    files = Files()
    return files.name(files.image([HELLO, WORLD]))


def quiet(_total, _done):
    pass


# -- links in a folder ------------------------------------------------------------------------


@pytest.mark.parametrize("linked", ["index.json", "blobs", "blobs/sha256", "oci-layout", "layer"])
@pytest.mark.parametrize("apart", ["real", "deep/er"])
def test_a_link_within_a_layout_is_followed(stores, tmp_path, linked, apart):
    """As trees of links to a shared folder of blobs, and git-annex, make them."""
    folder = one_image().folder(tmp_path / "image")
    name = folder / (f"blobs/sha256/{digest_of(HELLO)[7:]}" if linked == "layer" else linked)
    target = folder / apart / "it"
    target.parent.mkdir(parents=True)
    name.rename(target)
    name.symlink_to(os.path.relpath(target, name.parent))
    (image,) = import_image(stores, folder)
    assert len(stores.resolve(image.target).layers) == 2


@pytest.mark.parametrize(
    "target", ["../secret", "/etc/passwd", "blobs/../../secret", "/proc/self/root/etc/passwd"]
)
def test_a_link_out_of_a_layout_is_refused(stores, tmp_path, target):
    (tmp_path / "secret").write_bytes(HELLO)
    folder = one_image().folder(tmp_path / "image")
    name = folder / f"blobs/sha256/{digest_of(HELLO)[7:]}"
    name.unlink()
    name.symlink_to(("../../" if target[0] != "/" else "") + target)
    with pytest.raises(Refused, match=r"image example.org/a:1: .* leads out of the image"):
        import_image(stores, folder)


def test_links_in_a_circle(stores, tmp_path):
    folder = one_image().folder(tmp_path / "image")
    shutil.rmtree(folder / "blobs")
    (folder / "blobs").symlink_to("other")
    (folder / "other").symlink_to("blobs")
    with pytest.raises(Refused, match="by links in a circle"):
        import_image(stores, folder)


def test_a_link_to_nothing_is_a_missing_file(stores, tmp_path):
    folder = one_image().folder(tmp_path / "image")
    name = folder / f"blobs/sha256/{digest_of(HELLO)[7:]}"
    name.unlink()
    name.symlink_to("gone")
    with pytest.raises(Refused, match="incomplete"):
        import_image(stores, folder)


def test_a_rename_elsewhere_does_not_disturb(stores, tmp_path, monkeypatch):
    """Following `..`, the kernel gives up when anything was renamed meanwhile (openat2(2), EAGAIN)."""
    real, calls = kernel.syscall, []

    def busy(*arguments):
        calls.append(1)
        if len(calls) % 3:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return real(*arguments)

    path = one_image().folder(tmp_path / "image")
    monkeypatch.setattr(kernel, "syscall", busy)
    import_image(stores, path)


# -- skopeo's dir: ----------------------------------------------------------------------------


def dir_files(files, *, top=None):
    """Return what `skopeo copy … dir:` writes of an image: blobs by their bare digits."""
    entry = files.entries[0]
    found = {name.removeprefix("blobs/sha256/"): data for name, data in files.files.items()}
    found.pop("oci-layout")
    for other in top or ():
        digits = other["digest"][7:]
        found[f"{digits}.manifest.json"] = found.pop(digits)
    found["manifest.json"] = found.pop(entry["digest"][7:])
    return {**found, "version": b"Directory Transport Version: 1.1\n"}


def write(folder, files):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_dir(stores, tmp_path):
    files = one_image()
    (image,) = import_image(stores, write(tmp_path / "My image", dir_files(files)))
    assert image.name == "docker.io/library/my-image:latest"
    assert image.target.digest == files.entries[0]["digest"]
    assert len(stores.resolve(image.target).layers) == 2


def test_dir_as_a_tar_file(stores, tmp_path):
    assert import_image(stores, tar_of(tmp_path / "image.tar", dir_files(one_image())))


@pytest.mark.parametrize("media_type", [INDEX, DOCKER_LIST, None])
def test_dir_of_several_platforms(stores, tmp_path, media_type):
    files = Files()
    arm = {**files.image([WORLD], config=config_of([WORLD], **ARM64)), "platform": ARM64}
    amd = {**files.image([HELLO]), "platform": AMD64}
    index = {"schemaVersion": 2, "mediaType": media_type, "manifests": [arm, amd]}
    files.list(files.document(index, media_type or INDEX))
    (image,) = import_image(stores, write(tmp_path / "image", dir_files(files, top=[arm, amd])))
    assert stores.resolve(image.target).config.architecture == "amd64"


def test_dir_that_is_incomplete(stores, tmp_path):
    files = dir_files(one_image())
    del files[digest_of(HELLO)[7:]]
    with pytest.raises(Refused, match="incomplete"):
        import_image(stores, write(tmp_path / "image", files))


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("version", b"Directory Transport Version: 2.0\n", "version is not that of a folder"),
        ("version", b"\xff" * 100, "version is not that of a folder"),
        ("manifest.json", b"[]", "manifest.json is not a manifest"),
        ("manifest.json", b"{}", "missing required field"),
        ("manifest.json", b'{"mediaType": 7}', "its media type is '7'"),
        ("manifest.json", b'{"mediaType": "text/plain"}', "its media type is 'text/plain'"),
    ],
)
def test_dir_that_is_none(stores, tmp_path, name, data, why):
    with pytest.raises(Refused, match=why):
        import_image(stores, write(tmp_path / "image", {**dir_files(one_image()), name: data}))


# -- archives that are packed -----------------------------------------------------------------


def xz(data):
    return lzma.compress(data, preset=0)


PACKERS = {
    "xz": xz,
    "xz, two streams and padding": lambda data: xz(data[:700]) + bytes(8) + xz(data[700:]) + bytes(4),
    "xz, an empty stream first": lambda data: xz(b"") + xz(data),
    "xz, sha256": lambda data: lzma.compress(data, check=lzma.CHECK_SHA256),
    "bzip2": bz2.compress,
    "bzip2, two streams": lambda data: bz2.compress(data[:700]) + bz2.compress(data[700:]),
    "bzip2, an empty stream first": lambda data: bz2.compress(b"") + bz2.compress(data),
}


@pytest.mark.parametrize("pack", PACKERS.values(), ids=PACKERS)
def test_packed_archive(stores, tmp_path, pack):
    path = one_image().tar(tmp_path / "image.tar")
    path.write_bytes(pack(path.read_bytes()))
    import_image(stores, path)
    assert not list(stores.root.trash.iterdir())


_DATA = archive(member("x", data=os.urandom(3000)))
DAMAGED = {
    "xz cut off": (xz(_DATA)[:-20], "the xz stream is cut off"),
    "xz head alone": (xz(_DATA)[:12], "the xz stream is cut off"),
    "xz flipped": (xz(_DATA)[:500] + b"\0" + xz(_DATA)[501:], "the xz stream is damaged"),
    "xz, bytes behind": (xz(_DATA) + b"x" * 20, "the xz stream is damaged"),
    "xz, second cut off": (xz(_DATA) + xz(_DATA)[:90], "the xz stream is cut off"),
    "bzip2 cut off": (bz2.compress(_DATA)[:-5], "the bzip2 stream is cut off"),
    "bzip2 flipped": (bz2.compress(_DATA)[:-9] + b"\0" * 9, "the bzip2 stream is damaged"),
    "bzip2, bytes behind": (bz2.compress(_DATA) + b"x" * 20, "the bzip2 stream is damaged"),
    "xz, no archive": (xz(b"hello"), "archive is cut off within a header"),
}


@pytest.mark.parametrize(("data", "why"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_refused(stores, tmp_path, data, why):
    (tmp_path / "image.tar").write_bytes(data)
    with pytest.raises(Refused, match=f"is not an image archive: {why}"):
        import_image(stores, tmp_path / "image.tar")
    assert not list(stores.root.trash.iterdir())


def test_the_memory_that_xz_asks_for_is_bounded():
    """Its header says how large a dictionary is to be: up to 4 GiB."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 256 << 20}]
    large = lzma.compress(b"x", filters=filters)
    with pytest.raises(Refused, match=r"needs too much memory: Memory usage limit"):
        list(unpacked([large]))
    assert limits.XZ_MEMORY == 128 * limits.MIB
    usual = lzma.compress(b"x", filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])
    assert b"".join(unpacked([usual])) == b"x"


@pytest.mark.parametrize("compress", [xz, bz2.compress, gzip.compress, bytes])
def test_what_an_archive_unpacks_to_is_bounded(compress, monkeypatch):
    data = compress(bytes(3000))
    monkeypatch.setattr(limits, "IMAGE", 3000)
    assert sum(map(len, unpacked([data]))) == 3000
    monkeypatch.setattr(limits, "IMAGE", 2999)
    with pytest.raises(Refused, match="over 2999 bytes unpacked"):
        list(unpacked([data]))


@pytest.mark.parametrize("compress", [xz, bz2.compress])
def test_what_unpacks_to_much_comes_in_pieces(compress):
    sizes = [len(piece) for piece in unpacked([compress(bytes(8 * limits.MIB))])]
    assert sum(sizes) == 8 * limits.MIB
    assert max(sizes) <= limits.MIB


@pytest.mark.root
@pytest.mark.parametrize("source", ["xz", "bzip2", "pipe", "someone else's work"])
def test_what_fills_the_disk_is_stopped_before(tmp_path, monkeypatch, source):
    """48 MiB that come out of few, or through a pipe, where 32 MiB are free."""
    if source == "someone else's work":  # meanwhile took what was free when it was looked at
        monkeypatch.setattr("engine.fs.room.Room.take", lambda *_: None)
    size = 48 * limits.MIB
    with in_memory(tmp_path / "spool", 32) as spool:
        if source == "pipe":
            origin, into = os.pipe()
            feeder = threading.Thread(target=_fill, args=(into, size))
            feeder.start()
        else:
            origin = tmp_path / "bomb"
            origin.write_bytes((bz2.compress if source == "bzip2" else xz)(bytes(size)))
        stopped = "no space left on the device" + (r" but \d+ MiB" if "work" not in source else "; free")
        with pytest.raises(ResourceExhausted, match=stopped), open_source(origin, spool, quiet):
            pass
        disk = os.statvfs(spool)
        assert disk.f_bfree == disk.f_blocks, "nothing stays"
    if source == "pipe":
        os.close(origin)
        feeder.join()


def _fill(file, size):
    with suppress(BrokenPipeError), open(file, "wb", buffering=0) as pipe:
        for _ in range(size >> 20):
            pipe.write(bytes(1 << 20))


@pytest.mark.parametrize("compress", [xz, bz2.compress])
def test_many_tiny_streams_are_refused(compress, monkeypatch):
    monkeypatch.setattr(limits, "STREAMS", 10)
    with pytest.raises(Refused, match="too many tiny"):
        list(unpacked([compress(b"x") * 50]))


@pytest.mark.parametrize("pack", [xz, bz2.compress, gzip.compress, bytes])
def test_bytes_that_come_one_by_one(pack):
    data = pack(_DATA)
    assert b"".join(unpacked(data[at : at + 1] for at in range(len(data)))) == _DATA


# -- archives with sparse members --------------------------------------------------------------


def sparsely(form, name, data):
    """Return a member as `tar --sparse` writes it, without the blocks of zeros of `data`."""
    blocks = [(at, data[at : at + 512]) for at in range(0, len(data), 512)]
    return sparse_member(form, name.encode(), len(data), [(at, b) for at, b in blocks if any(b)])


@pytest.mark.parametrize("form", SPARSE_FORMS)
def test_sparse_members_are_read_with_their_holes(stores, tmp_path, form):
    """As tar packs a layout in which a layer, itself an archive, has runs of zeros."""
    layer = archive(member("f", data=b"x" * 512 + bytes(100_000) + b"y"), member("g", data=bytes(9999)))
    files = docker_files([layer])
    del files["0/layer.tar"]
    path = tar_of(tmp_path / "image.tar", files, sparsely(form, "0/layer.tar", layer))
    assert path.stat().st_size < len(layer) / 4
    (image,) = import_image(stores, path)
    (found,) = stores.resolve(image.target).layers
    assert b"".join(stores.content.read_verified(found.descriptor.key)) == layer


def test_equal_sparse_twins_are_one(stores, tmp_path):
    one, other = (sparse_member("1.0", b"spare", 5000, [(1000, data)]) for data in (b"xy", b"xz"))
    import_image(stores, one_image().tar(tmp_path / "same.tar", one, one))
    with pytest.raises(Refused, match="two different files 'spare'"):
        import_image(stores, one_image().tar(tmp_path / "two.tar", one, other))
    other = sparse_member("1.0", b"spare", 5000, [(1001, b"xy")])
    with pytest.raises(Refused, match="two different files 'spare'"):
        import_image(stores, one_image().tar(tmp_path / "two.tar", one, other))


def test_sparse_members_are_bounded_over_the_archive(stores, tmp_path, monkeypatch):
    parts = [sparse_member("0.1", b"%d" % n, 6000, [(9, b"x"), (99, b"y")]) for n in range(2)]
    path = one_image().tar(tmp_path / "image.tar", *parts)
    monkeypatch.setattr(limits, "SPARSE_PARTS", 3)
    with pytest.raises(Refused, match="sparse files of over 3 parts"):
        import_image(stores, path)
    monkeypatch.setattr(limits, "IMAGE", 11_999)
    with pytest.raises(Refused, match="sparse files of over 11999 bytes"):
        import_image(stores, path)


def test_an_archive_that_ends_within_a_sparse_member_is_cut_off(stores, tmp_path):
    path = one_image().tar(tmp_path / "image.tar", sparse_member("S", b"f", 9, [(0, b"x"), (8, b"y")]))
    path.write_bytes(path.read_bytes()[: -len(END) - 512 + 1])
    with pytest.raises(Refused, match="archive is cut off; copy it again"):
        import_image(stores, path)


# -- pipes ------------------------------------------------------------------------------------


class Feeder:
    """Writes into a pipe from a thread, and waits for it in the end."""

    def __init__(self, file, data):
        self._thread = threading.Thread(target=self._feed, args=(file, data))

    def _feed(self, file, data):
        with open(file, "wb") as pipe:
            pipe.write(data)

    def __enter__(self):
        self._thread.start()

    def __exit__(self, *_):
        self._thread.join()


def fed(data):
    """Return the reading end of a pipe through which `data` comes, and what writes it."""
    out, into = os.pipe()
    return out, Feeder(into, data)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, xz])
def test_a_pipe_is_read(stores, tmp_path, pack):
    out, feeder = fed(pack(one_image().tar(tmp_path / "x.tar").read_bytes()))
    told = []
    with feeder:
        (image,) = import_image(
            stores,
            out,
            report=lambda step, item, total, done: told.append((step, item, total, done)),
        )
    os.close(out)
    assert image.name == "example.org/a:1"
    assert not list(stores.root.trash.iterdir())
    read = [(total, done) for step, item, total, done in told if item == "standard input"]
    assert read[0][0] == 0, "nobody knows how much will come"
    assert read[-1][0] == read[-1][1], "the end is told"


def test_a_short_write_to_the_spool_is_continued(stores, tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr("engine.archive.opening.os.write", lambda file, data: real(file, data[:1000]))
    out, feeder = fed(one_image().tar(tmp_path / "x.tar").read_bytes())
    with feeder:
        assert import_image(stores, out)
    os.close(out)


def test_a_fifo_is_read(stores, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with Feeder(tmp_path / "fifo", tar_of(tmp_path / "x.tar", docker_files()).read_bytes()):
        (image,) = import_image(stores, tmp_path / "fifo")
    assert image.name == "example.org/a:1"


def test_an_image_of_a_pipe_without_a_name(stores, tmp_path):
    """No file lends its name: `63`, of /dev/fd/63, is none."""
    files = Files()
    data = files.list(files.image()).tar(tmp_path / "x.tar").read_bytes()
    out, feeder = fed(data)
    with feeder:
        (image,) = import_image(stores, out)
    os.close(out)
    assert image.name == f"docker.io/library/image@{image.target.digest}"
    out, feeder = fed(data)
    with feeder:
        (image,) = import_image(stores, out, name="mine")
    os.close(out)
    assert image.name == "docker.io/library/mine:latest"


@pytest.mark.parametrize("start", [0, 512])
def test_a_file_as_standard_input_is_read_from_where_it_stands(stores, tmp_path, start):
    path = one_image().tar(tmp_path / "x.tar")
    path.write_bytes(bytes(start) + path.read_bytes())
    with path.open("rb") as file:
        os.lseek(file.fileno(), start, os.SEEK_SET)
        assert import_image(stores, file.fileno())


def test_a_folder_as_standard_input(stores, tmp_path):
    file = os.open(one_image().folder(tmp_path / "image"), os.O_RDONLY)
    assert import_image(stores, file)
    os.close(file)


@pytest.mark.parametrize("data", [b"", b"hello", bytes(2000)])
def test_a_pipe_that_brings_no_archive(stores, data):
    out, feeder = fed(data)
    with feeder, pytest.raises(Refused, match="standard input is not an image"):
        import_image(stores, out)
    os.close(out)
    assert not list(stores.root.trash.iterdir())


@pytest.mark.parametrize("device", ["/dev/null", "/dev/zero"])
def test_a_device_is_no_source(stores, device):
    file = os.open(device, os.O_RDONLY)
    for source in (file, device):
        with pytest.raises(InvalidArgument, match="neither a folder, a file nor a pipe"):
            import_all(stores, source)
    os.close(file)


@pytest.mark.parametrize("form", ["pipe", "fifo without a writer"])
def test_a_pipe_that_stalls_can_be_left(stores, tmp_path, form):
    """Whoever waits is asked again and again; a cancel, as of Ctrl-C, ends it."""
    before = state(stores)
    out, into = os.pipe()
    os.write(into, member("oci-layout", data=b"{}")[:100])
    os.mkfifo(tmp_path / "fifo")
    source = out if form == "pipe" else tmp_path / "fifo"

    async def run():
        asked = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def report(step, _item, _total, _done):
            assert step is Step.READ
            token.run_sync_soon(asked.set)

        async with open_workshop(stores.root) as workshop, trio.open_nursery() as nursery:
            nursery.start_soon(lambda: Engine(stores, workshop).import_image(source, report=report))
            with trio.fail_after(30):
                await asked.wait()
            nursery.cancel_scope.cancel()

    trio.run(run)
    os.close(out)
    os.close(into)
    assert state(stores) == before


def test_reading_a_pipe_can_be_ended_after_any_piece(tmp_path):
    class StopError(Exception):
        pass

    def report(_total, _done):
        raise StopError

    out, into = os.pipe()
    os.write(into, b"x" * 100)
    os.close(into)
    with pytest.raises(StopError), open_source(out, tmp_path, report):
        pass
    os.close(out)
    assert not list(tmp_path.iterdir())


def test_a_docker_archive_through_a_pipe_keeps_its_layers(stores, tmp_path):
    data = tar_of(tmp_path / "x.tar", docker_files([HELLO, WORLD])).read_bytes()
    out, feeder = fed(data)
    with feeder:
        (image,) = import_image(stores, out)
    os.close(out)
    layers = stores.resolve(image.target).layers
    assert [b"".join(stores.content.read(x.descriptor.key)) for x in layers] == [HELLO, WORLD]
