"""Statistics as Prometheus reads them: its text format, version 0.0.4.

Pure. lamina has no daemon: whoever links it in serves this where he serves his own
(docs/progress.md has an example).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from engine.observing.metering import Histogram, Statistics

__all__ = ["CONTENT_TYPE", "exposition"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = Mapping[str, str]
Sample = tuple[str, Labels, float]
"""What follows the name of a metric, its labels, and the value."""

_Find = Callable[[Statistics], Iterator[Sample]]


def exposition(*stores: Statistics) -> str:
    """Return the metrics of some stores; each is told from the others by its root."""
    return "".join(
        line
        for name, kind, about, find in _METRICS
        for line in _metric(f"lamina_{name}", kind, about, _samples(stores, find))
    )


def _samples(stores: Iterable[Statistics], find: _Find) -> Iterator[Sample]:
    for store in stores:
        for suffix, labels, value in find(store):
            yield suffix, {"root": store.root, **labels}, value


def _metric(name: str, kind: str, about: str, samples: Iterable[Sample]) -> Iterator[str]:
    help_text = about.replace("\\", "\\\\").replace("\n", "\\n")
    yield f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"
    for suffix, labels, value in samples:
        shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        yield f"{name}{suffix}{{{shown}}} {_number(value)}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value)).replace("inf", "Inf")


def _in_flight(store: Statistics) -> Iterator[Sample]:
    for work, calls in store.calls.items():
        yield "", {"call": work}, calls.in_flight


def _calls(store: Statistics) -> Iterator[Sample]:
    for work, calls in store.calls.items():
        for result, count in {"ok": 0, **calls.results}.items():
            yield "", {"call": work, "result": result}, count


def _call_seconds(store: Statistics) -> Iterator[Sample]:
    for work, calls in store.calls.items():
        yield "", {"call": work}, calls.seconds


def _phases(store: Statistics) -> Iterator[Sample]:
    for phase, spent in store.phases.items():
        yield "", {"phase": phase, "state": "busy"}, spent.busy
        yield "", {"phase": phase, "state": "waiting"}, spent.waiting


def _moved(store: Statistics) -> Iterator[Sample]:
    for kind, count in store.moved.items():
        yield "", {"kind": kind}, count


def _layers(store: Statistics) -> Iterator[Sample]:
    for kind, count in store.layers.items():
        yield "", {"kind": kind}, count


def _shared(store: Statistics) -> Iterator[Sample]:
    yield "", {}, store.pulls_shared


def _pull_seconds(store: Statistics) -> Iterator[Sample]:
    yield from _histogram(store.pull_seconds)


def _throughput(store: Statistics) -> Iterator[Sample]:
    yield from _histogram(store.pull_throughput)


def _histogram(found: Histogram) -> Iterator[Sample]:
    counts = found.counts or (0,) * (len(found.bounds) + 1)
    below = 0
    for bound, count in zip((*found.bounds, float("inf")), counts, strict=True):
        below += count
        yield "_bucket", {"le": "+Inf" if bound == float("inf") else repr(bound)}, below
    yield "_sum", {}, found.sum
    yield "_count", {}, below


def _collected(store: Statistics) -> Iterator[Sample]:
    for kind, count in store.collected.items():
        if kind != "bytes":
            yield "", {"kind": kind}, count


def _freed(store: Statistics) -> Iterator[Sample]:
    yield "", {}, store.collected.get("bytes", 0)


def _pauses(store: Statistics) -> Iterator[Sample]:
    yield "_sum", {}, store.pauses.total
    yield "_count", {}, store.pauses.count


def _longest(store: Statistics) -> Iterator[Sample]:
    yield "", {}, store.pauses.longest


def _containers(store: Statistics) -> Iterator[Sample]:
    for state, count in store.containers.items():
        yield "", {"state": state}, count


_METRICS: tuple[tuple[str, str, str, _Find], ...] = (
    ("calls_in_flight", "gauge", "Calls that have not ended.", _in_flight),
    ("calls_total", "counter", "Calls that have ended, by how.", _calls),
    ("call_seconds_total", "counter", "How long ended calls took together.", _call_seconds),
    ("phase_seconds_total", "counter", "Time by phase, busy on a processor or waiting.", _phases),
    ("bytes_total", "counter", "Bytes fetched, stored, found to be here, unpacked.", _moved),
    ("layers_total", "counter", "Layers asked for, by how they were had.", _layers),
    ("pulls_shared_total", "counter", "Pulls that were another caller's too.", _shared),
    ("pull_seconds", "histogram", "Pulls that fetched something.", _pull_seconds),
    (
        "pull_throughput_bytes_per_second",
        "histogram",
        "Bytes fetched a second by pulls, without those that were here before.",
        _throughput,
    ),
    ("collected_total", "counter", "What collections removed.", _collected),
    ("collected_bytes_total", "counter", "Bytes of content and snapshots removed.", _freed),
    ("collection_pause_seconds", "summary", "How long collections kept others waiting.", _pauses),
    ("collection_pause_longest_seconds", "gauge", "The longest of those pauses.", _longest),
    ("containers", "gauge", "Containers, by state.", _containers),
)
