"""What is shown of a container: as JSON, which docs/json.md describes, and as a row for people.

Sync. A field that cannot be told is left out: of a damaged record, or because it did not come to that.
"""

import shlex
from collections.abc import Iterable, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from engine.cli.output import View, age, document, span, write
from engine.cli.table import Column, Fault
from engine.kv.schema import now
from engine.kv.table import Damaged
from engine.metadata.containers import ContainerState
from engine.oci.reference import familiar
from engine.running.statuses import ContainerStatus
from engine.times import rfc3339

__all__ = ["ShownContainer", "list_containers", "shown", "state_of"]

_COLUMNS = (
    Column("NAME"),
    Column("IMAGE", goes=3, least=12),
    Column("COMMAND", goes=2, least=10),
    Column("STATE", goes=4),
    Column("CREATED", goes=1),
)


class ShownContainer(msgspec.Struct, frozen=True, kw_only=True):
    """A container."""

    name: str
    unique: str | UnsetType = UNSET
    image: str | UnsetType = UNSET
    digest: str | UnsetType = UNSET
    snapshotter: str | UnsetType = UNSET
    command: list[str] | UnsetType = UNSET
    state: str | UnsetType = UNSET
    created: str | UnsetType = UNSET
    started: str | UnsetType = UNSET
    ended: str | UnsetType = UNSET
    pid: int | UnsetType = UNSET
    exit_code: int | UnsetType = UNSET
    parent: str | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET
    error: str | UnsetType = UNSET


def shown(status: ContainerStatus) -> ShownContainer:
    """Return what there is to say of a container."""
    started = status.since.get(ContainerState.RUNNING)
    return ShownContainer(
        name=status.id,
        unique=status.unique,
        image=status.image,
        digest=status.target,
        snapshotter=status.backend,
        command=list(status.command),
        state=str(status.state),
        created=rfc3339(status.created),
        started=rfc3339(started) if started else UNSET,
        ended=rfc3339(status.ended) if status.ended else UNSET,
        pid=status.pid or UNSET,
        exit_code=UNSET if status.exit_code is None else status.exit_code,
        parent=status.parent or UNSET,
        labels=dict(status.labels),
        error=status.error or UNSET,
    )


def state_of(status: ContainerStatus) -> str:
    """Return for people how a container is, and since when."""
    if status.error:
        return f"{status.state}: {status.error}"
    if status.state != ContainerState.STOPPED:
        return f"{status.state} {span(now() - status.since.get(status.state, status.created))}"
    code = "" if status.exit_code is None else f" ({status.exit_code})"
    return f"exited{code} {age(status.ended)}" if status.ended else "stopped"


def list_containers(
    view: View, statuses: Sequence[ContainerStatus], damaged: Iterable[Damaged], none: str
) -> None:
    """Write containers to stdout, as `view` says; `none` if there are none."""
    lost = list(damaged)
    if view.json:
        faults = (ShownContainer(name=record.name, error=record.error) for record in lost)
        document([*map(shown, statuses), *faults])
    elif view.quiet:
        write([*(status.id for status in statuses), *(record.name for record in lost)])
    else:
        rows = map(_row, statuses)
        view.table(_COLUMNS, rows, [Fault(one.name, one.error) for one in lost], none=none)


def _row(status: ContainerStatus) -> Sequence[str]:
    command = shlex.join(status.command)
    return status.id, familiar(status.image), command, state_of(status), age(status.created)
