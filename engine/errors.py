"""The errors that lamina raises, by who has to act.

Pure.

    EngineError                 something failed that has no better kind
    |- CommandFailed            you: what a container is to run cannot be run
    |- InvalidArgument          you: the call itself is wrong
    |- NotFound                 you: there is no such thing
    |- AlreadyExists            you: the name is taken
    |- FailedPrecondition       you: it exists, but its state does not allow this
    |- PermissionDenied         you: the process may not do this
    |- NotSupported             you: this host or this backend cannot do it
    |- Unavailable              nobody: try again
    |- ResourceExhausted        the host: no space, or a limit is reached
    |- Refused                  the image: its bytes are malformed or hostile
    |  `- DigestMismatch        the image: bytes do not have the digest they claim
    `- DataLoss                 the store: bytes that were good are not any more

A message is one line: what happened, then what to do about it. Foreign exceptions are mapped where
they come in (`os_errors` here for OSError, `engine.kv` for LMDB) and chained.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "AlreadyExists",
    "CommandFailed",
    "DataLoss",
    "DigestMismatch",
    "EngineError",
    "FailedPrecondition",
    "InvalidArgument",
    "NotFound",
    "NotSupported",
    "PermissionDenied",
    "Refused",
    "ResourceExhausted",
    "Unavailable",
    "by_name",
    "from_os_error",
    "is_recoverable",
    "os_errors",
    "printable",
]


class EngineError(Exception):
    """Base of every error that lamina raises on purpose."""


class InvalidArgument(EngineError):
    """The call is wrong: a malformed reference, an unknown backend name."""


class NotFound(EngineError):
    """There is no such object."""


class AlreadyExists(EngineError):
    """The key or name is in use."""


class FailedPrecondition(EngineError):
    """The object is in a state that does not allow this operation."""


class PermissionDenied(EngineError):
    """The process lacks the right; usually it needs root."""


class NotSupported(EngineError):
    """This host, kernel or backend cannot do it."""


class Unavailable(EngineError):
    """It cannot be done now; the same call may succeed later."""


class ResourceExhausted(EngineError):
    """No space, no inodes, no descriptors, or a configured limit is reached."""


class Refused(EngineError):
    """An image is malformed, hostile or beyond a limit."""


class DataLoss(EngineError):
    """Stored bytes are missing or changed."""


class CommandFailed(EngineError):
    """The command of a container cannot be run; `code` is what a shell says then."""

    def __init__(self, message: str, code: int = 126) -> None:
        super().__init__(message)
        self.code = code
        """127 if there is no such file, 126 if it cannot be executed."""


class DigestMismatch(Refused):
    """Bytes do not hash to what was promised for them."""

    def __init__(self, what: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{what} has digest {actual}, not {expected}: "
            "the image is damaged or was altered; fetch it again"
        )
        self.expected = expected
        self.actual = actual


def is_recoverable(error: BaseException) -> bool:
    """Say whether the same call may succeed later, though nobody changes it or what it is about."""
    return isinstance(error, Unavailable | ResourceExhausted)


_KINDS: dict[int, tuple[type[EngineError], str]] = {
    errno.ENOSPC: (ResourceExhausted, "no space left on the device; free some (try `lamina gc`)"),
    errno.EDQUOT: (ResourceExhausted, "disk quota is used up; free some space"),
    errno.EFBIG: (ResourceExhausted, "a file is larger than the file system (or ulimit -f) allows"),
    errno.EMLINK: (ResourceExhausted, "too many links to one file for this file system"),
    errno.EMFILE: (ResourceExhausted, "too many open files; raise the limit (ulimit -n)"),
    errno.ENFILE: (ResourceExhausted, "the system's table of open files is full"),
    errno.ENOMEM: (ResourceExhausted, "out of memory"),
    errno.EAGAIN: (ResourceExhausted, "too many processes or threads; raise the limit (ulimit -u)"),
    errno.EACCES: (PermissionDenied, "permission denied; run as root or choose another --root"),
    errno.EPERM: (PermissionDenied, "operation not permitted; this needs root"),
    errno.EROFS: (PermissionDenied, "the file system is read-only; choose another --root"),
    errno.ENOENT: (NotFound, "no such file or directory"),
    errno.EEXIST: (AlreadyExists, "it exists already"),
    errno.EBUSY: (FailedPrecondition, "it is in use; unmount it first"),
    errno.ENOTDIR: (FailedPrecondition, "not a directory"),
    errno.EISDIR: (FailedPrecondition, "is a directory"),
    errno.EOPNOTSUPP: (NotSupported, "the file system does not support this"),
}


def from_os_error(error: OSError, doing: str) -> EngineError:
    """Return the error of this module that stands for `error`, which came while `doing`."""
    kind, advice = _KINDS.get(error.errno or 0, (EngineError, error.strerror or str(error)))
    return kind(f"{doing}: {advice}")


def by_name(kind: str, message: str) -> EngineError:
    """Return the error that another process named; a plain EngineError for an unknown kind."""
    for known in _descendants(EngineError):
        if known.__name__ == kind and known is not DigestMismatch:
            return known(message)
    return EngineError(message)


def _descendants(kind: type[EngineError]) -> Iterator[type[EngineError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _descendants(below)


@contextmanager
def os_errors(doing: str) -> Iterator[None]:
    """Map any OSError from the block to an EngineError that says what was being done."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, doing) from error


def printable(name: bytes | str, limit: int = 120) -> str:
    """Return a name from an image so that it is safe in a message: escaped and not too long."""
    name = name[: 4 * (limit + 1)]  # no more is shown, whatever the name's length and encoding
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
