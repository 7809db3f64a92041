"""What goes between the engine and its worker processes: orders and replies, framed.

Pure. A frame is four bytes of length and a msgpack value. A worker has one job at a time, and tells what
it comes to. While it applies a layer it may ask for bytes that are still on their way (`Wants`), which
`Arrived` answers when there are some; `Stop` ends the job.
"""

import sys

import msgspec

from engine.diff.apply import Applied
from engine.errors import EngineError, by_name
from engine.phases import Timings
from engine.snapshots import Sealing, Target

__all__ = [
    "ApplyJob",
    "Arrived",
    "Done",
    "Failed",
    "Job",
    "Order",
    "Progress",
    "Reply",
    "SealJob",
    "Sealed",
    "Started",
    "Stop",
    "Wants",
    "decode_order",
    "decode_reply",
    "frame",
]

COMMAND = (sys.executable, "-P", "-m", "engine.unpack.worker")
"""What starts a worker process."""

HEADER = 4
LARGEST = 1 << 24  # a frame; a job holds paths and digests, a reply a message


class Arrived(msgspec.Struct, frozen=True, tag=True):
    """So many packed bytes of the layer are there, and whether those are all."""

    there: int
    is_whole: bool


class ApplyJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Apply one layer to `target`: blob `number` of the store at `root`, as far as it has `arrived`.

    The bytes of a small one come along as `data`.
    """

    root: str
    number: int
    arrived: Arrived
    diff_id: str
    target: Target
    data: bytes = b""
    failpoints: str = ""


class SealJob(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Make applied layers right on what is below them, and durable."""

    sealing: Sealing
    failpoints: str = ""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Nobody wants the layer any more that is being applied."""


Job = ApplyJob | SealJob
Order = Job | Arrived | Stop


class Started(msgspec.Struct, frozen=True, tag=True):
    """The job was taken up: from now on it may have left something behind."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """So many packed bytes have been read."""

    read: int


class Wants(msgspec.Struct, frozen=True, tag=True):
    """The job cannot go on without packed bytes beyond so many."""

    beyond: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """The layer is applied."""

    applied: Applied


class Failed(msgspec.Struct, frozen=True, tag=True):
    """An error of this kind (`engine.errors`)."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> "Failed":
        """Return what stands for an error on the way."""
        if isinstance(error, EngineError):
            return cls(type(error).__name__, str(error))
        return cls("EngineError", f"unpacking a layer: {type(error).__name__}: {error}")

    @property
    def error(self) -> EngineError:
        """The error again."""
        return by_name(self.kind, self.message)


class Sealed(msgspec.Struct, frozen=True, tag=True):
    """So many layers are sealed; `failed` is why not all are."""

    count: int
    failed: Failed | None
    timings: Timings


Reply = Started | Progress | Wants | Done | Sealed | Failed

_encoder = msgspec.msgpack.Encoder()
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_orders: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)


def frame(value: Order | Reply) -> bytes:
    """Return `value` as a frame."""
    body = _encoder.encode(value)
    return len(body).to_bytes(HEADER, "big") + body


def decode_order(body: bytes) -> Order:
    """Return the order in a frame's body."""
    return _orders.decode(body)


def decode_reply(body: bytes) -> Reply:
    """Return the reply in a frame's body."""
    return _replies.decode(body)
