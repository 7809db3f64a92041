"""Tables at any width: what identifies a row is whole, what matters least goes first."""

import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.cells import cell_len

from engine.cli import output
from engine.cli.output import View, age, document, documents, human_bytes
from engine.cli.table import SCREENFUL, Column, Fault, render
from engine.errors import DataLoss
from engine.kv.schema import now
from engine.root import Root
from engine.times import rfc3339
from tests.cli.test_commands import CHAIN
from tests.command import LAMINA, environment, lamina, lamina_json

NAME = "quay.io/prometheus/node-exporter:v1.8.0"
COLUMNS = (
    Column("NAME"),
    Column("DIGEST", goes=4),
    Column("SIZE", goes=3, right=True),
    Column("WHY", goes=2, least=8),
    Column("AGE", goes=1),
)
ROWS = [(NAME, "0123456789ab", "1.5 kB", "a long reason, which few read", "3 min ago"), ("b", *"2345")]


def test_all_is_shown_where_there_is_room():
    for width in (200, None):
        header, first, second = render(COLUMNS, ROWS, width=width)
        assert header.split() == [column.title for column in COLUMNS]
        assert all(cell in first for cell in ROWS[0])
        assert second.split() == ["b", *"2345"]


def test_columns_give_way_by_importance():
    shown = {}
    for width in range(20, 120):
        header, *lines = render(COLUMNS, ROWS, width=width)
        shown[width] = header.split()
        assert all(line.startswith(row[0]) for line, row in zip(lines, ROWS, strict=True))
        if width >= len(NAME):
            assert max(map(cell_len, lines)) <= width
    assert shown[40] == ["NAME"]
    assert shown[55] == ["NAME", "DIGEST"]
    assert shown[62] == ["NAME", "DIGEST", "SIZE"]
    assert shown[80] == ["NAME", "DIGEST", "SIZE", "WHY"]
    for narrow in range(20, 119):
        assert set(shown[narrow]) <= set(shown[narrow + 1]), narrow


def test_a_shortened_cell_says_so():
    _, line, _ = render(COLUMNS, ROWS, width=80)
    assert cell_len(line) == 80
    assert line.endswith("…")


def test_wide_characters_count_as_what_they_take_up():
    rows = [("名前", "x"), ("name", "y")]
    _, *lines = render((Column("N"), Column("WHY", goes=1)), rows, width=None)
    assert [line.index(cell) for line, (_, cell) in zip(lines, rows, strict=True)] == [4, 6]
    _, line, *_ = render((Column("N"), Column("WHY", goes=1, least=3)), [("n", "名前名前")], width=8)
    assert cell_len(line) <= 8


def test_numbers_stand_below_each_other():
    _, *lines = render(
        (Column("N"), Column("SIZE", goes=1, right=True)), [("a", "1"), ("b", "123456")], width=40
    )
    assert lines == ["a       1", "b  123456"]


def test_a_fault_is_a_row_that_is_never_cut():
    error = "a record of images cannot be read: " + "x" * 200
    *_, fault = render(COLUMNS, ROWS, [Fault("bad:1", error)], width=40)
    assert fault.split(maxsplit=1) == ["bad:1", error]
    assert list(render(COLUMNS, [], [Fault("bad:1", "lost")], width=40))[1:] == ["bad:1  lost"]


def test_a_fault_stands_below_the_names():
    _, line, fault = render(
        (Column("N"), Column("WHY")), [("long-name", "x")], [Fault("bad", "lost")], width=40
    )
    assert line.index("x") == fault.index("lost")


def test_a_cell_is_shortened_to_its_least_and_no_further():
    columns = (Column("N"), Column("WHY", goes=1, least=5))
    for width, shown in ((11, "name  0123…"), (10, "name")):
        _, line = render(columns, [("name", "0123456789")], width=width)
        assert line == shown


def test_a_wider_row_after_the_first_screenful_widens_its_column_where_there_is_room():
    columns = (Column("N"), Column("WHY", goes=1), Column("AGE", goes=2))
    rows = [("n", "why", "1 s")] * SCREENFUL + [("n", "reasons", "1 s"), ("name", "reasons why", "1 s")]
    *_, first, second = render(columns, [*rows, ("n", "why", "1 s")], width=None)
    assert (first, second) == ("name  reasons why  1 s", "n     why          1 s")
    *_, early, late = render(columns, rows, width=18)
    assert (early, late) == ("n  reasons  1 s", "name  reason…  1 s")


def test_a_long_table_is_written_as_its_rows_come(capsys: pytest.CaptureFixture[str]):
    faults: list[Fault] = []

    def rows() -> Iterator[tuple[str]]:
        for number in range(SCREENFUL):
            yield (str(number),)
        faults.append(Fault("late", "lost"))  # is asked for after the rows
        # Whoever asks for one more row has written all before.
        assert capsys.readouterr().out.split() == ["N", *map(str, range(SCREENFUL))]
        yield ("last",)

    View().table((Column("N"),), rows(), faults, none="none")
    assert capsys.readouterr().out.split() == ["last", "late", "lost"]


def test_a_table_of_nothing_says_so(capsys: pytest.CaptureFixture[str]):
    View().table((Column("N"),), iter(()), none="nothing here")
    assert capsys.readouterr() == ("", "nothing here\n")
    View().table((Column("N"),), iter(()), [Fault("bad", "lost")], none="nothing here")
    assert capsys.readouterr() == ("bad  lost\n", "")


