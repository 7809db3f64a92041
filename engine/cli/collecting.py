"""The command `gc`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from gc import disable, enable

import click
import msgspec

from engine.cli.bars import progress
from engine.cli.collection import collection, conclude, explained, tell_explained, tell_kept
from engine.cli.completion import image_names
from engine.cli.context import Context, action
from engine.cli.output import View, document, human_bytes, say
from engine.explaining import explain_named, explain_store
from engine.gc.policy import Enforced, Policy
from engine.images.states import ImageState, pulls
from engine.oci.reference import familiar
from engine.times import duration

__all__ = ["gc"]

_DAY = 86_400 * 10**9
_GAP = 5  # between kubelet's thresholds


def _age(_context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    days = text.removesuffix("d")
    found = int(days) * _DAY if days != text and days.isdecimal() else duration(text)
    if found is None or found < 0:
        raise click.BadParameter(f"{text!r} is no duration such as 90s, 1h30m or 30d", param=parameter)
    return found


@click.command("gc")
@click.argument("what", metavar="[OBJECT]", required=False, shell_complete=image_names)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--explain", is_flag=True, help="Say who holds the rest, or only why OBJECT stays.")
@click.option("--high", type=click.IntRange(0, 100), help="Remove images from so many % of the disk on.")
@click.option("--low", type=click.IntRange(0, 100), help="Until no more than so many % are in use.")
@click.option("--min-age", callback=_age, metavar="AGE", help="But none used within it; 2m by default.")
@click.option("--max-age", callback=_age, metavar="AGE", help="Remove images not used for so long: 30d.")
@action
@click.pass_obj
def gc(
    context: Context,
    what: str | None,
    dry_run: bool,
    explain: bool,
    high: int | None,
    low: int | None,
    min_age: int | None,
    max_age: int | None,
    view: View,
) -> None:
    """Remove everything that no image, mount or running work holds.

    With --high or --max-age also images, the least recently used first, but none that is pinned, mounted
    or young. OBJECT is an image, a blob or a snapshot, by its name or digest.
    """
    if what is not None and not explain:
        raise click.UsageError("OBJECT goes with --explain")
    policy = _policy(high, low, min_age, max_age)
    if what is not None:
        _explain_one(context, what, view)
        return
    enforced = None
    with context.reading() if dry_run else context.stores() as stores:
        with _without_search(), progress(view) as report:
            if policy is not None:
                enforced = stores.enforce(policy, dry_run=dry_run, report=report)
            collected = (
                enforced.collected if enforced else stores.collect(dry_run=dry_run, report=report)
            )
        told = explain_store(stores) if explain else None
        unfinished = [] if view.json or view.quiet else [*pulls(stores)]
    if enforced and not view.json and not view.quiet:
        _tell_removed(enforced, dry_run=dry_run)
    done = collection(collected, dry_run=dry_run, explained=told, enforced=enforced)
    sizes = {one.node: one.bytes for one in told.garbage} if told else None
    try:
        conclude(view, collected, msgspec.to_builtins(done), dry_run=dry_run, sizes=sizes)
    finally:
        _tell_unfinished(unfinished)
        if told and not view.json and not view.quiet:
            tell_explained(view, told)


@contextmanager
def _without_search() -> Iterator[None]:
    """Keep the interpreter from looking for circles: in a million records that are read are none."""
    disable()
    try:
        yield
    finally:
        enable()


def _policy(
    high: int | None, low: int | None, min_age: int | None, max_age: int | None
) -> Policy | None:
    if low is not None and high is None:
        raise click.UsageError("--low goes with --high")
    if high is None and max_age is None:
        if min_age is not None:
            raise click.UsageError("--min-age goes with --high or --max-age")
        return None
    top = 100 if high is None else high
    bottom = max(0, top - _GAP) if low is None else low
    if bottom > top:
        raise click.UsageError("--low is above --high")
    least = Policy().min_age if min_age is None else min_age
    if max_age is not None:
        least = min(least, max_age) if min_age is None else least
        if max_age < least:
            raise click.UsageError("--max-age is below --min-age")
    return Policy(high=top, low=100 if high is None else bottom, min_age=least, max_age=max_age)


def _tell_removed(enforced: Enforced, *, dry_run: bool) -> None:
    verb = "would remove" if dry_run else "removed"
    for one in enforced.chosen:
        names = " ".join(map(familiar, one.names))
        say(f"{verb} image {names} ({human_bytes(one.bytes)}) for {one.why}")
    say(f"disk in use: {enforced.before:.1f} %, now {enforced.after:.1f} %")


def _tell_unfinished(found: Iterable[ImageState]) -> None:
    """Say what is kept of pulls that failed: it may be what fills the disk."""
    for pull in found:
        if pull.parts.there and not pull.puller:
            say(
                f"{human_bytes(pull.parts.there)} of {familiar(pull.name)} are kept for its next pull; "
                f"`lamina leases rm {pull.lease}` lets them go"
            )


def _explain_one(context: Context, what: str, view: View) -> None:
    with context.reading() as stores:
        found = explain_named(stores, what)
    if view.json:
        document([explained(kept) for kept in found])
    else:
        tell_kept(view, found)
