"""Debian's docker-registry on loopback, with images in memory; accounted apart from who pulls of it."""

import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.group import Failed, Group, group

__all__ = ["Registry", "Served", "serving", "tally"]

_STARTING_S = 20.0
_LOGGING_S = 10.0
_ASKED = count()
_ANSWERED = re.compile(r'"(\S+) (/v2/\S*) HTTP/1\.1" (\d+) (\d+)')
_GIVEN = frozenset({"200", "206"})


@dataclass(frozen=True)
class Served:
    """What a registry did: requests answered, bytes of blobs sent, seconds busy."""

    requests: int
    sent: int
    busy: float


@dataclass
class Registry:
    """A registry that runs; `group` holds it, and what else is between it and who pulls."""

    name: str
    group: Group
    log: Path

    def push(self, layout: Path, tag: str, name: str) -> str:
        """Have it hold an image of a layout; return the reference."""
        source = f"oci:{layout}{':' if tag else ''}{tag}"
        words = ("copy", "-q", "--insecure-policy", "--dest-tls-verify=false", source)
        subprocess.run(["skopeo", *words, f"docker://{self.name}/{name}"], check=True)
        return f"{self.name}/{name}"

    @contextmanager
    def far(self, latency: float, rate: float) -> Iterator[str]:
        """Give its name at the end of a line (`link`) for the length of a block."""
        port = self.name.rpartition(":")[2]
        command = [sys.executable, "-m", "benchmarks.link", port, str(latency), str(rate)]
        link = self.group.start(command, stdout=subprocess.PIPE)
        assert link.stdout
        try:
            with link.stdout as told:
                yield f"127.0.0.1:{int(told.readline())}"
        finally:
            link.kill()
            link.wait()

    @contextmanager
    def watched(self) -> Iterator[list[Served]]:
        """Give a list that has at the end of the block what was served in it."""
        found: list[Served] = []
        start, busy = len(self._said()), sum(self.group.busy())
        yield found
        busy = sum(self.group.busy()) - busy
        found.append(tally(self._said()[start:], busy))

    def _said(self) -> str:
        """Return its log, once that tells of a request made now: of those before it does as well."""
        host, path = self.name, f"/v2/?{next(_ASKED)}"
        connection = http.client.HTTPConnection(host)
        connection.request("GET", path)
        connection.getresponse().read()
        connection.close()
        deadline = time.monotonic() + _LOGGING_S
        while f"GET {path} " not in (said := self.log.read_text()):
            if time.monotonic() > deadline:
                raise Failed("docker-registry does not log what it is asked")
            time.sleep(0.01)
        return said


def tally(log: str, busy: float) -> Served:
    """Return what the lines of an access log come to."""
    answered = [one for one in _ANSWERED.findall(log) if not one[1].startswith("/v2/?")]  # not our own
    sent = [
        int(size)
        for method, path, status, size in answered
        if method == "GET" and status in _GIVEN and "/blobs/" in path
    ]
    return Served(len(answered), sum(sent), busy)


@contextmanager
def serving(folder: Path) -> Iterator[Registry]:
    """Run a registry that keeps what it holds in a folder."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        name = f"127.0.0.1:{probe.getsockname()[1]}"
    config, log = folder / "config.json", folder / "log"
    storage = {"filesystem": {"rootdirectory": str(folder / "storage")}}
    settings = {"version": 0.1, "log": {"level": "error"}, "storage": storage, "http": {"addr": name}}
    config.write_text(json.dumps(settings))  # which YAML is a superset of
    with group() as processes, log.open("wb") as written:
        started = processes.start(["docker-registry", "serve", str(config)], stdout=written.fileno())
        deadline = time.monotonic() + _STARTING_S
        while not _answers(name):
            if time.monotonic() > deadline or started.poll() is not None:
                raise Failed("docker-registry did not start")
            time.sleep(0.02)
        try:
            yield Registry(name, processes, log)
        finally:
            started.kill()
            started.wait()


def _answers(name: str) -> bool:
    host, _, port = name.rpartition(":")
    with socket.socket() as trying:
        return trying.connect_ex((host, int(port))) == 0
