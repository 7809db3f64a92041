"""Completion of words in a shell: the command `completion`, and what there is to complete.

Sync.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from engine.cli.context import Context, default_root
from engine.cli.output import write
from engine.errors import EngineError
from engine.metadata.containers import ContainerStore
from engine.oci.reference import familiar
from engine.stores import Stores

__all__ = [
    "blob_names",
    "completion",
    "container_names",
    "image_names",
    "lease_ids",
    "mount_targets",
    "namespace_names",
    "snapshot_names",
]

_MOST = 500


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what a shell needs to complete words.

    For bash: source <(lamina completion bash)
    """
    found = get_completion_class(shell)
    assert found is not None
    root = context.find_root()
    write([found(root.command, {}, "lamina", "_LAMINA_COMPLETE").source().rstrip()])


Names = Callable[[Stores, str], Iterable[str]]
Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completer(names: Names) -> Completer:
    def complete(
        context: click.Context, _parameter: click.Parameter, begun: str
    ) -> list[CompletionItem]:
        try:
            with _reading(context) as stores:
                found = (name for name in names(stores, begun) if name.startswith(begun))
                return [CompletionItem(name) for name in islice(found, _MOST)]
        except (EngineError, OSError):  # there is nothing to offer, and nowhere to say why
            return []

    return complete


@contextmanager
def _reading(context: click.Context) -> Iterator[Stores]:
    """Open the store that the words so far name."""
    given = context.find_root().params
    root, namespace = given.get("root") or default_root(), given.get("namespace") or "default"
    with Context(Path(root), namespace).reading() as stores:
        yield stores


def _images(stores: Stores, _begun: str) -> Iterator[str]:
    yield from (familiar(image.name) for image in stores.images.walk())


def _blobs(stores: Stores, begun: str) -> Iterable[str]:
    return stores.content.beginning(begun, _MOST)


def _snapshots(stores: Stores, _begun: str) -> Iterator[str]:
    yield from (info.key for backend in stores.snapshotters() for info in backend.walk())


def _targets(stores: Stores, _begun: str) -> Iterator[str]:
    yield from (record.target for record in stores.mounting.walk() if record.state == "mounted")


def _containers(stores: Stores, _begun: str) -> Iterator[str]:
    containers = ContainerStore(stores.root.meta, stores.namespace)
    yield from (container.id for container in containers.walk())


def _leases(stores: Stores, _begun: str) -> Iterator[str]:
    yield from (lease.id for lease in stores.leases.walk())


def _namespaces(stores: Stores, _begun: str) -> Iterator[str]:
    yield from (record.name for record in stores.namespaces.walk())


image_names = _completer(_images)
blob_names = _completer(_blobs)
snapshot_names = _completer(_snapshots)
mount_targets = _completer(_targets)
container_names = _completer(_containers)
lease_ids = _completer(_leases)
namespace_names = _completer(_namespaces)
