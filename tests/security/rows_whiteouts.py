"""Attacks by whiteouts: markers that name too much, of the wrong type, or in another order."""

from itertools import permutations

from engine.testing.archives import member
from tests.security.harness import (
    D,
    F,
    Fails,
    H,
    Input,
    Row,
    S,
    X,
    file,
    folder,
    link,
    xattr,
)

__all__ = ["WHITEOUTS"]

MEANINGLESS = Fails("not a whiteout that means anything")
NOT_A_FILE = Fails("is not a regular file")
NOT_ON_AUFS = Fails("this backend cannot hold such a folder")
OPAQUE = ".wh..wh..opq"

_BELOW = [F("d/old", b"old"), F("d/sub/old", b"old"), F("keep")]


def _orders() -> list[list[bytes]]:
    """Return two layers: for each order of one folder's entries, a folder of that number."""
    lower, upper = [], []
    for number, order in enumerate(permutations(range(5))):
        at = f"{number}/d"
        lower += [F(f"{at}/old"), F(f"{at}/sub/old"), F(f"{at}/same", b"lower")]
        entries = [
            D(at, 0o750),
            F(f"{at}/{OPAQUE}"),
            F(f"{at}/new"),
            F(f"{at}/sub/new"),
            F(f"{at}/same", b"upper"),
        ]
        upper += [entries[position] for position in order]
    return [lower, upper]


def _in_every_order() -> dict:
    tree: dict = {}
    for number in range(120):
        at = f"{number}/d"
        tree |= {
            f"{number}": folder(),
            at: folder(0o750),
            f"{at}/new": file(),
            f"{at}/sub": folder(),
            f"{at}/sub/new": file(),
            f"{at}/same": file(b"upper"),
        }
    return tree


