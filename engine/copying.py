"""One image from a registry to another: its bytes pass through, and nothing of it is stored here.

Async. That is as safe as by way of a store: all but a name is asked for by its digest, which the
registry that takes it holds against the bytes, and the name is put there last.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import trio

from engine import limits
from engine.content.closure import Closure, closure
from engine.content.image import resolve
from engine.errors import NotFound, Refused
from engine.oci.digest import Digest
from engine.oci.documents import Descriptor
from engine.oci.platform import Platform
from engine.oci.reference import Reference, parse_reference
from engine.progress import Report, silent
from engine.registry.lanes import Lanes
from engine.registry.sending import Pushed, Sending, check_named

if TYPE_CHECKING:
    from engine.registry.client import Client

__all__ = ["copy_image"]


async def copy_image(
    client: "Client",
    source: str,
    destination: str,
    *,
    platform: Platform | None = None,
    referrers: bool = False,
    lanes: Lanes | None = None,
    report: Report = silent,
) -> Pushed:
    """Copy an image from one registry or repository to another, without a store.

    All of an index goes, or one platform's image alone; with `referrers` also what refers to any part of
    it, and to that. What is there is not sent. `lanes` bound what is on its way, with those of others if
    they share them. Raises what a pull and a push raise.
    """
    copying = _Copying(client, parse_reference(source), parse_reference(destination), lanes or Lanes())
    return await copying.run(platform, report, with_referrers=referrers)


class _Copying:
    def __init__(
        self, client: "Client", source: Reference, destination: Reference, lanes: Lanes
    ) -> None:
        self._client = client
        self._lanes = lanes
        self._from = source
        self._to = destination
        self._documents: dict[Digest, bytes] = {}

    async def run(self, platform: Platform | None, report: Report, *, with_referrers: bool) -> Pushed:
        """Copy what the source means now."""
        named = await self._client.resolve(self._from)
        root = named.descriptor
        if named.data is not None:
            self._documents[root.key] = named.data
        if platform:
            choose = partial(resolve, root, platform, self._read, chosen=True)
            root = (await trio.to_thread.run_sync(choose)).path[-1]
        check_named(self._to, root)
        found = await self._closure([root])
        if with_referrers:
            found = await self._with_referrers(root, found)
        is_same = self._from.domain == self._to.domain
        sending = Sending(
            client=self._client,
            lanes=self._lanes.of_image(),
            reference=self._to,
            read=partial(self._client.blob, self._from),
            elsewhere=lambda _blob: [self._from.path] if is_same else [],
            report=report,
        )
        return await sending.run(root, found)

    async def _closure(self, roots: Sequence[Descriptor], found: Closure | None = None) -> Closure:
        found = await trio.to_thread.run_sync(closure, roots, self._read, found)
        if found.missing:
            first = next(iter(found.missing.values()))
            raise NotFound(
                f"{self._from} lists {first.platform or first.digest}, which is not there; "
                "copy one platform of it (--platform)"
            )
        return found

    async def _with_referrers(self, root: Descriptor, found: Closure) -> Closure:
        """Return also what refers to any of the documents, to those that do, and so on."""
        known = {root.key}
        left = [*found.documents]
        while left:
            referring: dict[Digest, Descriptor] = {}
            for key in left:
                for one in await self._client.referrers(self._from, key):
                    if one.key not in known:
                        referring.setdefault(one.key, one)
                if len(known) + len(referring) > limits.REFERRERS:
                    raise Refused(f"over {limits.REFERRERS} manifests refer to {self._from}")
            known |= referring.keys()
            before = len(found.documents)
            found = await self._closure([*referring.values()], found)
            left = [*found.documents][before:]
        return found

    def _read(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a document, verified, each asked for once; for a thread."""
        digest = descriptor.key
        if digest not in self._documents:
            self._documents[digest] = trio.from_thread.run(
                self._client.document, self._from, descriptor, limit
            )
        return self._documents[digest]
