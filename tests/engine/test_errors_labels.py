"""Errors from the outside mapped to ours, text made safe for messages, and the rules of labels."""

import errno
import os

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import errors, labels
from engine.errors import (
    AlreadyExists,
    DataLoss,
    DigestMismatch,
    EngineError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    NotSupported,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    by_name,
    from_os_error,
    os_errors,
    printable,
)
from engine.failpoints import arm, armed, hit, terms
from engine.kv.schema import Blob
from engine.metadata.nodes import LABEL, blob_node, mentions
from engine.root import Root

KINDS = {
    errno.ENOSPC: ResourceExhausted,
    errno.EDQUOT: ResourceExhausted,
    errno.EMFILE: ResourceExhausted,
    errno.ENFILE: ResourceExhausted,
    errno.ENOMEM: ResourceExhausted,
    errno.EAGAIN: ResourceExhausted,
    errno.EMLINK: ResourceExhausted,
    errno.EFBIG: ResourceExhausted,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
    errno.EROFS: PermissionDenied,
    errno.ENOENT: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.EBUSY: FailedPrecondition,
    errno.ENOTDIR: FailedPrecondition,
    errno.EISDIR: FailedPrecondition,
    errno.EOPNOTSUPP: NotSupported,
    errno.EIO: EngineError,
}


@pytest.mark.parametrize(("number", "kind"), KINDS.items(), ids=lambda v: errno.errorcode.get(v, ""))
def test_os_errors(number, kind):
    cause = OSError(number, os.strerror(number))
    with pytest.raises(EngineError) as raised, os_errors("writing x"):
        raise cause
    assert type(raised.value) is kind
    assert str(raised.value).startswith("writing x: ")
    assert raised.value.__cause__ is cause


def test_os_error_without_a_number():
    assert type(from_os_error(OSError("odd"), "doing")) is EngineError
    assert str(from_os_error(OSError("odd"), "doing")) == "doing: odd"


def test_our_own_errors_pass_through():
    with pytest.raises(NotFound, match=r"^mine$"), os_errors("doing"):
        raise NotFound("mine")


LMDB_KINDS = [
    (lmdb.MapFullError("mdb_put: MDB_MAP_FULL"), ResourceExhausted),
    (lmdb.ReadersFullError("x"), Unavailable),
    (lmdb.InvalidError("x"), DataLoss),
    (lmdb.CorruptedError("x"), DataLoss),
    (lmdb.VersionMismatchError("x"), FailedPrecondition),
    (lmdb.Error("mdb_txn_commit: No space left on device"), ResourceExhausted),
    (lmdb.Error("mdb_txn_commit: Disk quota exceeded"), ResourceExhausted),
    (lmdb.Error("path: Permission denied"), PermissionDenied),
    (lmdb.Error("path: Read-only file system"), PermissionDenied),
    (lmdb.Error("mdb_txn_commit: Input/output error"), EngineError),
    (lmdb.Error("something new"), EngineError),
]


@pytest.mark.parametrize(("cause", "kind"), LMDB_KINDS, ids=str)
def test_lmdb_errors(tmp_path, cause, kind):
    with Root(tmp_path / "root") as root:
        with pytest.raises(EngineError) as raised, root.meta.write():
            raise cause
        assert type(raised.value) is kind
        assert raised.value.__cause__ is cause


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n[0].isupper() and n != "DigestMismatch"])
def test_errors_cross_processes_by_name(name):
    error = by_name(name, "message")
    assert type(error).__name__ == name
    assert str(error) == "message"


@pytest.mark.parametrize("name", ["ValueError", "", "SystemExit", "Exception"])
def test_only_our_errors_cross(name):
    assert type(by_name(name, "message")) is EngineError


def test_a_wrong_digest_is_a_refusal():
    error = DigestMismatch("blob", "sha256:a", "sha256:b")
    assert isinstance(error, errors.Refused)
    assert (error.expected, error.actual) == ("sha256:a", "sha256:b")


@given(st.text() | st.binary(), st.integers(1, 200))
def test_printable_is_safe(name, limit):
    """No byte of an image may move a terminal's cursor or fill a log."""
    text = printable(name, limit)
    assert text.isprintable()
    assert len(text) <= limit


