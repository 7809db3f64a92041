"""The command `fsck`."""

import click
import msgspec

from engine.app import Engine
from engine.cli.bars import progress
from engine.cli.completion import image_names
from engine.cli.context import Context, action
from engine.cli.ending import Incomplete
from engine.cli.output import View, counted, document, human_bytes, write
from engine.cli.running import run
from engine.errors import DataLoss, printable
from engine.fsck.findings import Checked, Finding

__all__ = ["fsck"]

_LONGEST = 20_000  # of a line: three names, each in folders over folders


@click.command("fsck")
@click.argument("names", nargs=-1, metavar="[IMAGE]...", shell_complete=image_names)
@click.option("--repair", is_flag=True, help="Mend what can be from what is there.")
@action
@click.pass_obj
def fsck(context: Context, names: tuple[str, ...], repair: bool, view: View) -> None:
    """Hold the store, or some images, against itself and its layers."""
    shown = _Lines(view, context.namespace)
    if repair:

        async def work(engine: Engine) -> Checked:
            with progress(view) as report:
                return await engine.check(names, repair=True, tell=shown.tell, report=report)

        checked = run(context, work)
    else:
        with context.reading() as stores, progress(view) as report:
            checked = stores.check(names, tell=shown.tell, report=report)
    shown.end()
    done = {"repair": repair, "left": len(checked.left), **msgspec.structs.asdict(checked)}
    _sum_up(view, checked)
    if checked.left:
        more = "" if repair else "; `lamina fsck --repair` mends what can be"
        error = DataLoss(f"{counted(len(checked.left), 'thing')} damaged{more}")
        raise Incomplete(error, done)
    if view.json:
        document(done)


class _Lines:
    """Writes a line for each finding; on a terminal not before the bars are gone."""

    def __init__(self, view: View, namespace: str) -> None:
        self._view = view
        self._namespace = namespace
        self._lines: list[str] = []

    def tell(self, finding: Finding) -> None:
        if not self._view.json and (finding.is_damage or not self._view.quiet):
            self._lines.append(_line(finding, self._namespace))

    def end(self) -> None:
        write(self._lines)


def _line(finding: Finding, namespace: str) -> str:
    is_here = finding.namespace in {"", namespace}
    elsewhere = "" if is_here else f"in namespace {finding.namespace}"
    name = " ".join(filter(None, (finding.snapshotter, finding.name, elsewhere)))
    kind = "damaged" if finding.is_left else "repaired" if finding.done else "note"
    came = f"; {finding.done}" if finding.done else f"; waits: {finding.waits}" if finding.waits else ""
    return printable(f"{kind}  {finding.what} {name}: {finding.detail}{came}", _LONGEST)


def _sum_up(view: View, checked: Checked) -> None:
    counts = checked.counts
    by_attributes = f" ({counts.by_attributes} by attributes only)" if counts.by_attributes else ""
    view.tell(
        f"looked at {counted(counts.records, 'record')}, {counted(counts.images, 'image')}, "
        f"{counted(counts.blobs, 'blob')} ({human_bytes(counts.blob_bytes)}) and "
        f"{counted(counts.snapshots, 'snapshot')}{by_attributes}, "
        f"{human_bytes(counts.snapshot_bytes)} unpacked"
    )
