"""Packed bytes become exactly what was packed, or an error: whole, and in bounded pieces."""

import gzip
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from engine import limits
from engine.archive.opening import open_source
from engine.diff import pipeline
from engine.diff.apply import apply_layer
from engine.diff.decompress import SNIFFED, decompressed, sniff
from engine.errors import Refused
from engine.oci.digest import digest_of
from engine.oci.mediatypes import Compression
from engine.phases import Phase
from engine.snapshots import Target
from engine.testing.archives import archive, member

MIB = 1 << 20
TEXT = b"".join(b"line %d\n" % number for number in range(20_000))
Pack = Callable[[bytes], bytes]


def gz(data: bytes) -> bytes:
    return gzip.compress(data, 1, mtime=0)


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


PACKED: dict[str, Pack] = {"gzip": gz, "zstd": zst, "plain": bytes}


def unpacked(data: bytes | Iterable[bytes], limit: int = limits.LAYER) -> bytes:
    return b"".join(decompressed([data] if isinstance(data, bytes) else data, limit))


def skippable(data: bytes, number: int = 0) -> bytes:
    return (0x184D2A50 + number).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data


# -- whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (gz(b""), Compression.GZIP),
        (zst(b""), Compression.ZSTD),
        (skippable(b"", 0), Compression.ZSTD),
        (skippable(b"", 15), Compression.ZSTD),
        (b"\x40\x2a\x4d\x18", Compression.NONE),
        (b"\x60\x2a\x4d\x18", Compression.NONE),
        (b"\x1f\x8b\x07\0", Compression.NONE),
        (b"\x1f\x8b", Compression.NONE),
        (b"", Compression.NONE),
        (member("f"), Compression.NONE),
    ],
)
def test_the_first_bytes_tell(head: bytes, found: Compression) -> None:
    assert sniff(head[:SNIFFED]) is sniff(head) is found


@given(st.sampled_from(sorted(PACKED)), st.binary(max_size=3000), st.lists(st.integers(1, 900)))
def test_pieces_do_not_matter(form: str, data: bytes, sizes: list[int]) -> None:
    whole = PACKED[form](data + b"more" * 200)
    pieces, at = [], 0
    for size in sizes:
        pieces.append(whole[at : at + size])
        at += size
    assert unpacked([*pieces, whole[at:]]) == data + b"more" * 200


@pytest.mark.parametrize("count", [2, 3, 50])
@pytest.mark.parametrize("piece", [1, 37, 1 << 18, 1 << 30])
def test_every_gzip_member_counts(count: int, piece: int) -> None:
    parts = [b"%d " % number * 300 for number in range(count)]
    whole = b"".join(map(gz, parts)) + gz(b"")
    pieces = [whole[at : at + piece] for at in range(0, len(whole), piece)]
    assert unpacked(pieces) == b"".join(parts)


def test_every_zstd_frame_counts() -> None:
    parts = [b"%d " % number * 300 * (number % 7 > 0) for number in range(50)]  # some are empty
    between = [skippable(b"x" * number, number % 16) for number in range(50)]
    whole = b"".join(gap + zst(part) for gap, part in zip(between, parts, strict=True))
    assert unpacked(whole + skippable(b"last")) == b"".join(parts)


def test_a_frame_of_a_stream_does_not_say_its_size() -> None:
    packer = zstandard.ZstdCompressor().compressobj()
    assert unpacked(packer.compress(TEXT) + packer.flush()) == TEXT


# -- damaged ----------------------------------------------------------------------------------


def test_a_cut_gzip_stream_is_no_end() -> None:
    whole = gz(TEXT[:2000])
    for end in range(SNIFFED, len(whole)):
        with pytest.raises(Refused, match="cut off"):
            unpacked(whole[:end])
    two = gz(b"first") + whole
    for end in range(len(gz(b"first")) + 1, len(two)):
        with pytest.raises(Refused, match=r"cut off|damaged"):
            unpacked(two[:end])


class Counting:
    """A sink that makes nothing."""

    def __init__(self) -> None:
        self.read = 0

    def __enter__(self) -> "Counting":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def make_file(
        self, _parent: object, _name: bytes, _entry: object, payload: Callable[[], Iterator[memoryview]]
    ) -> None:
        self.read += sum(map(len, payload()))

    def finish(self, *_: object) -> int:
        return 0


