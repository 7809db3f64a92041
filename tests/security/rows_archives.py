"""Attacks by the archive's bytes: what one reader takes for one tree and another for another."""

from engine.testing.archives import (
    END,
    SPARSE_FORMS,
    archive,
    extended,
    member,
    pax_record,
    sparse_member,
)
from tests.security.harness import (
    D,
    F,
    Fails,
    H,
    Input,
    Row,
    S,
    file,
    folder,
    link,
    xattr,
)

__all__ = ["ARCHIVES"]

_BAD_RECORD = Fails("malformed pax record")
_BAD_SIZE = Fails("malformed size")
_SIZE_RANGE = Fails("size out of range")
_UNKNOWN = Fails("unknown type")
_CUT_OFF = Fails("cut off")

_INNER = archive(F("smuggled", b"x"), S("link", "/etc"))
_WHOLE = archive(F("a", b"x" * 700), F("b", b"y"))


def _pax(body: bytes) -> bytes:
    """Return a pax header with exactly this body."""
    return member("pax", "x", body)


def _size_field(field: bytes, body: bytes = b"") -> list[list[bytes]]:
    return [[F("f", fields={124: field}) + body.ljust(-(-len(body) // 512) * 512, b"\0"), F("g")]]


def _chain(kind: str, count: int) -> bytes:
    body = pax_record(b"comment", b"x") if kind in "xg" else b"name\0"
    return member("ext", kind, body) * count


def _signed_checksum() -> bytes:
    """Return a file whose header was summed up as signed bytes, as some old writers did."""
    header = bytearray(F(b"\xff\xfe"))
    blanked = header[:148] + b" " * 8 + header[156:512]
    header[148:156] = b"%06o\0 " % sum(byte - 256 if byte > 127 else byte for byte in blanked)
    return bytes(header)


def _broken_checksum(header: bytes) -> bytes:
    return header[:148] + b"000001\0 " + header[156:]


_NO_PARTS = {b"GNU.sparse.map": b"0,0", b"GNU.sparse.numblocks": b"1"}
_LARGE = Fails("over 17592186040320 bytes large")
_HOLES = [
    (0, b"begin"),
    (5000, b"x" * 700),
    *((10_000 * n, b"%d" % n) for n in range(1, 60)),
    (2**20, b""),
]
_FILLED = b"".join(
    bytes(offset - (_HOLES[n - 1][0] + len(_HOLES[n - 1][1]) if n else 0)) + data
    for n, (offset, data) in enumerate(_HOLES)
)


def _sparse(form: str, size: int, *parts: tuple[int, bytes]) -> list[list[bytes]]:
    return [[sparse_member(form, b"f", size, parts), F("last")]]


ARCHIVES = (
    Row(
        "T-01",
        "a size in pax is the size, for the body and for where the next header is",
        {
            "inner-archive": Input(
                [[F("f", pax={b"size": b"%d" % len(_INNER)}) + _INNER, F("last")]],
                {"f": file(_INNER), "last": file()},
            ),
            "smaller": Input(
                # The header says 1024 bytes, pax 512: what follows is an entry of its own.
                [[_pax(pax_record(b"size", b"512")), F("f", bytes(512) + D("inner")), F("last")]],
                {"f": file(bytes(512)), "inner": folder(), "last": file()},
            ),
            "zero": Input(
                [[_pax(pax_record(b"size", b"0")), F("f", D("inner"))]],
                {"f": file(), "inner": folder()},
            ),
            "global": Input(
                # A global size applies to nothing.
                [[extended({b"size": b"0"}, "g"), F("f", b"data"), F("last")]],
                {"f": file(b"data"), "last": file()},
            ),
        },
    ),
    Row(
        "T-03",
        "a malformed pax record is an error, not skipped",
        {
            "too-long": Input([[_pax(b"99 path=x\n"), F("f")]], _BAD_RECORD),
            "too-short": Input([[_pax(b"5 path=x\n"), F("f")]], _BAD_RECORD),
            "no-equals": Input([[_pax(b"9 pathxx\n"), F("f")]], _BAD_RECORD),
            "no-newline": Input([[_pax(b"10 path=xx"), F("f")]], _BAD_RECORD),
            "length-0": Input([[_pax(b"0 path=x\n"), F("f")]], _BAD_RECORD),
            "leading-0": Input([[_pax(b"010 path=x\n"), F("f")]], _BAD_RECORD),
            "no-digits": Input([[_pax(b"ab path=x\n"), F("f")]], _BAD_RECORD),
            "minus": Input([[_pax(b"-9 path=x\n"), F("f")]], _BAD_RECORD),
            "plus": Input([[_pax(b"+10 path=x\n"), F("f")]], _BAD_RECORD),
            "no-length": Input([[_pax(b" path=x\n"), F("f")]], _BAD_RECORD),
            "no-space": Input([[_pax(b"9path=xx\n"), F("f")]], _BAD_RECORD),
            "empty-key": Input([[_pax(b"5 =x\n"), F("f")]], _BAD_RECORD),
            "huge-length": Input([[_pax(b"9" * 30 + b" path=x\n"), F("f")]], _BAD_RECORD),
            "bytes-after": Input([[_pax(pax_record(b"path", b"x") + b"\0\0"), F("f")]], _BAD_RECORD),
            "global": Input([[member("pax", "g", b"0 path=x\n"), F("f")]], _BAD_RECORD),
        },
    ),
    Row(
        "T-04",
        "an extension header is bounded before it is read",
        {
            **{
                f"{kind}-of-a-gigabyte": Input(
                    [[member("ext", kind, fields={124: b"10000000000\0"}), F("f")]],
                    Fails("extension header over"),
                )
                for kind in "xgLK"
            },
            "just-over": Input(
                [[member("ext", "L", b"n" * 2049), F("f")]],
                Fails("over 2048 bytes"),
                limits={"EXTENSION": 2048},
            ),
            "just-within": Input(
                [[_pax(pax_record(b"comment", b"c" * 2034)), F("f")]],
                {"f": file()},
                limits={"EXTENSION": 2048},
            ),
        },
    ),
    Row(
        "T-05",
        "a sparse file is read in each of GNU's forms, and its map strictly (more in test_sparse)",
        {
            **{
                form: Input(_sparse(form, 2**20, *_HOLES), {"f": file(_FILLED), "last": file()})
                for form in SPARSE_FORMS
            },
            "a-hole-at-the-end": Input(
                _sparse("1.0", 9000, *_HOLES[:2]),
                {"f": file(_FILLED[:5700] + bytes(3300)), "last": file()},
            ),
            "overlap": Input(
                _sparse("S", 2**20, (0, b"abc"), (2, b"d")), Fails("parts that overlap or end beyond it")
            ),
            "global": Input([[extended({b"GNU.sparse.major": b"1"}, "g"), F("f")]], {"f": file()}),
            "a-name-that-leads-out": Input(
                [[F("f", pax={**_NO_PARTS, b"GNU.sparse.name": b"../.."})]], Fails("ends in '..'")
            ),
        },
    ),
    Row(
        "T-06",
        "no file becomes larger than may be, whatever its holes; blocks count where bytes are scattered",
        {
            "realsize": Input(
                [[F("f", pax={**_NO_PARTS, b"GNU.sparse.size": b"%d" % (2**63 - 1)})]], _LARGE
            ),
            "just-over": Input(
                _sparse("1.0", 50_001), Fails("over 50000 bytes large"), limits={"FILE": 50_000}
            ),
            "scattered": Input(
                # A byte takes a block: 40 KB of an archive would take 40 MB.
                _sparse("1.0", 2**30, *((n * 4096, b"x") for n in range(200))),
                Fails("sparse files that take over 700000 bytes"),
                limits={"LAYER": 700_000},
            ),
            "no-data": Input([[F("f", pax={b"size": b"%d" % (2**63 - 1)})]], _LARGE),
        },
    ),
    Row(
        "T-07",
        "no number that counts bytes is negative",
        {
            "base-256": Input(_size_field(b"\xff" * 12), _SIZE_RANGE),
            "least": Input(_size_field(b"\xff" + bytes(11)), _SIZE_RANGE),
            "minus": Input(_size_field(b"-0000000001\0"), _BAD_SIZE),
            "pax": Input([[F("f", pax={b"size": b"-1"})]], Fails("malformed pax size")),
            "extension": Input([[member("ext", "L", fields={124: b"\xff" * 12}), F("f")]], _SIZE_RANGE),
            "time": Input([[F("f", fields={136: b"\xff" * 12})]], {"f": file()}),
        },
    ),
    Row(
        "T-08",
        "a size is octal digits, or base 256, and nothing else",
        {
            "blank": Input(_size_field(b" " * 12), {"f": file(), "g": file()}),
            "nul": Input(_size_field(bytes(12)), {"f": file(), "g": file()}),
            "spaces-around": Input(
                _size_field(b"    5 \0     ", b"12345"), {"f": file(b"12345"), "g": file()}
            ),
            "not-octal": Input(_size_field(b"00000000008\0"), _BAD_SIZE),
            "hexadecimal": Input(_size_field(b"0x1\0\0\0\0\0\0\0\0\0"), _BAD_SIZE),
            "plus": Input(_size_field(b"+0000000001\0"), _BAD_SIZE),
            "underscore": Input(_size_field(b"0_000000001\0"), _BAD_SIZE),
            "after-nul": Input(_size_field(b"1\x002\0\0\0\0\0\0\0\0\0"), _BAD_SIZE),
            "letters-after": Input(_size_field(b"1x\0\0\0\0\0\0\0\0\0\0"), _BAD_SIZE),
            "largest": Input(_size_field(b"\x80\0\0\0\x7f" + b"\xff" * 7), _LARGE),
            "over-the-largest": Input(_size_field(b"\x80\0\0\0" + b"\xff" * 8), _SIZE_RANGE),
            "96-bit": Input(_size_field(b"\xbf" + b"\xff" * 11), _SIZE_RANGE),
            "base-256": Input(
                _size_field(b"\x80" + bytes(10) + b"\5", b"12345"), {"f": file(b"12345"), "g": file()}
            ),
            "pax-plus": Input([[F("f", pax={b"size": b"+1"})]], Fails("malformed pax size")),
            "pax-long": Input([[F("f", pax={b"size": b"0" * 20})]], Fails("malformed pax size")),
        },
    ),
    Row(
        "T-09",
        "headers have right checksums, and the archive ends once",
        {
            "wrong": Input([[F("a"), _broken_checksum(F("b")), F("c")]], Fails("wrong checksum")),
            "not-a-number": Input(
                [[F("a")[:148] + b"zzzzzz\0 " + F("a")[156:]]], Fails("malformed checksum")
            ),
            "signed": Input([[_signed_checksum()]], {b"\xff\xfe": file()}),
            "one-zero-block": Input([[F("a"), bytes(512), F("b")]], Fails("after a single zero block")),
            "garbage": Input([[F("a"), b"garbage!" * 64]], Fails("checksum")),
        },
    ),
    Row(
        "T-10",
        "what is cut off is refused, except between two entries, or in the padding that leads to them",
        {
            "first-header": Input([_WHOLE[:300]], _CUT_OFF),
            "body": Input([_WHOLE[:900]], _CUT_OFF),
            "body-at-a-block": Input([_WHOLE[:1024]], _CUT_OFF),
            "padding": Input([_WHOLE[:1400]], {"a": file(b"x" * 700)}),
            "second-header": Input([_WHOLE[:1700]], _CUT_OFF),
            "between": Input([_WHOLE[:1536]], {"a": file(b"x" * 700)}),
            "no-end": Input([_WHOLE[: -len(END)]], {"a": file(b"x" * 700), "b": file(b"y")}),
            "half-an-end": Input([_WHOLE[:-512]], {"a": file(b"x" * 700), "b": file(b"y")}),
            "end-not-whole": Input([_WHOLE[:-100]], _CUT_OFF),
            "extension": Input([member("pax", "x", pax_record(b"path", b"x" * 600))[:900]], _CUT_OFF),
            "nothing": Input([b""], {}),
        },
    ),
    Row(
        "T-11",
        "bytes after the end count for the digest, are bounded, and are never applied",
        {
            "archive": Input(
                [_WHOLE + archive(F("smuggled"))],
                {
                    "a": file(b"x" * 700),
                    "b": file(b"y"),
                },
            ),
            "garbage": Input([archive(F("a")) + b"garbage"], {"a": file()}),
            "zeros": Input([archive(F("a")) + bytes(9000)], {"a": file()}),
            "too-many": Input(
                [archive(F("a")) + bytes(9000)],
                Fails("over 4096 bytes after its end"),
                limits={"AFTER_END": 4096},
            ),
        },
    ),
    Row(
        "T-12",
        "a NUL ends a name in a header, and is an error in pax",
        {
            "header": Input([[F(b"a\0b")]], {"a": file()}),
            "header-link": Input([[S("l", b"a\0b")]], {"l": link("a")}),
            "gnu-name": Input([[member("ext", "L", b"a\0b"), F("f")]], {"a": file()}),
            "pax-path": Input([[F("f", pax={b"path": b"a\0b"})]], Fails("a NUL")),
            "pax-link": Input([[S("l", "x", pax={b"linkpath": b"a\0b"})]], Fails("a NUL")),
            "pax-key": Input([[F("f", pax={b"pa\0th": b"x"})]], Fails("a NUL")),
            "begins-with-it": Input([[F(b"\0a")]], Fails("without a name")),
        },
    ),
    Row(
        "T-13",
        "names are bytes from end to end",
        {
            name: Input(
                [[F(raw, b"header"), F("x", b"pax", pax={b"path": b"p" + raw}), S("l", raw)]],
                {
                    raw: file(b"header"),
                    b"p" + raw: file(b"pax"),
                    "l": ("link", repr(raw), 0o777, (0, 0), (), ()),
                },
            )
            for name, raw in {
                "latin-1": b"caf\xe9",
                "lone-ff": b"\xff",
                "overlong": b"\xc0\xae\xc0\xaf",
                "surrogate": b"\xed\xa0\x80",
                "newline": b"a\nb",
                "escape": b"\x1b[2J",
                "right-to-left": "a\u202egpj.exe".encode(),
            }.items()
        }
        | {
            "binary-charset": Input(
                [[F("x", pax={b"hdrcharset": b"BINARY", b"path": b"\xff"})]], {b"\xff": file()}
            ),
            "escaped-in-errors": Input(
                [[F(b"\x1b[2J\nx/..")]], Fails(r"\\\\x1b\[2J\\\\nx/\.\.|\\x1b\[2J\\nx/\.\.")
            ),
        },
    ),
    Row(
        "T-15",
        "types that are known are few; an unknown one is an error",
        {
            "contiguous": Input([[member("f", "7", b"in")]], {"f": file(b"in")}),
            "before-posix": Input([[member("f", "\0", b"in")]], {"f": file(b"in")}),
            "folder-before-posix": Input([[member("d/", "\0", mode=0o755)]], {"d": folder()}),
            "folder-with-body": Input(
                [[member("d/", "\0", F("smuggled"))]], Fails("which can have no body")
            ),
            "file-with-slash": Input([[F("f/", b"in")]], {"f": file(b"in")}),
            "label": Input([[member("label", "V", b"x" * 600), F("f")]], {"f": file()}),
            **{
                f"type-{kind.encode().hex()}": Input([[member("f", kind, b"x" * 600), F("g")]], _UNKNOWN)
                for kind in ("M", "D", "X", "A", "E", "Z", "8", "9", "!", " ", "\x7f")
            },
        },
    ),
    Row(
        "T-16",
        "GNU's list of renames is refused",
        {"names": Input([[member("n", "N", b"Rename a to /etc/b\n"), F("a")]], _UNKNOWN)},
    ),
    Row(
        "T-17",
        "extension headers come before an entry, and not without end",
        {
            **{
                f"{name}-in-a-row": Input([[_chain(kind, 16), F("f")]], Fails("16 extension headers"))
                for name, kind in {"pax": "x", "global": "g", "name": "L", "target": "K"}.items()
            },
            "labels-in-a-row": Input([[member("v", "V") * 16, F("f")]], Fails("16 extension headers")),
            "few": Input([[_chain("x", 3), _chain("g", 3), F("f")]], {"f": file()}),
            "pax-at-the-end": Input([[F("f"), _chain("x", 1)]], Fails("ends after an extension header")),
            "empty-pax-at-the-end": Input(
                [[F("f"), _pax(b"")]], Fails("ends after an extension header")
            ),
            "name-at-the-end": Input([[F("f"), _chain("L", 1)]], Fails("ends after an extension")),
            "empty-name-at-the-end": Input(
                [[F("f"), member("ext", "L", b"\0")]], Fails("ends after an extension")
            ),
            "target-at-the-end": Input([[F("f"), _chain("K", 1)]], Fails("ends after an extension")),
            "cut-off-after": Input([F("f") + _chain("x", 1)], Fails("ends after an extension")),
        },
    ),
    Row(
        "T-18",
        "where extensions disagree, pax wins over GNU and the last over the first, as in Go",
        {
            "name": Input(
                [[member("ext", "L", b"gnu\0"), F("header", pax={b"path": b"pax"})]], {"pax": file()}
            ),
            "name-after": Input(
                [[_pax(pax_record(b"path", b"pax")), member("ext", "L", b"gnu\0"), F("header")]],
                {"pax": file()},
            ),
            "target": Input(
                [[member("ext", "K", b"gnu\0"), S("l", "header", pax={b"linkpath": b"pax"})]],
                {"l": link("pax")},
            ),
            "twice-in-one": Input(
                [[_pax(pax_record(b"path", b"1") + pax_record(b"path", b"2")), F("f")]], {"2": file()}
            ),
            "twice": Input(
                [[_pax(pax_record(b"path", b"1")), _pax(pax_record(b"path", b"2")), F("f")]],
                {"2": file()},
            ),
            "taken-back": Input([[F("f", pax={b"path": b""})]], {"f": file()}),
            "global": Input([[extended({b"path": b"g"}, "g"), F("f")]], {"f": file()}),
            "for-one-entry": Input([[F("f", pax={b"path": b"1"}), F("g")]], {"1": file(), "g": file()}),
            "checked-once-settled": Input(
                [[F("harmless", pax={b"path": b"../.."})]], Fails("ends in '..'")
            ),
            "link-for-hard-link": Input(
                [[F("f"), H("h", "f", pax={b"linkpath": b"../../victim/hello"})]],
                Fails("no file of the same layer"),
            ),
            "xattr-twice": Input(
                [[_pax(pax_record(xattr("user.x"), b"1") + pax_record(xattr("user.x"), b"2")), F("f")]],
                {"f": file(user__x=b"2")},
            ),
        },
    ),
    Row(
        "T-20",
        "entries, folders, depth and the bytes of their names are bounded",
        {
            "entries": Input(
                [[F(f"{n}") for n in range(51)]], Fails("over 50 entries"), limits={"LAYER_ENTRIES": 50}
            ),
            "whiteouts": Input(
                [[F(f".wh.{n}") for n in range(51)]],
                Fails("over 50 entries"),
                limits={"LAYER_ENTRIES": 50},
            ),
            "folders": Input(
                [[D(f"{n}") for n in range(21)]],
                Fails("over 20 folders"),
                limits={"LAYER_DIRECTORIES": 20},
            ),
            "implied-folders": Input(
                [[F("a/" * 21 + "f")]], Fails("over 20 folders"), limits={"LAYER_DIRECTORIES": 20}
            ),
            "depth": Input([[D("d/" * 513)]], Fails("over 512 folders deep")),
            "deepest": Input(
                [[D("d/" * 512)]], {"/".join("d" * end): folder() for end in range(1, 513)}
            ),
            "depth-by-links": Input(
                [[S("l", "d/" * 30), S("l/l", "d/" * 30), F("l/l/f")]],
                Fails("over 50 folders deep"),
                limits={"PATH_DEPTH": 50},
            ),
            "steps-by-links": Input(
                # Each entry alone is within its bound.
                [[D("d"), S("l", "d/../" * 20 + "d"), *(F(f"{n}/x") for n in ("l", "m", "l") * 4)]],
                Fails("links of over 100 steps, all together"),
                limits={"LAYER_LINK_STEPS": 100},
            ),
            "a-link-replaced-and-followed": Input(
                [[D("a"), D("b"), *(e for n in range(50) for e in (S("l", "ab"[n % 2]), F("l/x")))]],
                {"a": folder(), "b": folder(), "a/x": file(), "b/x": file(), "l": link("b")},
            ),
            "whiteouts-deep-in-many-layers": Input(
                [
                    [F("d/" * 40 + "f")],
                    *([F(f"{'d/' * 40}.wh.{n}") for n in range(20)] for _ in range(20)),
                    [F("d/" * 40 + ".wh.f")],
                ],
                {"/".join("d" * end): folder() for end in range(1, 41)},
            ),
            "names": Input(
                [[F("n" * 200), F("m" * 200)]],
                Fails("over 300 bytes of names"),
                limits={"LAYER_NAMES": 300},
            ),
            "names-of-implied-folders": Input(
                # Each counts with its own name: the tree holds no paths.
                [[F("a/" * 30 + "f")]],
                Fails("over 30 bytes of names"),
                limits={"LAYER_NAMES": 30},
            ),
            "names-of-whiteouts-by-a-link": Input(
                [[S("l", "a/" * 10), *(F(f"l/.wh.{n}") for n in range(50))]],
                Fails("over 100 bytes of names"),
                limits={"LAYER_NAMES": 100},
            ),
        },
    ),
)
