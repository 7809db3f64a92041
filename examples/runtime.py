"""A small container runtime: keeps running what a file says, whatever happens to itself.

    python examples/runtime.py ROOT TASKS.json

TASKS.json has one entry for each task, by its name:

    {"web": {"image": "docker.io/library/busybox", "args": ["httpd", "-f"], "restart": true},
     "job": {"image": "/srv/images/job.tar", "args": ["work", "--once"], "memory": 67108864}}

An image is a reference that is pulled, or the path of an OCI layout or archive that is imported. Each
task is one container. Killed at any moment and started again, this finds the containers that still run,
takes note of those that ended meanwhile, clears away what was half made, and goes on. What no task needs
any more is removed: containers, images, layers.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import trio

from engine import Containerizer, Engine, Resources, RunOptions, open_containerizer, open_engine
from engine.errors import EngineError, is_recoverable
from engine.registry.client import Access, Client, open_client

AGAIN_S = 1.0  # between two tries of what may work later


class Task(msgspec.Struct, frozen=True):
    """What is to run."""

    image: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    memory: int = 0
    restart: bool = False


class Runtime:
    """Keeps tasks running; all of its state is in the store."""

    def __init__(self, engine: Engine, containers: Containerizer, client: Client) -> None:
        self._engine = engine
        self._containers = containers
        self._client = client

    async def run(self, tasks: Mapping[str, Task]) -> None:
        """Run all tasks to their end; those with `restart` have none."""
        recovered = await self._containers.recover(known=tasks.keys())
        for name in recovered.running:
            tell(f"{name} is still running")
        for name in recovered.destroyed:
            tell(f"{name} was cleared away")

        names = {task.image: await self._bring(task.image) for task in tasks.values()}
        pruned = await self._containers.prune(keep=names.values())
        freed = pruned.blob_bytes + pruned.snapshot_bytes
        tell(f"{freed} bytes of images were not needed any more")

        async with trio.open_nursery() as nursery:
            for name, task in tasks.items():
                nursery.start_soon(self._keep, name, names[task.image], task)

    async def _bring(self, image: str) -> str:
        """Have an image here and unpacked; return its name. Nothing is fetched or unpacked twice."""
        if image.startswith("/"):
            name = f"local/{Path(image).name.lower()}:latest"
            await self._engine.import_image(image, name=name, replace=True)
            await self._engine.unpack(name)
        else:
            name = (await self._engine.pull(image, self._client)).image.name
        return name

    async def _keep(self, name: str, image: str, task: Task) -> None:
        """Have a task run until it ends, and once more if that is wanted."""
        options = RunOptions(args=task.args, env=task.env, resources=Resources(memory=task.memory))
        while True:
            try:
                # Under a name that is there this starts nothing, and tells of what is there.
                launched = await self._containers.launch(name, image, options)
                if not launched.already:
                    tell(f"{name} runs as process {launched.status.pid}")
                ended = await self._containers.wait(name)
                tell(f"{name} ended with {'an unknown code' if ended.code is None else ended.code}")
                await self._containers.destroy(name)
            except EngineError as error:
                tell(f"{name}: {error}")
                if not is_recoverable(error):
                    return
            if not task.restart:
                return
            await trio.sleep(AGAIN_S)


def tell(what: str) -> None:
    """Say what happened."""
    print(what, flush=True)


async def main(root: str, file: str) -> None:
    """Run the tasks of a file on a store."""
    tasks = msgspec.json.decode(await trio.Path(file).read_bytes(), type=dict[str, Task])
    async with (
        open_engine(root) as engine,
        open_containerizer(engine) as containers,
        open_client(Access()) as client,
    ):
        await Runtime(engine, containers, client).run(tasks)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