def counting(_place: str) -> Counting:
    return Counting()


TARGET = Target(sink=f"{__name__}:counting", place="/tmp/none", name_bytes=255, whiteout_names=True)


def test_a_cut_zstd_layer_never_passes_for_a_whole_one() -> None:
    layer = archive(*(member(f"{number}", data=TEXT[number:3000]) for number in range(5)))
    whole = zstandard.ZstdCompressor(write_checksum=True).compress(layer)
    for end in range(SNIFFED, len(whole) - 1):
        try:
            applied = apply_layer([whole[:end]], TARGET, diff_id=digest_of(layer))
        except Refused:
            continue
        # Between two blocks, or before the checksum, the stream may seem to end.
        assert applied.diff_id != digest_of(layer) or end >= len(whole) - 4
    assert apply_layer([whole], TARGET, diff_id=digest_of(layer)).diff_id == digest_of(layer)


@pytest.mark.parametrize("after", [b"\0" * 512, b"garbage", b"\x1f", b"PK\3\4" * 200])
@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_bytes_after_the_stream_are_refused(form: str, after: bytes) -> None:
    whole = PACKED[form](TEXT)
    for pieces in ([whole + after], [whole, after]):
        with pytest.raises(Refused, match=r"damaged|cut off"):
            unpacked(pieces)


def test_checksums_are_checked() -> None:
    whole = gz(TEXT)
    for at in (-8, -5, -4, -1):  # CRC-32, then the length
        with pytest.raises(Refused, match="damaged"):
            unpacked(whole[:at] + bytes([whole[at] ^ 1]) + whole[len(whole) + at + 1 :])
    whole = zst(TEXT)
    with pytest.raises(Refused, match="damaged"):
        unpacked(whole[:-1] + bytes([whole[-1] ^ 1]))


@given(st.sampled_from(["gzip", "zstd"]), st.integers(0, 10_000), st.integers(0, 7))
def test_a_changed_bit_is_refused_or_harmless(form: str, at: int, bit: int) -> None:
    data = TEXT[:5000]
    whole = bytearray(PACKED[form](data))
    whole[at % len(whole)] ^= 1 << bit
    try:
        found = unpacked(bytes(whole))
    except Refused:
        return
    # Of a header some bits say nothing (times, the system), and its first make it no stream at all. A
    # zstd stream may seem to end early, which the diff ID shows.
    assert found in {data, bytes(whole)} or (form == "zstd" and data.startswith(found))


# -- bounded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", sorted(PACKED))
def test_no_more_comes_out_than_is_allowed(form: str) -> None:
    whole = PACKED[form](bytes(3 * MIB))
    assert len(unpacked(whole, 3 * MIB)) == 3 * MIB
    with pytest.raises(Refused, match="over 3145727 bytes unpacked"):
        unpacked(whole, 3 * MIB - 1)


@pytest.mark.parametrize("form", sorted(PACKED))
def test_a_layer_is_bounded(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LAYER", MIB)
    layer = archive(member("f", data=bytes(2 * MIB)))
    with pytest.raises(Refused, match="over 1048576 bytes unpacked"):
        apply_layer([PACKED[form](layer)], TARGET, diff_id=digest_of(layer))


def test_a_packed_archive_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "IMAGE", MIB)
    file = tmp_path / "image.tar.gz"
    file.write_bytes(gz(archive(member("f", data=bytes(2 * MIB)))))
    with (
        pytest.raises(Refused, match="over 1048576 bytes unpacked"),
        open_source(file, tmp_path, lambda _whole, _done: None),
    ):
        pass


@pytest.mark.parametrize("form", ["gzip", "zstd"])
def test_200_mb_of_zeros_are_an_honest_layer(form: str) -> None:
    blank, count = bytes(MIB), 200
    if form == "gzip":
        packer = zlib.compressobj(1, wbits=31)
        packed = b"".join([packer.compress(blank) for _ in range(count)]) + packer.flush()
    else:
        packed = zst(blank * 20) * 10
        assert len(packed) < 100_000
    assert sum(map(len, decompressed([packed], limits.LAYER))) == count * MIB