@pytest.mark.parametrize("values", [[], [{}], [{"a": "\u202e", "b": [1, {"c": None}]}, {"a": "\n"}, []]])
def test_a_list_is_one_document_whether_or_not_it_fits_into_memory(
    values: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    document(values)
    whole = capsys.readouterr().out
    for in_memory in (1 << 20, 1):
        monkeypatch.setattr(output, "_IN_MEMORY", in_memory)
        documents(iter(values))
        assert capsys.readouterr().out == whole


def test_nothing_of_a_list_is_written_that_cannot_be_told_whole(capsys: pytest.CaptureFixture[str]):
    def values() -> Iterator[int]:
        yield 1
        raise DataLoss("lost")

    with pytest.raises(DataLoss):
        documents(values())
    assert not capsys.readouterr().out


def test_what_an_image_wrote_cannot_write_to_the_terminal():
    _, line = render((Column("N"),), [("a\x1b[31m\n\u202eb" + "x" * 5000,)], [], width=None)
    assert "\x1b" not in line
    assert "\u202e" not in line
    assert len(line) <= 1000


# -- as a whole -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory, image: Path) -> Path:
    root = tmp_path_factory.mktemp("listed") / "root"
    lamina(root, "import", "--snapshotter", "overlay", "--name", NAME, image)
    lamina(root, "import", "--no-unpack", "--name", "a:1", image)
    with Root(root) as opened:
        assert opened.meta
    return root


LISTINGS = (
    "images",
    "image inspect a:1",
    "content ls",
    "snapshots ls",
    "snapshots tree",
    "snapshots usage",
)


@pytest.mark.root
@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("words", LISTINGS)
def test_what_is_listed_can_be_typed_back(
    listed: Path, words: str, width: int, monkeypatch: pytest.MonkeyPatch
):
    """Every short digest on the screen is taken by the command that it is for."""
    monkeypatch.setattr(View, "width", width)
    text = lamina(listed, *words.split()).stdout
    shown = {word for word in text.split() if len(word) == 12 and not word.strip("0123456789abcdef")}
    blobs = {row["digest"] for row in lamina_json(listed, "content", "ls")}
    meant = {
        name
        for digits in shown
        for name in (*blobs, *CHAIN)
        if name.removeprefix("sha256:").startswith(digits)
    }
    if words == "images":
        assert {line.split()[0] for line in text.splitlines()} == {"NAME", NAME, "a:1"}
        if width >= 80:
            assert len(shown) == 1
            lamina(listed, "image", "inspect", *shown)
    elif words == "content ls":
        assert meant == blobs
        lamina(listed, "content", "verify", *shown)
    elif words.startswith("snapshots"):
        assert meant == set(CHAIN)
        lamina(listed, "snapshots", "usage", *shown)
    else:
        assert len(meant) == 4
    lines = text.splitlines()
    if words != "image inspect a:1":  # values there are whole, and go on in the next line
        assert max(map(len, lines)) <= max(width, len(NAME))


@pytest.mark.root
def test_nothing_is_cut_where_nobody_looks(listed: Path):
    assert all(chain in lamina(listed, "snapshots", "ls").stdout for chain in CHAIN)
    header, *_ = lamina(listed, "images").stdout.splitlines()
    assert len(header.split()) == 7


class _Screen(StringIO):
    def isatty(self) -> bool:
        return True


def test_the_width_is_that_of_a_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert View().width is None
    monkeypatch.setattr("sys.stdout", _Screen())
    assert (View().width, View(no_trunc=True).width) == (40, None)
    assert View().shortener([NAME, *CHAIN])(CHAIN[0]) == CHAIN[0][7:19]
    assert View(no_trunc=True).shortener(CHAIN)(CHAIN[0]) == CHAIN[0]


def _on_a_terminal(width: int, command: list[str], variables: dict[str, str]) -> str:
    pid, terminal = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
        os.execvpe(command[0], command, variables)
    text = b""
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the terminal's other side is closed
            break
        text += piece
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, text
    return text.decode().replace("\r\n", "\n").replace("\x1b[1m", "").replace("\x1b[0m", "")


@pytest.mark.root
@pytest.mark.parametrize("by", ["size", "variable"])
def test_a_real_terminal(listed: Path, by: str):
    clean = {key: value for key, value in environment().items() if key not in {"COLUMNS", "LINES"}}
    variables = clean | ({"COLUMNS": "60"} if by == "variable" else {})
    command = [*LAMINA, "--root", str(listed), "images"]
    text = _on_a_terminal(60 if by == "size" else 200, command, variables)
    header, *lines = text.splitlines()
    assert header.split() == ["NAME", "DIGEST"]
    (digest,) = {row["digest"] for row in lamina_json(listed, "images")}
    assert [line.split() for line in lines] == [["a:1", digest[7:19]], [NAME, digest[7:19]]]


# -- units ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_940, "999.9 kB"), (999_960, "1.0 MB")],
)
def test_sizes(count: int, text: str):
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.9, "59 s"), (3599, "59 min"), (3601, "1 h"), (172_900, "2 d")]
)
def test_ages(seconds: float, text: str):
    assert age(now() - int(seconds * 1e9)) == f"{text} ago"


def test_times_are_rfc_3339():
    assert rfc3339(1_704_164_645_000_000_042) == "2024-01-02T03:04:05.000000042Z"
