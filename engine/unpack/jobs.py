"""What goes between the engine and its worker processes: jobs and replies, framed.

Pure. A frame is four bytes of length and a msgpack value.
"""

import msgspec

from engine.diff.apply import Applied
from engine.oci.mediatypes import Compression
from engine.snapshots import Target

__all__ = ["ApplyJob", "Done", "Failed", "Progress", "Reply", "decode_job", "decode_reply", "frame"]

HEADER = 4
LARGEST = 1 << 24  # a frame; a job holds paths and digests, a reply a message


class ApplyJob(msgspec.Struct, frozen=True, kw_only=True):
    """Apply one layer: blob `number` of the store at `root`, `size` packed bytes, to `target`."""

    root: str
    number: int
    size: int
    compression: Compression
    diff_id: str
    target: Target
    failpoints: str = ""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """So many packed bytes have been read."""

    read: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """The layer is applied."""

    applied: Applied


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The job failed with an error of this kind (`engine.errors`)."""

    kind: str
    message: str


Reply = Progress | Done | Failed

_encoder = msgspec.msgpack.Encoder()
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_jobs = msgspec.msgpack.Decoder(ApplyJob)


def frame(value: ApplyJob | Reply) -> bytes:
    """Return `value` as a frame."""
    body = _encoder.encode(value)
    return len(body).to_bytes(HEADER, "big") + body


def decode_job(body: bytes) -> ApplyJob:
    """Return the job in a frame's body."""
    return _jobs.decode(body)


def decode_reply(body: bytes) -> Reply:
    """Return the reply in a frame's body."""
    return _replies.decode(body)
