"""The conformance suite of snapshotters: what every backend must do, as methods named `check_*`.

Sync; needs root, as mounts do. Free of any test framework: failures are AssertionError. The author of
a backend runs every check (`SnapshotterSuite.names()`) on a fresh instance:

    suite = SnapshotterSuite(make, folder)   # make() returns a backend on an empty root
    for name in suite.names():
        suite.run(name)
"""

import os
import stat

from engine.diff.apply import apply_layer
from engine.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from engine.mount import mounted
from engine.oci.digest import digest_of
from engine.snapshots import Commit, Kind
from engine.testing.archives import archive, member
from engine.testing.suite_pieces import SuitePieces, raises

__all__ = ["SnapshotterSuite"]

_MANY = 40  # layers of one chain: over a page of mount options for any backend with long paths


class SnapshotterSuite(SuitePieces):
    """Runs checks, each on a backend of its own that `make` returns."""

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of all checks."""
        return [name for name in vars(cls) if name.startswith("check_")]

    def run(self, name: str) -> None:
        """Run one check on a fresh backend."""
        self._target.mkdir(exist_ok=True)
        self._backend = self._make()
        try:
            getattr(self, name)()
        finally:
            self._backend.close()
        os.rmdir(self._target)

    # -- keys, kinds, errors ------------------------------------------------------------------

    def check_states(self) -> None:
        """Prepare, commit, view and their records."""
        backend = self._backend
        backend.prepare("active key/with spaces", labels={"a": "1"})
        info = backend.stat("active key/with spaces")
        assert (info.kind, info.parent, info.labels) == (Kind.ACTIVE, "", {"a": "1"})
        backend.commit(Commit(name="committed", key="active key/with spaces", labels={"b": "2"}))
        info = backend.stat("committed")
        assert (info.kind, info.labels) == (Kind.COMMITTED, {"b": "2"})
        assert info.created == info.updated
        backend.view("view", "committed")
        assert backend.stat("view").kind is Kind.VIEW
        assert backend.stat("view").parent == "committed"
        assert {i.key for i in backend.walk()} == {"committed", "view"}
        with raises(NotFound):
            backend.stat("active key/with spaces")

    def check_prepare_errors(self) -> None:
        """Unknown parents, uncommitted parents, keys in use."""
        backend = self._backend
        with raises(NotFound):
            backend.prepare("a", "nowhere")
        with raises(NotFound):
            backend.view("a", "nowhere")
        backend.prepare("a")
        with raises(InvalidArgument):
            backend.prepare("b", "a")
        for make in (backend.prepare, backend.view):
            with raises(AlreadyExists):
                make("a")
        backend.commit(Commit(name="c", key="a"))
        with raises(AlreadyExists):
            backend.prepare("c", "c")
        with raises(NotFound):
            backend.stat("b")

    def check_commit_errors(self) -> None:
        """What commit refuses, and that it leaves the active snapshot alone then."""
        backend = self._backend
        with raises(NotFound):
            backend.commit(Commit(name="n", key="nothing"))
        backend.prepare("a")
        backend.commit(Commit(name="c", key="a"))
        backend.prepare("b", "c")
        backend.view("v", "c")
        with raises(AlreadyExists):
            backend.commit(Commit(name="c", key="b"))
        with raises(FailedPrecondition):
            backend.commit(Commit(name="n", key="v"))
        with raises(FailedPrecondition):
            backend.commit(Commit(name="n", key="c"))
        with raises(InvalidArgument):
            backend.commit(Commit(name="n", key="b", parent="other"))
        assert backend.stat("b").kind is Kind.ACTIVE
        backend.commit(Commit(name="n", key="b", parent="c"))
        assert backend.stat("n").parent == "c"

    def check_rebase_errors(self) -> None:
        """A parent given at commit must exist and be committed, if one can be given then at all."""
        backend = self._backend
        backend.prepare("a")
        backend.prepare("b")
        if not backend.capabilities.rebase:
            backend.commit(Commit(name="c", key="b"))
            with raises(InvalidArgument):
                backend.commit(Commit(name="n", key="a", parent="c"))
            return
        with raises(NotFound):
            backend.commit(Commit(name="n", key="a", parent="nowhere"))
        with raises(FailedPrecondition):
            backend.commit(Commit(name="n", key="a", parent="b"))

    def check_mounts_errors(self) -> None:
        """Mounts are stable, and only of what is not committed."""
        backend = self._backend
        made = backend.prepare("a")
        assert made
        assert backend.mounts("a") == made == backend.mounts("a")
        backend.commit(Commit(name="c", key="a"))
        with raises(FailedPrecondition):
            backend.mounts("c")
        with raises(NotFound):
            backend.mounts("a")
        with raises(FailedPrecondition):
            backend.sink("c")

    def check_remove(self) -> None:
        """A parent stays as long as it has children, in any kind."""
        backend = self._backend
        with raises(NotFound):
            backend.remove("nothing")
        backend.prepare("a")
        backend.commit(Commit(name="c", key="a"))
        backend.view("v", "c")
        backend.prepare("b", "c")
        for child in ("v", "b"):
            with raises(FailedPrecondition):
                backend.remove("c")
            backend.remove(child)
        backend.remove("c")
        backend.cleanup()
        assert list(backend.walk()) == []
        backend.prepare("a")  # its key is free again

    def check_what_is_mounted_stays_and_only_what_is_asked_is_deleted(self) -> None:
        """A mounted snapshot is not removed; cleanup can be told which to delete."""
        backend = self._backend
        mounts = backend.prepare("one")
        backend.prepare("two")
        with mounted(mounts, self._target), raises(FailedPrecondition):
            backend.remove("one")
        numbers = {backend.remove("one"), backend.remove("two")}
        assert len(numbers) == 2
        assert backend.cleanup(only={numbers.pop()}) == []
        assert backend.cleanup() == []

    def check_update(self) -> None:
        """Labels can be set and deleted; nothing else moves but the time."""
        backend = self._backend
        backend.prepare("a", labels={"keep": "1", "drop": "2"})
        before = backend.stat("a")
        after = backend.update("a", {"drop": "", "new": "3"})
        assert after.labels == {"keep": "1", "new": "3"}
        assert (after.created, after.kind, after.parent) == (before.created, before.kind, "")
        assert after.updated >= before.updated
        with raises(NotFound):
            backend.update("nothing", {})
        with raises(InvalidArgument):
            backend.update("a", {"long": "x" * 5000})

    def check_update_of_fields(self) -> None:
        """An update by field paths changes what they name: one label, or all labels."""
        backend = self._backend
        backend.prepare("a", labels={"a/b.c": "1", "keep": "2"})
        wanted = {"a/b.c": "3", "keep": "4"}
        assert backend.update("a", wanted, ["labels.a/b.c"]).labels == {"a/b.c": "3", "keep": "2"}
        assert backend.update("a", {}, ["labels.a/b.c"]).labels == {"keep": "2"}
        assert backend.update("a", {"new": "1"}, ["labels"]).labels == {"new": "1"}
        assert backend.update("a", wanted, []).labels == wanted
        with raises(InvalidArgument):
            backend.update("a", wanted, ["parent"])
        assert backend.stat("a").labels == wanted

    def check_usage(self) -> None:
        """A snapshot's use is its own, parents left out."""
        self._layer("one", "", member("file", data=b"x" * 100_000))
        self._layer("two", "one", member("link", "2", link="file"))
        assert self._backend.usage("one").size >= 100_000
        assert self._backend.usage("one").inodes == 1
        with raises(NotFound):
            self._backend.usage("nothing")
        with self._mounted(self._backend.prepare("a", "two")) as tree:
            before = self._backend.usage("a")
            (tree / "more").write_bytes(b"x" * 50_000)
        after = self._backend.usage("a")
        assert after.size - before.size >= 50_000
        assert after.inodes - before.inodes == 1

    def check_close_twice(self) -> None:
        """Closing again does nothing."""
        self._backend.close()

    # -- trees --------------------------------------------------------------------------------

    def check_root_permission(self) -> None:
        """The root is 0755 0:0, whatever the umask and whatever a layer says of it."""
        mask = os.umask(0o077)
        try:
            self._layer("one", "", member("./", "5", mode=0o700, uid=5), member("f"))
            for mounts in (self._backend.view("v", "one"), self._backend.prepare("a", "one")):
                with self._mounted(mounts) as tree:
                    info = tree.stat()
                    assert stat.S_IMODE(info.st_mode) == 0o755
                    assert (info.st_uid, info.st_gid) == (0, 0)
        finally:
            os.umask(mask)

    def check_empty(self) -> None:
        """No layers: an empty tree that can be written to."""
        with self._mounted(self._backend.view("v")) as tree:
            assert list(tree.iterdir()) == []
        with self._mounted(self._backend.prepare("a")) as tree:
            (tree / "file").touch()

    def check_view_is_read_only(self) -> None:
        """A view of one layer or of several cannot be written to."""
        self._base()
        self._layer("two", "base", member("second"))
        for parent in ("base", "two"):
            with self._mounted(self._backend.view("v", parent)) as tree:
                try:
                    (tree / "new").touch()
                except OSError:
                    pass
                else:
                    raise AssertionError("a view took a file")
            self._backend.remove("v")

    def check_layers_combine(self) -> None:
        """Files change, go, come back; folders merge, are replaced, are opaque."""
        self._base()
        self._layer(
            "two", "base", member("folder/file", data=b"two"), member(".wh.top"), member("new/x")
        )
        self._layer(
            "three", "two", member("folder/.wh..wh..opq"), member("top", data=b"back"), member("new")
        )
        assert set(self._contents("two")) == {
            b"folder",
            b"folder/file",
            b"folder/other",
            b"new",
            b"new/x",
        }
        assert set(self._contents("three")) == {b"folder", b"new", b"top"}
        assert set(self._contents("base")) == {b"folder", b"folder/file", b"folder/other", b"top"}

    def check_implied_parents(self) -> None:
        """A folder that a layer only implies keeps the attributes it has below."""
        self._base()
        self._layer("two", "base", member("folder/added"), member("fresh/added"))
        with self._mounted(self._backend.view("v", "two")) as tree:
            info = (tree / "folder").stat()
            assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid) == (0o750, 7, 8)
            assert info.st_mtime == 1_600_000_000
            info = (tree / "fresh").stat()
            assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_mtime) == (0o755, 0, 0)

    def check_writes_stay_apart(self) -> None:
        """What is written to an active snapshot shows in it alone, and then in what stands on it."""
        self._base()
        one = self._backend.prepare("one", "base")
        two = self._backend.prepare("two", "base")
        with self._mounted(one) as tree:
            (tree / "top").write_text("changed")
            (tree / "folder" / "file").unlink()
            (tree / "folder" / "other").rename(tree / "moved")
            os.chown(tree / "moved", 3, 4)
        with self._mounted(two) as tree:
            assert (tree / "top").read_text() == "top"
            assert (tree / "folder" / "file").exists()
        self._backend.commit(Commit(name="child", key="one"))
        with self._mounted(self._backend.view("v", "child")) as tree:
            assert (tree / "top").read_text() == "changed"
            assert sorted(p.name for p in tree.iterdir()) == ["folder", "moved", "top"]
            assert (tree / "moved").stat().st_uid == 3
            assert list((tree / "folder").iterdir()) == []

    def check_commit_of_a_chain(self) -> None:
        """Several layers committed at once are what they are one by one."""
        if not self._backend.capabilities.rebase:
            return
        mask = os.umask(0)
        steps = []
        parts = ((member("a"), member("b/c")), (member(".wh.a"), member("b/d")), (member("a/e"),))
        for position, members in enumerate(parts):
            data = archive(*members)
            self._backend.prepare(f"k{position}")
            target = self._backend.sink(f"k{position}")
            apply_layer([data], target, diff_id=digest_of(data))
            below = f"n{position - 1}" if position else None
            steps.append(Commit(name=f"n{position}", key=f"k{position}", parent=below))
        os.umask(mask)
        self._backend.commit(*steps)
        assert set(self._contents("n2")) == {b"a", b"a/e", b"b", b"b/c", b"b/d"}
        assert set(self._contents("n1")) == {b"b", b"b/c", b"b/d"}

    def check_reuse(self) -> None:
        """The data of a layer serves on other bases too, each of which shows what it would else."""
        backend = self._backend
        if not backend.capabilities.shares:
            assert backend.reusable("") is None
            assert backend.reuse("a", "") is None
            return
        self._base()
        self._layer("like base", "", member("folder/", "5", mode=0o750, uid=7, gid=8), member("top"))
        self._layer("other", "", member("folder/", "5", mode=0o700), member("gone"))
        upper = (member("folder/new", data=b"new"), member("same", "1", link="folder/new"))
        marked = (member(".wh.top"), member("folder/.wh..wh..opq"), member("folder/x"))
        for name, members in (("upper", upper), ("marked", marked)):
            for base in ("base", "like base", "other", ""):
                diff_id = self._verified(f"{name} on {base}", base, *members)
                self._layer(f"plain {name} on {base}", base, *members)
                found = backend.reusable(diff_id)
                assert found == backend.usage(f"{name} on base")
                assert self._tree(f"{name} on {base}") == self._tree(f"plain {name} on {base}")
                assert self._differing(f"{name} on {base}", *members) == []
                assert backend.measure(f"{name} on {base}").inodes == (
                    backend.usage(f"{name} on {base}").inodes
                )
        assert backend.reusable(digest_of(b"another")) is None
        assert backend.cleanup() == []

    def check_what_is_reused_stays(self) -> None:
        """What has one layer's data is written to, committed, mounted and removed by itself."""
        backend = self._backend
        if not backend.capabilities.shares:
            return
        members = (member("folder/", "5", mode=0o750), member("folder/file", data=b"x" * 100_000))
        self._layer("one", "", member("a"))
        self._layer("two", "", member("b"))
        for base in ("one", "two"):
            self._verified(f"on {base}", base, *members)
        before = self._tree("on two")
        with self._mounted(backend.prepare("written", "on one")) as tree:
            (tree / "folder" / "file").write_bytes(b"y")
            (tree / "folder" / "more").touch()
        backend.commit(Commit(name="committed", key="written"))
        assert self._tree("on two") == before
        with self._mounted(backend.view("v", "on two")) as tree:
            for name in ("committed", "on one"):  # which nobody has mounted
                backend.remove(name)
            assert backend.cleanup() == []
            assert len((tree / "folder" / "file").read_bytes()) == 100_000
        backend.remove("v")
        assert self._tree("on two") == before
        diff_id = digest_of(archive(*members))
        backend.reuse("kept", diff_id)
        backend.remove("on two")
        assert backend.cleanup() == []
        assert backend.reusable(diff_id) is None
        backend.commit(Commit(name="again", key="kept", parent="two", diff_id=diff_id))
        assert self._tree("again") == before
        backend.remove("again")
        assert backend.cleanup() == []
        assert backend.reusable(diff_id) is None

    def check_comparing(self) -> None:
        """A snapshot is held against its layer, and against another."""
        self._base()
        members = [member("folder/new", data=b"new"), member("folder/.wh.file")]
        self._layer("upper", "base", *members)
        assert self._differing("upper", *members) == []
        assert "folder/new" in self._differing("upper", member("folder/new", data=b"old"), members[1])
        assert "folder/more" in self._differing("upper", *members, member("folder/more"))
        for name in ("base", "upper"):
            assert self._backend.measure(name).inodes == self._backend.usage(name).inodes
        self._backend.prepare("active", "upper")
        with raises(FailedPrecondition):
            self._backend.comparing("active")
        with raises(NotFound):
            self._backend.comparing("absent")

    def check_replace(self) -> None:
        """A layer that was applied again takes the place of what stands below others."""
        backend = self._backend
        self._layer("base", "", member("a", data=b"a"))
        self._layer("middle", "base", member("b", data=b"b"), member("d/", "5", mode=0o700))
        self._layer("upper", "middle", member("d/c", data=b"c"))
        backend.update("middle", {"label": "stays"})
        before = self._contents("upper")
        self._applied("again", "base", member("b", data=b"b"), member("d/", "5", mode=0o700))
        assert backend.replace(Commit(name="middle", key="again")) == []
        info = backend.stat("middle")
        assert (info.kind, info.parent, info.labels) == (Kind.COMMITTED, "base", {"label": "stays"})
        assert self._contents("upper") == before
        assert self._differing("middle", member("b", data=b"b"), member("d/", "5", mode=0o700)) == []
        with raises(NotFound):
            backend.stat("again")
        assert backend.cleanup() == []

    def check_many_layers(self) -> None:
        """A chain whose mount options are over a page, or as long as the backend takes."""
        count = min(_MANY * 3, self._backend.capabilities.layers)
        for number in range(count):
            self._layer(f"n{number}", f"n{number - 1}" if number else "", member(f"f{number}"))
        top = f"n{count - 1}"
        assert len(self._contents(top)) == count
        with self._mounted(self._backend.prepare("a", top)) as tree:
            (tree / "f0").unlink()
            assert len(list(tree.iterdir())) == count - 1

    def check_remove_while_mounted(self) -> None:
        """What is mounted is not removed."""
        mounts = self._backend.prepare("a")
        with self._mounted(mounts) as tree:
            (tree / "precious").write_text("x")
            with raises(FailedPrecondition):
                self._backend.remove("a")
            self._backend.cleanup()
            assert (tree / "precious").read_text() == "x"
        self._backend.remove("a")