WHITEOUTS = (
    Row(
        "H-01",
        "a whiteout of '.' would remove the folder it lies in",
        {
            "root": Input([[F("a")], [F(".wh..")]], MEANINGLESS),
            "below": Input([[F("d/a")], [F("d/.wh..")]], MEANINGLESS),
            "folder-of-that-name": Input([[F(".wh../x")]], MEANINGLESS, aufs=MEANINGLESS),
        },
    ),
    Row(
        "H-02",
        "a whiteout of '..' would remove the folder above",
        {
            "root": Input([[F("a")], [F(".wh...")]], MEANINGLESS),
            "below": Input([[F("etc/a")], [F("etc/.wh...")]], MEANINGLESS),
        },
    ),
    Row(
        "H-03",
        "a whiteout of nothing",
        {
            "root": Input([[F("a")], [F(".wh.")]], MEANINGLESS),
            "below": Input([[F("d/a")], [F("d/.wh.")]], MEANINGLESS),
        },
    ),
    Row(
        "H-04",
        "an opaque marker is a regular file; what it holds is passed over",
        {
            "folder": Input([[D(f"d/{OPAQUE}")]], NOT_A_FILE),
            "link": Input([[S(f"d/{OPAQUE}", "/etc")]], NOT_A_FILE),
            "hard-link": Input([[F("x"), H(f"d/{OPAQUE}", "x")]], NOT_A_FILE),
            "device": Input([[member(f"d/{OPAQUE}", "3", device=(1, 3))]], NOT_A_FILE),
            "as-parent": Input([[F(f"d/{OPAQUE}/x")]], MEANINGLESS),
            "with-data": Input(
                [_BELOW, [F(f"d/{OPAQUE}", b"x" * 700), F("d/new")]],
                {"d": folder(), "d/new": file(), "keep": file()},
            ),
            "at-the-root": Input([_BELOW, [F("new"), F(OPAQUE)]], {"new": file()}),
        },
    ),
    Row(
        "H-05",
        "aufs's own names have no effect; others of their kind are refused",
        {
            "aufs-own": Input(
                [
                    [
                        F(".wh..wh.aufs"),
                        D(".wh..wh.plnk", 0o700),
                        F(".wh..wh.plnk/12.34", b"x"),
                        D(".wh..wh.orph", 0o700),
                        F(".wh..wh.orph/x"),
                        F("a"),
                    ]
                ],
                {"a": file()},
            ),
            "markers-within": Input(
                [
                    [F("keep")],
                    [F(".wh..wh.plnk/.wh.keep"), F(f".wh..wh.orph/{OPAQUE}"), F(".wh..wh.aufs/x/y")],
                ],
                {"keep": file()},
            ),
            "not-only-at-the-root": Input([[F("d/.wh..wh.plnk/x"), F("a")]], {"a": file()}),
            "longer-opaque": Input([[F(".wh..wh..opqx")]], MEANINGLESS),
            "unknown": Input([[F("d/.wh..wh.evil")]], MEANINGLESS),
            "unknown-folder": Input([[D("d/.wh..wh.evil")]], MEANINGLESS),
            "unknown-parent": Input([[F(".wh..wh.evil/x")]], MEANINGLESS),
            "hard-link-to-own": Input(
                [[F(".wh..wh.plnk/1", b"x"), H("a", ".wh..wh.plnk/1")]], Fails("hard link")
            ),
        },
    ),
    Row(
        "H-06",
        "a folder whose name looks like a whiteout is a folder, except where markers are names",
        {
            "parent": Input(
                [[F(".wh.etc/somefile", b"in")]],
                {".wh.etc": folder(), ".wh.etc/somefile": file(b"in")},
                aufs=NOT_ON_AUFS,
            ),
            "hides-nothing": Input(
                [[F("etc/keep")], [F(".wh.etc/somefile")]],
                {
                    "etc": folder(),
                    "etc/keep": file(),
                    ".wh.etc": folder(),
                    ".wh.etc/somefile": file(),
                },
                aufs=NOT_ON_AUFS,
            ),
            "by-link": Input(
                [[F("etc/keep")], [S("l", ".wh.etc"), F("l/x")]],
                {
                    "etc": folder(),
                    "etc/keep": file(),
                    "l": link(".wh.etc"),
                    ".wh.etc": folder(),
                    ".wh.etc/x": file(),
                },
                aufs=NOT_ON_AUFS,
            ),
            "entry": Input([[D(".wh.etc")]], NOT_A_FILE),
            "opaque-by-link": Input([[S("l", OPAQUE), F("l/x")]], MEANINGLESS),
            "aufs-own-by-link": Input(
                [[S("l", ".wh..wh.plnk"), F("l/x")]], Fails("a folder of aufs's own")
            ),
        },
    ),
    Row(
        "H-07",
        "a whiteout below a link of a lower layer follows it nowhere",
        {
            "absolute": Input(
                lambda w: [[F("keep"), S("l", str(w.victim))], [F("l/.wh.hello")]],
                {"keep": file(), "l": folder()},
            ),
            "relative": Input(
                [[F("etc/passwd"), S("l", "etc")], [F("l/.wh.passwd")]],
                {"etc": folder(), "etc/passwd": file(), "l": folder()},
            ),
            "opaque": Input(
                lambda w: [[S("l", str(w.victim))], [F(f"l/{OPAQUE}"), F("l/x")]],
                {"l": folder(), "l/x": file()},
            ),
            "same-layer": Input(
                [[F("etc/passwd")], [S("l", "etc"), F("l/.wh.passwd")]],
                {"etc": folder(), "l": link("etc")},
            ),
        },
    ),
    Row(
        "H-08",
        "a whiteout of a link removes the link",
        {
            "absolute": Input(
                lambda w: [[S("l", f"{w.victim}/hello"), F("keep")], [F(".wh.l")]], {"keep": file()}
            ),
            "to-folder": Input([[F("d/x"), S("l", "d")], [F(".wh.l")]], {"d": folder(), "d/x": file()}),
        },
    ),
    Row(
        "H-09",
        "a whiteout hides lower layers only, whichever entry comes first",
        {
            "file-first": Input([[F("a", b"old")], [F("a", b"new"), F(".wh.a")]], {"a": file(b"new")}),
            "whiteout-first": Input(
                [[F("a", b"old")], [F(".wh.a"), F("a", b"new")]], {"a": file(b"new")}
            ),
            "nothing-below": Input([[F("a", b"new"), F(".wh.a")]], {"a": file(b"new")}),
            "folder-first": Input(
                [[F("a/old")], [D("a", 0o700), F("a/new"), F(".wh.a")]],
                {"a": folder(0o700), "a/new": file()},
            ),
            "folder-last": Input(
                [[F("a/old")], [F(".wh.a"), D("a", 0o700), F("a/new")]],
                {"a": folder(0o700), "a/new": file()},
            ),
            "hard-linked": Input(
                [[F("a", b"old")], [F("b", b"new"), F(".wh.a"), H("a", "b")]],
                {"a": file(b"new", links=["b"]), "b": file(b"new", links=["a"])},
            ),
            "replaced-folder": Input(
                # The marker went with the folder that it lay in, whatever inode the next one gets.
                [[F("d/old")], [D("d"), F("d/.wh.old"), F("d"), D("d"), F("d/new")]],
                {"d": folder(), "d/old": file(), "d/new": file()},
            ),
            "replaced-opaque-folder": Input(
                [[F("d/old")], [D("d"), F(f"d/{OPAQUE}"), F("d"), D("d"), F("d/new")]],
                {"d": folder(), "d/old": file(), "d/new": file()},
            ),
        },
    ),
    Row(
        "H-10",
        "an opaque marker hides lower layers only, wherever it comes among its siblings",
        {"every-order": Input(_orders(), _in_every_order())},
    ),
    Row(
        "H-12",
        "a folder removed and made again shows nothing that the old one held; one that the layer only "
        "implies is what it is below, as the rule says",
        {
            "implied": Input(
                [[D("d", 0o1777, uid=5), F("d/old")], [F(".wh.d"), F("d/new")]],
                {"d": folder(0o1777, (5, 0)), "d/new": file()},
            ),
            "implied-first": Input(
                [[D("d", 0o1777, uid=5), F("d/old")], [F("d/new"), F(".wh.d")]],
                {"d": folder(0o1777, (5, 0)), "d/new": file()},
            ),
            "of-its-own": Input(
                [[D("d", 0o1777, uid=5), F("d/old")], [F(".wh.d"), F("d/new"), D("d", 0o700)]],
                {"d": folder(0o700), "d/new": file()},
            ),
            "implied-below": Input(
                [[D("d/e", 0o1777, uid=5), F("d/e/old")], [F(".wh.d"), F("d/e/new")]],
                {"d": folder(), "d/e": folder(0o1777, (5, 0)), "d/e/new": file()},
            ),
            "below-opaque": Input(
                [
                    [D("d", 0o1777), D("d/e", 0o700, uid=5), F("d/e/old")],
                    [F(f"d/{OPAQUE}"), F("d/e/new")],
                ],
                {"d": folder(0o1777), "d/e": folder(0o700, (5, 0)), "d/e/new": file()},
            ),
            "below-opaque-root": Input(
                [[D("d", 0o700, uid=5), F("d/old")], [F(OPAQUE), F("d/new")]],
                {"d": folder(0o700, (5, 0)), "d/new": file()},
            ),
            "implied-kept": Input(
                [[D("d", 0o1777, uid=5), F("d/old")], [F("d/new")]],
                {"d": folder(0o1777, (5, 0)), "d/old": file(), "d/new": file()},
            ),
        },
    ),
    Row(
        "H-13",
        "a device 0:0 is overlay's whiteout",
        {
            "char": Input(
                [[F("x")], [member("x", "3", device=(0, 0))]], Fails("0:0, an overlay whiteout")
            ),
            "block": Input(
                [[member("x", "4", device=(0, 0))]], {"x": ("block", "0:0", 0o644, (0, 0), (), ())}
            ),
        },
    ),
    Row(
        "H-14",
        "overlay's whiteouts by xattr are left out",
        {
            "file": Input([[F("x", b"old")], [X("x", trusted__overlay__whiteout=b"y")]], {"x": file()}),
            "folder": Input(
                [
                    [F("d/old")],
                    [
                        D("d", pax={xattr("trusted.overlay.opaque"): b"x"}),
                        X("d/x", trusted__overlay__whiteout=b""),
                    ],
                ],
                {"d": folder(), "d/old": file(), "d/x": file()},
            ),
            "user": Input(
                [
                    [F("d/old")],
                    [
                        D("d", pax={xattr("user.overlay.opaque"): b"y"}),
                        X("d/x", user__overlay__whiteout=b""),
                    ],
                ],
                {"d": folder(), "d/old": file(), "d/x": file()},
            ),
        },
    ),
    Row(
        "H-15",
        "a whiteout of what is not there hides nothing, and shows nowhere",
        {
            "no-name": Input([[F("a")], [F(".wh.b")]], {"a": file()}),
            "no-folder": Input([[F("a")], [F("d/.wh.b")]], {"a": file(), "d": folder()}),
            "one-layer": Input([[F("a"), F(".wh.b"), F(f"d/{OPAQUE}")]], {"a": file(), "d": folder()}),
            "folder-keeps-mode": Input([[D("d", 0o1777)], [F("d/.wh.b")]], {"d": folder(0o1777)}),
            "twice": Input([[F("a"), F("b")], [F(".wh.b")], [F(".wh.b")]], {"a": file()}),
            "made-again": Input([[F("b", b"1")], [F(".wh.b")], [F("b", b"2")]], {"b": file(b"2")}),
        },
    ),
    Row(
        "H-17",
        "a whiteout's own attributes are ignored",
        {
            "all": Input(
                [
                    [F("a"), F("b")],
                    [
                        F(
                            ".wh.a",
                            b"data",
                            mode=0o6755,
                            uid=7,
                            pax={xattr("user.x"): b"y", xattr("trusted.overlay.opaque"): b"y"},
                        )
                    ],
                ],
                {"b": file()},
            ),
            "hard-link": Input([[F("a"), F("b")], [F(".wh.a"), H(".wh.b", ".wh.a")]], {}),
            "wrong-type": Input([[F("a")], [S(".wh.a", "/etc")]], NOT_A_FILE),
            "folder": Input([[F("a")], [D(".wh.a")]], NOT_A_FILE),
        },
    ),
    Row(
        "H-18",
        "a whiteout's name is made normal like any other",
        {
            "dot": Input([[F("x"), F("y")], [F("./.wh.x")]], {"y": file()}),
            "slashes": Input([[F("x"), F("y")], [F("//.wh.x")]], {"y": file()}),
            "up": Input([[F("x"), F("y")], [F("../../.wh.x")]], {"y": file()}),
            "dev-and-proc": Input(
                [[F("dev/null"), F("proc/1"), F("y")], [F(".wh.dev"), F(".wh.proc")]], {"y": file()}
            ),
        },
    ),
)
