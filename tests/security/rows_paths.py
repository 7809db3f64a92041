"""Attacks by names and links: `..`, absolute names, links out of the root, names that are no names."""

from engine.testing.archives import member
from tests.security.harness import (
    UP,
    D,
    F,
    Fails,
    H,
    Input,
    Row,
    S,
    file,
    folder,
    folders_above,
    link,
)

__all__ = ["PATHS"]

REPLACES_ROOT = Fails("would replace the root folder", layer=0)
NO_NAME = Fails("an entry without a name")
ENDS_IN_DOTS = Fails("ends in '..'")
NOT_IN_LAYER = Fails("is no file of the same layer")
BELOW_A_FILE = Fails("which is no folder")
TOO_LONG = Fails("over the 255 bytes")
TOO_LONG_FOR_AUFS = Fails("over the 242 bytes")


def _below(target: str, name: str, extra: dict) -> dict:
    """Return the tree of a file written to an absolute folder of the host, taken from the root."""
    path = f"{target.strip('/')}/{name}"
    return {**folders_above(path), path: file(b"in"), **extra}


PATHS = (
    Row(
        "P-01",
        "'..' in a name stops at the root",
        {
            "up": Input([[F(f"{UP}victim/x", b"in")]], {"victim": folder(), "victim/x": file(b"in")}),
            "up-from-folder": Input([[F("a/../../victim/x")]], {"victim": folder(), "victim/x": file()}),
            "dot-first": Input([[F("./../x")]], {"x": file()}),
            "exactly-up": Input([[F("a/b/../../../x")]], {"x": file()}),
            "over-a-link": Input([[S("l", "/a/b"), F("l/../x")]], {"l": link("/a/b"), "x": file()}),
        },
    ),
    Row(
        "P-02",
        "an absolute name is meant from the root",
        {
            "one": Input([[F("/etc/passwd", b"in")]], {"etc": folder(), "etc/passwd": file(b"in")}),
            "two": Input([[F("//etc/passwd", b"in")]], {"etc": folder(), "etc/passwd": file(b"in")}),
            "three": Input([[F("///x")]], {"x": file()}),
            "victim": Input(
                lambda w: [[F(f"{w.victim}/hello", b"in")]],
                lambda w: _below(str(w.victim), "hello", {}),
            ),
        },
    ),
    Row(
        "P-03",
        "a write through an absolute link of the same layer stays inside",
        {
            "file": Input(
                lambda w: [[S("esc", str(w.victim)), F("esc/pwn", b"in")]],
                lambda w: _below(str(w.victim), "pwn", {"esc": link(str(w.victim))}),
            ),
            "over-what-is-there": Input(
                lambda w: [[S("esc", str(w.victim)), F("esc/hello", b"in")]],
                lambda w: _below(str(w.victim), "hello", {"esc": link(str(w.victim))}),
            ),
            "to-a-file": Input(
                lambda w: [[S("esc", f"{w.victim}/hello"), F("esc", b"in")]], {"esc": file(b"in")}
            ),
            "through-proc": Input(
                [[S("esc", "/proc/self/root/tmp"), F("esc/pwn", b"in")]],
                _below("/proc/self/root/tmp", "pwn", {"esc": link("/proc/self/root/tmp")}),
            ),
            "in-a-circle": Input([[S("a", "b"), S("b", "a"), F("a/x")]], Fails("links in a circle")),
            "to-itself": Input([[S("a", "a/a"), F("a/x")]], Fails("links in a circle")),
        },
    ),
    Row(
        "P-04",
        "a write through a relative link stops at the root too",
        {
            "three-up": Input(
                [[D("a"), S("a/u", "../../.."), F("a/u/victim/x", b"in")]],
                {
                    "a": folder(),
                    "a/u": link("../../.."),
                    "victim": folder(),
                    "victim/x": file(b"in"),
                },
            ),
            "all-the-way": Input(
                [[S("u", UP), F("u/victim/hello", b"in")]],
                {"u": link(UP), "victim": folder(), "victim/hello": file(b"in")},
            ),
        },
    ),
    Row(
        "P-06",
        "a folder that was open is replaced by a link: nothing kept of it may be used",
        {
            "folder-link-folder": Input(
                [
                    [
                        D("foo"),
                        D("foo/tmp"),
                        F("foo/tmp/x", b"1"),
                        S("foo", "/"),
                        F("foo/tmp/x", b"2"),
                        D("foo"),
                        D("foo/tmp"),
                        F("foo/tmp/x", b"3"),
                    ]
                ],
                {
                    "foo": folder(),
                    "foo/tmp": folder(),
                    "foo/tmp/x": file(b"3"),
                    "tmp": folder(),
                    "tmp/x": file(b"2"),
                },
            ),
            "folder-above": Input(
                [[F("a/b/c/x", b"1"), S("a", "other"), F("a/b/c/x", b"2")]],
                {**folders_above("other/b/c/x"), "a": link("other"), "other/b/c/x": file(b"2")},
            ),
            "link-to-another": Input(
                [[D("one"), D("two"), S("l", "one"), F("l/x"), S("l", "two"), F("l/y")]],
                {
                    "one": folder(),
                    "one/x": file(),
                    "two": folder(),
                    "two/y": file(),
                    "l": link("two"),
                },
            ),
            "link-through-itself-to-file": Input(
                [[S("l", "."), F("l/l", b"now a file"), F("l/x")]], BELOW_A_FILE
            ),
            "link-through-itself-to-folder": Input(
                [[S("l", "."), D("l/l"), F("l/x")]], {"l": folder(), "l/x": file()}
            ),
            "link-deep-through-itself": Input(
                [[D("a"), S("a/l", "../a"), F("a/l/l", b"now a file"), F("a/l/x")]], BELOW_A_FILE
            ),
            "folder-to-file": Input([[F("d/x"), F("d", b"file"), F("d/y")]], BELOW_A_FILE),
        },
    ),
    Row(
        "P-07",
        "one layer plants a link, the next writes below it",
        {
            "absolute": Input(
                lambda w: [[S("lib", str(w.victim))], [F("lib/hello", b"in")]],
                {"lib": folder(), "lib/hello": file(b"in")},
            ),
            "relative": Input(
                [[S("lib", f"{UP}victim")], [D("lib"), F("lib/x")]], {"lib": folder(), "lib/x": file()}
            ),
            "file-over-link": Input(
                lambda w: [[S("out", f"{w.victim}/hello")], [F("out", b"in")]], {"out": file(b"in")}
            ),
            "three-layers": Input(
                lambda w: [[S("lib", str(w.victim))], [F("other")], [F("lib/x")]],
                {"lib": folder(), "lib/x": file(), "other": file()},
            ),
        },
    ),
    Row(
        "P-08",
        "the root may only be a folder",
        {
            "link": Input(lambda w: [[S(".", str(w.victim))], [F("pwn")]], REPLACES_ROOT),
            "link-slash-dot": Input(lambda w: [[S("/.", str(w.victim))], [F("pwn")]], REPLACES_ROOT),
            "link-dot-slash": Input(lambda w: [[S("./", str(w.victim))], [F("pwn")]], REPLACES_ROOT),
            "link-up": Input(
                lambda w: [[S("a/../.", str(w.victim))], [F("pwn")]], Fails("ends in '..'", layer=0)
            ),
            "hard-link": Input([[F("x"), H(".", "x")], [F("pwn")]], REPLACES_ROOT),
            "file": Input([[F(".")], [F("pwn")]], REPLACES_ROOT),
            "fifo": Input([[member("./", "6")], [F("pwn")]], REPLACES_ROOT),
            "device": Input([[member("./", "3", device=(1, 3))], [F("pwn")]], REPLACES_ROOT),
            "hard-link-to-it": Input([[H("x", "./")], [F("pwn")]], Fails("no target", layer=0)),
            "folder": Input([[D("."), D("./"), D("/.")], [F("x")]], {"x": file()}),
        },
    ),
    Row(
        "P-09",
        "a name that is empty, or nothing but slashes and dots, names nothing",
        {
            "link": Input([[S("", "/etc")]], NO_NAME),
            "file": Input([[F("")]], NO_NAME),
            "folder": Input([[D("")]], NO_NAME),
            "chain": Input([[S("", "/"), S("", "etc"), F("")]], NO_NAME),
            "slash": Input([[F("/")]], Fails("would replace the root folder")),
            "slashes": Input([[S(".//.", "/etc")]], Fails("would replace the root folder")),
            "empty-target": Input([[S("l", "")]], Fails("empty or overlong target")),
            "empty-hard-link": Input([[F("x"), H("h", "")]], Fails("no target")),
        },
    ),
    Row(
        "P-10",
        "a name that ends in '..' names a folder above, whatever its type says",
        {
            "link": Input([[S("..", "/etc")]], ENDS_IN_DOTS),
            "link-below": Input([[S("a/..", "/etc")]], ENDS_IN_DOTS),
            "file": Input([[F("a/..")]], ENDS_IN_DOTS),
            "folder": Input([[D("a/b/..")]], ENDS_IN_DOTS),
            "dot-after": Input([[F("a/../.")]], ENDS_IN_DOTS),
            "slash-after": Input([[D("a/../")]], ENDS_IN_DOTS),
            "hard-link-target": Input([[F("a/x"), H("h", "a/..")]], Fails("ends in '..'")),
        },
    ),
    Row(
        "P-11",
        "a hard link's target is meant from the root, never from the folder the process is in",
        {
            "plain": Input([[H("out", "hello")]], NOT_IN_LAYER),
            "dotted": Input([[H("out", "./hello")]], NOT_IN_LAYER),
            "in-folder": Input([[D("d"), H("d/out", "hello")]], NOT_IN_LAYER),
            "in-layer": Input(
                [[F("hello", b"in"), H("d/out", "./hello")]],
                {
                    "hello": file(b"in", links=["d/out"]),
                    "d": folder(),
                    "d/out": file(b"in", links=["hello"]),
                },
            ),
        },
    ),
    Row(
        "P-12",
        "a hard link to what is outside finds nothing",
        {
            "sibling": Input([[H("a", f"{UP}rootx/hello")]], NOT_IN_LAYER),
            "victim": Input([[H("a", f"{UP}victim/hello")]], NOT_IN_LAYER),
            "absolute": Input(lambda w: [[H("a", f"{w.victim}/hello")]], NOT_IN_LAYER),
            "from-folder": Input([[H("sub/a", f"../{UP}victim/hello")]], NOT_IN_LAYER),
            "through-link": Input(lambda w: [[S("l", str(w.victim)), H("a", "l/hello")]], NOT_IN_LAYER),
            "through-relative-link": Input([[S("l", f"{UP}victim"), H("a", "l/hello")]], NOT_IN_LAYER),
            "fifo": Input(lambda w: [[H("a", f"{w.top}/fifo")]], NOT_IN_LAYER),
            "folder": Input([[D("d"), H("a", "d")]], NOT_IN_LAYER),
            "same-text-inside": Input(
                [[F("victim/hello", b"in"), H("a", f"{UP}victim/hello")]],
                {
                    "victim": folder(),
                    "victim/hello": file(b"in", links=["a"]),
                    "a": file(b"in", links=["victim/hello"]),
                },
            ),
            "to-itself": Input([[F("a", b"in"), H("a", "a")]], {"a": file(b"in")}),
            "over-its-own-folder": Input([[F("d/x", b"in"), H("d", "d/x")]], {"d": file(b"in")}),
            "overlong": Input([[H("a", "n" * 256)]], TOO_LONG, aufs=TOO_LONG_FOR_AUFS),
            "overlong-folder": Input([[H("a", f"{'n' * 256}/x")]], TOO_LONG, aufs=TOO_LONG_FOR_AUFS),
        },
    ),
    Row(
        "P-13",
        "attributes never go through a link, not even through one that has just become one",
        {
            "link-to-link": Input(
                lambda w: [
                    [S("s", f"{w.victim}/hello"), H("h", "s", mode=0o777, uid=7, mtime=1)],
                ],
                lambda w: {
                    "s": link(f"{w.victim}/hello", ["h"]),
                    "h": link(f"{w.victim}/hello", ["s"]),
                },
            ),
            "folder-over-link": Input(
                lambda w: [[S("d", str(w.victim)), D("d", 0o777, uid=7)]],
                {"d": folder(0o777, (7, 0))},
            ),
            "link-over-folder": Input(
                lambda w: [[D("d", 0o777, uid=7), S("d", str(w.victim))]],
                lambda w: {"d": link(str(w.victim))},
            ),
            "link-over-folder-above": Input(
                lambda w: [[D("a/hello", 0o777, uid=7), S("a", str(w.victim))]],
                lambda w: {"a": link(str(w.victim))},
            ),
            "folder-below-link": Input(
                lambda w: [[S("l", str(w.top)), D("l/victim", 0o700, uid=7)]],
                lambda w: {
                    "l": link(str(w.top)),
                    **folders_above(f"{w.victim}"),
                    str(w.victim).strip("/"): folder(0o700, (7, 0)),
                },
            ),
            "mode-of-link": Input(
                lambda w: [[S("s", f"{w.victim}/hello", mode=0o777)]],
                lambda w: {"s": link(f"{w.victim}/hello")},
            ),
        },
    ),
    Row(
        "P-15",
        "a hard link has no body, so that one can write through no link",
        {
            "through-link": Input(
                lambda w: [[S("s", f"{w.victim}/hello"), member("s", "1", b"5byte", link="s")]],
                Fails("which can have no body"),
            ),
            "plain": Input(
                [[F("x"), member("h", "1", b"5byte", link="x")]], Fails("which can have no body")
            ),
            "by-pax": Input(
                [[F("x"), H("h", "x", pax={b"size": b"5"}) + b"5byte".ljust(512, b"\0")]],
                Fails("which can have no body"),
            ),
        },
    ),
    Row(
        "P-16",
        "a name longer than the kernel takes is refused by us; a path may be longer (tested apart)",
        {
            "name": Input([[F("n" * 256)]], TOO_LONG, aufs=TOO_LONG_FOR_AUFS),
            "folder": Input([[F(f"{'n' * 256}/x")]], TOO_LONG, aufs=TOO_LONG_FOR_AUFS),
            "whiteout": Input([[F(f".wh.{'n' * 256}")]], TOO_LONG, aufs=TOO_LONG_FOR_AUFS),
            "longest": Input([[F("n" * 255)]], {"n" * 255: file()}, aufs=TOO_LONG_FOR_AUFS),
            "longest-of-aufs": Input([[F("n" * 242)]], {"n" * 242: file()}),
            "longest-whiteout": Input([[F("n" * 242), F("x")], [F(f".wh.{'n' * 242}")]], {"x": file()}),
            "by-link": Input([[S("l", "n" * 256), F("l/x")]], TOO_LONG, aufs=TOO_LONG_FOR_AUFS),
            "target": Input([[S("l", "t" * 4096)]], Fails("empty or overlong target")),
        },
    ),
    Row(
        "P-17",
        "a name is made normal once",
        {
            "up-in-the-middle": Input(
                [[F("etc/motd/../etc/shadow", b"in")]],
                {**folders_above("etc/etc/shadow"), "etc/etc/shadow": file(b"in")},
            ),
            "twice": Input([[F("a/....//x")]], {"a": folder(), "a/....": folder(), "a/..../x": file()}),
        },
    ),
    Row(
        "P-23",
        "backslash, colon and drive letters are bytes of a name",
        {
            "drive": Input([[F("C:\\x")]], {"C:\\x": file()}),
            "backslash": Input(
                [[F("..\\..\\x"), F("a\\b/c")]],
                {
                    "..\\..\\x": file(),
                    "a\\b": folder(),
                    "a\\b/c": file(),
                },
            ),
            "mount-option": Input(
                [[F("a:b,c/x")], [F("a:b,c/y")]],
                {"a:b,c": folder(), "a:b,c/x": file(), "a:b,c/y": file()},
            ),
        },
    ),
    Row(
        "P-24",
        "names that a folding file system takes for one are two",
        {
            "case": Input([[F("A", b"1"), F("a", b"2")]], {"A": file(b"1"), "a": file(b"2")}),
            "unicode": Input(
                [[F("\u00e9", b"1"), F("e\u0301", b"2")]], {"\u00e9": file(b"1"), "e\u0301": file(b"2")}
            ),
            "link-by-case": Input(
                lambda w: [[S("A", str(w.victim)), F("a/hello", b"in")]],
                lambda w: {"A": link(str(w.victim)), "a": folder(), "a/hello": file(b"in")},
            ),
        },
    ),
    Row(
        "P-25",
        "a link of a lower layer is no parent: the folder of the upper layer replaces it",
        {
            "implied": Input(
                [[F("usr/bin/old"), S("bin", "usr/bin")], [F("bin/tool")]],
                {
                    "usr": folder(),
                    "usr/bin": folder(),
                    "usr/bin/old": file(),
                    "bin": folder(),
                    "bin/tool": file(),
                },
            ),
            "file-below": Input([[F("bin")], [F("bin/tool")]], {"bin": folder(), "bin/tool": file()}),
            "same-layer": Input(
                [[S("bin", "usr/bin"), F("bin/tool")]],
                {
                    "bin": link("usr/bin"),
                    "usr": folder(),
                    "usr/bin": folder(),
                    "usr/bin/tool": file(),
                },
            ),
        },
    ),
    Row(
        "P-26",
        "a hard link cannot reach into a lower layer",
        {
            "lower": Input([[F("a")], [H("b", "a")]], NOT_IN_LAYER),
            "lower-folder": Input([[F("d/a")], [H("d/b", "d/a")]], NOT_IN_LAYER),
            "later-in-layer": Input([[H("b", "a"), F("a")]], NOT_IN_LAYER),
            "gone-in-layer": Input([[F("d/a"), F("d"), H("b", "d/a")]], NOT_IN_LAYER),
        },
    ),
    Row(
        "P-27",
        "nothing can lie below what is no folder",
        {
            "file": Input([[F("x"), F("x/y")]], BELOW_A_FILE),
            "fifo": Input([[member("x", "6"), F("x/y")]], BELOW_A_FILE),
            "deep": Input([[F("a/x"), F("a/x/y/z")]], BELOW_A_FILE),
            "link-to-file": Input([[F("x"), S("l", "x"), F("l/y")]], BELOW_A_FILE),
            "link-on-through-file": Input([[F("x"), S("l", "x/.."), F("l/y")]], BELOW_A_FILE),
            "whiteout": Input([[F("x"), F("x/.wh.y")]], BELOW_A_FILE),
            "hard-link-target": Input([[F("x"), H("h", "x/y")]], NOT_IN_LAYER),
        },
    ),
    Row(
        "P-29",
        "of entries with one name the last wins, and they are counted",
        {
            "files": Input(
                [[F("f", str(n).encode(), mode=0o600 + n % 64) for n in range(300)]],
                {"f": file(b"299", 0o600 + 299 % 64)},
            ),
            "folder-modes": Input(
                [[D("d", 0o700), F("d/x"), D("d", 0o751)]],
                {
                    "d": folder(0o751),
                    "d/x": file(),
                },
            ),
            "every-type": Input(
                [
                    [
                        F("x", b"1"),
                        D("x"),
                        F("x/y"),
                        S("x", "y"),
                        member("x", "6"),
                        D("x"),
                        member("x", "3", device=(1, 3)),
                        F("x", b"2"),
                    ]
                ],
                {"x": file(b"2")},
            ),
            "linked-before": Input(
                [[F("a", b"1"), H("b", "a"), F("a", b"2")]], {"a": file(b"2"), "b": file(b"1")}
            ),
            "over-the-budget": Input(
                [[F("f")] * 101], Fails("over 100 entries"), limits={"LAYER_ENTRIES": 100}
            ),
            "names": Input(
                [[F("f"), *(H(f"{n}", "f") for n in range(100)), S("f", "x")]],
                Fails("over 150 bytes of names"),
                limits={"LAYER_NAMES": 150},
            ),
        },
    ),
)
