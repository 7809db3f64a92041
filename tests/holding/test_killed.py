"""Who is killed while it brings in or releases an image leaves a reference whole, or nothing at all."""

import signal
import subprocess
import sys

import pytest

from tests.command import dump
from tests.holding.scene import Desk, Scene, assert_complete, assert_empty

pytestmark = [pytest.mark.root, pytest.mark.crash]

_CHILD = """
import sys
from pathlib import Path
import trio
from engine import failpoints
from engine.app import open_engine
from engine.images.coordinating import Coordinator
from engine.registry.client import Access, open_client
from tests.conftest import AMD64
from tests.registry.asking import QUICK

async def main(root, name, terms):
    access = Access(patience=QUICK)
    async with open_engine(root, platform=AMD64) as engine, open_client(access) as client:
        coordinator = Coordinator(engine, delay_s=1e-9)
        failpoints.arm(terms)
        held = await coordinator.acquire(name, "child", client)
        await coordinator.release(held.image, "child")

trio.run(main, *sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("where", "is_held"),
    [
        ("pull.named=kill", False),
        ("hold.pulled=kill", False),
        ("hold.taken=kill", True),
        ("hold.released=kill", False),
    ],
)
def test_whoever_is_killed_leaves_all_or_nothing(scene: Scene, where: str, is_held: bool) -> None:
    """ND-13 (j): what is due is done after the restart; and a name that a pull put is no leak."""
    words = [str(scene.root), scene.name("one"), where]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert dump(scene.root)["images"], "the kill came before the name"
    image = scene.ids["one"]

    async def after(desk: Desk) -> None:
        stores = desk.stores
        await desk.later(60)
        if is_held:
            await desk.engine.unpack(scene.name("one"), snapshotter="overlay")
            (held,) = await desk.coordinator.held()
            assert (held.owner, held.image) == ("child", image)
            await desk.later()
            assert_complete(stores, image)
            await desk.coordinator.retain([])
            await desk.later()
        assert_empty(stores)

    scene.run(after)
