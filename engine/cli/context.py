"""What every command needs: the store that the options name, and options that several share."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import click
import trio

from engine.app import Engine, host_platform, open_engine
from engine.oci.platform import Platform, parse_platform
from engine.stores import Stores, open_stores

__all__ = ["Context", "as_json", "platform_option", "replace_option", "snapshotter_option"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    """The global options."""

    root: Path
    namespace: str

    def stores(self) -> AbstractContextManager[Stores]:
        """Open the stores, which must exist, for commands that do one quick thing."""
        return open_stores(self.root, self.namespace, host_platform(), create=False)

    def reading(self) -> AbstractContextManager[Stores]:
        """Open the stores, which must exist, for commands that change nothing."""
        return open_stores(self.root, self.namespace, host_platform(), readonly=True)

    def run(self, work: Callable[[Engine], Awaitable[T]], *, create: bool = False) -> T:
        """Run `work` on an open engine, for commands that take long; only `create` makes a store."""

        async def opened() -> T:
            async with open_engine(self.root, namespace=self.namespace, create=create) as engine:
                return await work(engine)

        return trio.run(opened)


def _platform(_context: click.Context, _parameter: click.Parameter, text: str | None) -> Platform:
    return parse_platform(text) if text else host_platform()


as_json = click.option("--json", "as_json", is_flag=True, help="Write one JSON document.")
snapshotter_option = click.option(
    "--snapshotter", metavar="NAME", help="Backend; `lamina backends` lists them."
)
platform_option = click.option(
    "--platform", callback=_platform, metavar="OS/ARCH", help="Of a multi-platform image."
)
replace_option = click.option("--replace", is_flag=True, help="Let a name move to another image.")
