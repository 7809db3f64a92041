"""Who was there from the start gets all that a container wrote, however long he takes."""

import socket
import threading

import pytest

from engine.running import monitor
from engine.running.clients import Clients
from engine.running.frames import EXIT, LARGEST, STDOUT, take
from engine.running.polling import Polling

PIECES = 20


@pytest.fixture
def no_time(monkeypatch):
    monkeypatch.setattr(monitor, "FAREWELL_S", 0.0)


@pytest.fixture
def made():
    """The clients of a monitor with nobody yet, and what it waits with."""
    polling = Polling()
    clients = Clients(polling, lambda _: True, lambda *_: None, lambda: None)
    yield polling, clients
    for client in list(clients._all):
        clients.drop(client)
    polling._selector.close()


def said(clients):
    for _ in range(PIECES):
        clients.output(STDOUT, b"x" * LARGEST)
    clients.tell_end(b"{}")


@pytest.mark.usefixtures("no_time")
def test_the_first_client_may_have_been_stopped(made):
    """By Ctrl-Z for longer than others are waited for, who stall as well."""
    polling, clients = made
    ours, his = socket.socketpair()
    other, stalled = socket.socketpair()
    with his, stalled:
        clients.add(ours, attached=True)
        clients.add(other, attached=False).attached = True
        said(clients)
        waiting = threading.Thread(target=monitor._farewell, args=(polling, clients), daemon=True)
        waiting.start()
        came, frames = bytearray(), []
        while not frames or frames[-1][0] != EXIT:
            came += his.recv(LARGEST)
            while taken := take(came):
                frames.append(taken)
        waiting.join(30)
        assert not waiting.is_alive()
        assert len(frames) == PIECES + 1
        assert clients.first_saw_end


@pytest.mark.usefixtures("no_time")
def test_others_are_not_waited_for_for_ever(made):
    polling, clients = made
    other, stalled = socket.socketpair()
    with stalled:
        clients.add(other, attached=False).attached = True
        said(clients)
        monitor._farewell(polling, clients)
        assert clients.any_sent_to


@pytest.mark.usefixtures("no_time")
def test_a_first_client_who_is_gone_is_not_waited_for(made):
    polling, clients = made
    ours, his = socket.socketpair()
    clients.add(ours, attached=True)
    said(clients)
    his.close()
    monitor._farewell(polling, clients)
    assert not clients.first_saw_end
