"""Images that run: busybox in them, and nothing else of this machine.

Sync. They are OCI layouts, made in milliseconds.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from engine.stores import host_platform
from engine.testing.archives import archive, layout, member
from tests.conftest import peer

__all__ = ["APPLETS", "busybox_layer", "deep", "image", "scratch"]

APPLETS = "sh true echo cat id sleep ls touch env pwd kill head dd ps mkdir rm stat grep test"
PASSWD = b"root:x:0:0:root:/root:/bin/sh\nwww:x:33:34:www:/srv:/bin/sh\n"
GROUP = b"root:x:0:\nwww:x:34:\nextra:x:77:www\n"


@cache
def _busybox() -> bytes:
    return Path(peer("busybox")).read_bytes()


@cache
def busybox_layer() -> bytes:
    """Return a layer with a shell, a few commands, and two users."""
    folders = [member(name, "5", mode=0o755) for name in ("bin", "etc", "root", "srv")]
    return archive(
        *folders,
        member("tmp", "5", mode=0o1777),
        member("bin/busybox", data=_busybox(), mode=0o755),
        *(member(f"bin/{name}", "2", link="busybox") for name in APPLETS.split()),
        member("etc/passwd", data=PASSWD),
        member("etc/group", data=GROUP),
    )


def deep(folder: Path, count: int) -> Path:
    """Write an image of so many layers, each with one file, its number, and of busybox on top."""
    numbered = [
        archive(member("numbers", "5", mode=0o755), member(f"numbers/{n}", data=b"%d\n" % n))
        for n in range(count - 1)
    ]
    return _written(folder, [*numbered, busybox_layer()], {"Cmd": ["/bin/sh"]})


def image(folder: Path, further: Sequence[bytes] = (), **config: Any) -> Path:
    """Write an image of busybox and further layers; `config` is as in an OCI image's."""
    return _written(folder, [busybox_layer(), *further], {"Cmd": ["/bin/sh"], **config})


def scratch(folder: Path, **config: Any) -> Path:
    """Write an image with nothing in it but one static binary."""
    layer = archive(member("busybox", data=_busybox(), mode=0o755))
    return _written(folder, [layer], {"Entrypoint": ["/busybox"], "Cmd": ["echo", "alone"], **config})


def _written(folder: Path, layers: Sequence[bytes], config: Mapping[str, Any]) -> Path:
    host = host_platform()
    platform = {"os": host.os, "architecture": host.architecture}
    return layout(folder, layers, config={"config": dict(config)}, platform=platform, compression="")