@pytest.mark.parametrize("form", sorted(PACKED))
def test_pieces_are_bounded_whatever_comes_in(form: str) -> None:
    for piece in decompressed([PACKED[form](bytes(20 * MIB))], limits.LAYER):
        assert 0 < len(piece) <= MIB


@pytest.mark.parametrize("exponent", [17, 18, 21])
def test_a_zstd_window_is_bounded(exponent: int) -> None:
    # RFC 8878: no flags, a window of 2 ** (10 + exponent) bytes, one last raw block.
    data = b"window"
    block = (len(data) << 3 | 1).to_bytes(3, "little") + data
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([exponent << 3]) + block
    if 1 << (10 + exponent) <= limits.ZSTD_WINDOW:
        assert unpacked(frame) == data
    else:
        with pytest.raises(Refused, match="damaged"):
            unpacked(frame)


def test_tiny_gzip_members_are_bounded_and_those_of_honest_tools_are_not() -> None:
    # eStargz makes a member of each entry, which has a header of 512 bytes at least.
    assert len(unpacked(gz(bytes(512)) * 5000)) == 5000 * 512
    assert unpacked(gz(b"") * 1000) == b""
    with pytest.raises(Refused, match="too many tiny gzip streams"):
        unpacked(gz(b"") * 1100)
    with pytest.raises(Refused, match="too many tiny gzip streams"):
        unpacked(gz(b"x") * 2000)


# -- on a thread ------------------------------------------------------------------------------


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name in {"ahead", "behind"}]


class Pieces:
    """So many pieces; how many were made, and whether the end was reached."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.made = 0
        self.ended = threading.Event()
        self._count = count
        self._error = error

    def __iter__(self) -> Iterator[int]:
        try:
            while self.made < self._count:
                self.made += 1
                yield self.made
            if self._error:
                raise self._error
        finally:
            self.ended.set()


def test_all_pieces_come_in_order_and_the_thread_ends() -> None:
    with pipeline.ahead(Pieces(1000), Phase.INFLATE) as pieces:
        assert list(pieces) == list(range(1, 1001))
    assert not running()


def test_an_error_there_is_raised_here_after_what_came_before() -> None:
    with pipeline.ahead(Pieces(10, Refused("bad")), Phase.INFLATE) as pieces:
        assert [next(pieces) for _ in range(10)] == list(range(1, 11))
        with pytest.raises(Refused, match="bad"):
            next(pieces)
    assert not running()


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_a_thread_ends_with_the_block(taken: int) -> None:
    source = Pieces(1000)
    with pipeline.ahead(source, Phase.INFLATE) as pieces:
        assert [next(pieces) for _ in range(taken)] == list(range(1, taken + 1))
    assert not running()
    assert source.made < taken + 20


def test_only_a_few_pieces_are_made_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Pieces(1000)

    class Watched(queue.Queue[object]):
        def put(self, item: object, *more: object) -> None:
            if self.full():
                source.ended.set()  # it would wait now
            super().put(item, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(queue, "Queue", Watched)
    with pipeline.ahead(source, Phase.INFLATE):
        assert source.ended.wait(60)
        assert source.made == 5  # four in the queue, one in hand
    assert not running()


def test_what_is_given_is_taken_in_order_and_done_when_the_block_ends() -> None:
    taken: list[int] = []
    with pipeline.behind(taken.append, Phase.HASH) as give:
        for piece in range(1000):
            give(piece)
    assert taken == list(range(1000))
    assert not running()


def test_an_error_of_what_takes_is_raised_when_the_block_ends_and_keeps_nobody_waiting() -> None:
    taken: list[int] = []

    def take(piece: int) -> None:
        taken.append(piece)
        if piece == 3:
            raise Refused("bad")

    def give_all(pieces: Iterable[int], error: Exception | None = None) -> None:
        with pipeline.behind(take, Phase.HASH) as give:
            for piece in pieces:
                give(piece)
            if error:
                raise error

    with pytest.raises(Refused, match="bad"):
        give_all(range(1000))
    assert taken == [0, 1, 2, 3]
    with pytest.raises(KeyError):
        give_all([2, 3], KeyError())  # the block's own comes first
    assert not running()
