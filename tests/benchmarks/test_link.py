"""A slower way to a server: nothing is lost on it, and bytes wait for those before them."""

import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks.link import Line, forward


def test_a_line_carries_one_after_the_other():
    line = Line(latency=9.0, rate=100.0)
    assert line.taken(10.0, 50) == 10.5
    assert line.taken(10.0, 50) == 11.0
    assert line.taken(20.0, 100) == 21.0
    assert Line(9.0).taken(10.0, 1 << 40) == 10.0


def passed_on(data: bytes, read: Callable[[socket.socket], None]) -> None:
    with ExitStack() as stack:
        ends = [stack.enter_context(end) for _ in range(2) for end in socket.socketpair()]
        forwarding = threading.Thread(target=forward, args=(ends[1], ends[2], Line(0.0, 1e12)))
        sending = threading.Thread(target=lambda: (ends[0].sendall(data), ends[0].close()))
        for thread in (forwarding, sending):
            thread.start()
        read(ends[3])
        for thread in (sending, forwarding):
            thread.join()


def test_all_that_is_sent_comes_and_then_the_end():
    data = bytes(range(256)) * 8192
    found = bytearray()

    def read(end: socket.socket) -> None:
        while piece := end.recv(1 << 20):
            found.extend(piece)

    passed_on(data, read)
    assert found == data


def test_a_receiver_that_leaves_ends_it():
    passed_on(b"x" * (1 << 20), lambda end: end.close())