@given(st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=120))
def test_printable_leaves_plain_text_alone(name):
    assert printable(name) == name


# -- labels -----------------------------------------------------------------------------------

_KEYS = st.sampled_from(["a", "b", "c"])
_LABELS = st.dictionaries(_KEYS, st.sampled_from(["1", "2"]))
_CHANGES = st.dictionaries(_KEYS, st.sampled_from(["", "1", "3"]))


@given(_LABELS, _CHANGES)
def test_merge(old, changes):
    expected = dict(old)
    for key, value in changes.items():
        expected[key] = value
        if not value:
            del expected[key]
    assert labels.merge(old, changes) == expected
    assert labels.merge(expected, changes) == expected


@pytest.mark.parametrize("bad", [{"": "x"}, {"k": "v" * 4096}, {"k" * 4097: ""}, {"k": "é" * 2048}])
def test_labels_have_limits(bad):
    with pytest.raises(InvalidArgument) as raised:
        labels.check(bad)
    assert len(str(raised.value)) < 200
    with pytest.raises(InvalidArgument):
        labels.merge({}, bad)


def test_a_label_of_the_largest_size():
    labels.check({"k": "v" * 4095})


CONTENT = "containerd.io/gc.ref.content"
SNAPSHOT = "containerd.io/gc.ref.snapshot"

CONTENT_REFS = {
    CONTENT: True,
    f"{CONTENT}.config": True,
    f"{CONTENT}.l.0": True,
    f"{CONTENT}/x": True,
    f"{CONTENT}.": True,
    f"{CONTENT}x": False,
    f"{CONTENT}s.0": False,
    f"x{CONTENT}": False,
    CONTENT.upper(): False,
    f"{SNAPSHOT}.overlay": False,
    "containerd.io/gc.root": False,
}


def mentioned(about):
    blob = Blob(digest="sha256:y", number=1, size=0, created=0, updated=0, labels=about)
    return list(mentions(blob_node("sha256:y"), blob))


@pytest.mark.parametrize(("key", "is_reference"), CONTENT_REFS.items())
def test_content_references(key, is_reference):
    found = [(one.how, one.node) for one in mentioned({key: "sha256:x"}) if one.node.kind == "content"]
    assert found == ([(LABEL, blob_node("sha256:x"))] if is_reference else [])


SNAPSHOT_REFS = {
    f"{SNAPSHOT}.overlay": "overlay",
    f"{SNAPSHOT}.overlay/1": "overlay",
    f"{SNAPSHOT}.a.b": "a.b",
    SNAPSHOT: None,
    f"{SNAPSHOT}/overlay": None,
    f"x{SNAPSHOT}.overlay": None,
    CONTENT: None,
}


@pytest.mark.parametrize(("key", "backend"), SNAPSHOT_REFS.items())
def test_snapshot_references(key, backend):
    assert list(labels.snapshot_refs({key: "name"})) == ([(backend, "name")] if backend else [])


def test_empty_values_refer_to_nothing():
    assert not mentioned({CONTENT: ""})
    assert not list(labels.snapshot_refs({f"{SNAPSHOT}.overlay": ""}))


# -- failpoints -------------------------------------------------------------------------------


def test_a_failpoint_fires_once_at_its_turn():
    with armed("gc.swept", "error", nth=2):
        assert terms() == "gc.swept=error@2"
        hit("gc.swept")
        hit("trash.emptied")
        with pytest.raises(EngineError, match="failpoint"):
            hit("gc.swept")
        hit("gc.swept")
    assert terms() == ""


@pytest.mark.parametrize(("action", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_a_failpoint_that_is_a_fault_of_the_host(action, number):
    with armed("gc.swept", action), pytest.raises(OSError) as raised:  # noqa: PT011  errno is the point
        hit("gc.swept")
    assert raised.value.errno == number


@pytest.mark.parametrize("text", ["gc.swept", "gc.swept=explode", "no.such=kill", "=kill"])
def test_only_known_failpoints(text):
    with pytest.raises(InvalidArgument):
        arm(text)
    assert terms() == ""
