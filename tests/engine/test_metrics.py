"""Statistics: each thing counted once, and told to Prometheus in its own format."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from engine.app import Engine, open_engine
from engine.errors import NotFound, Unavailable
from engine.observing.metering import Histogram, Layers, Meter, Moved, Statistics, Verb
from engine.observing.metrics import CONTENT_TYPE, exposition
from engine.phases import Phase, Spent
from engine.registry.client import Client, open_client
from engine.testing.archives import archive, layout, member
from engine.testing.fake_registry import FakeRegistry, reset
from tests.inline import workers_inline
from tests.registry.asking import Served
from tests.registry.pulls import BIG, HELLO, ON_AMD64, access

# The format of prometheus.io/docs/instrumenting/exposition_formats, and its names of labels.
_SAMPLE = re.compile(
    r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)"
    r"\{(?P<labels>(?:[a-zA-Z_][a-zA-Z0-9_]*=\"(?:[^\\\"\n]|\\[\\\"n])*\",?)*)\}"
    r" (?P<value>[-+]?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|Inf|NaN))"
)
_LABEL = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*)=\"((?:[^\\\"\n]|\\[\\\"n])*)\"")
_KINDS = {
    "counter": {""},
    "gauge": {""},
    "histogram": {"_bucket", "_sum", "_count"},
    "summary": {"_sum", "_count"},
}

Samples = dict[str, list[tuple[dict[str, str], float]]]


def parsed(text: str) -> Samples:
    """Read a page as Prometheus does, and strictly: families together, each sample once."""
    assert text.endswith("\n")
    found: Samples = {}
    family = kind = ""
    families: list[str] = []
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
            families.append(family)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family
            assert kind in _KINDS
            assert kind != "counter" or name.endswith("_total")
        else:
            match = _SAMPLE.fullmatch(line)
            assert match, line
            assert match["name"].removeprefix(family) in _KINDS[kind]
            labels = {key: _unescaped(text) for key, text in _LABEL.findall(match["labels"])}
            samples = found.setdefault(match["name"], [])
            assert labels not in [seen for seen, _ in samples]
            samples.append((labels, float(match["value"])))
    assert len(families) == len(set(families))
    return found


def _unescaped(text: str) -> str:
    kept = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
    return re.sub(r"\\[\\\"n]", lambda match: kept[match[0]], text)


def value(samples: Samples, name: str, **labels: str) -> float:
    (found,) = [value for seen, value in samples[f"lamina_{name}"] if labels.items() <= seen.items()]
    return found


# -- counters -----------------------------------------------------------------------------------


def test_calls_are_counted_by_how_they_end() -> None:
    meter = Meter()
    with meter.working(Verb.PULL), meter.working(Verb.PULL), meter.working(Verb.CHECK):
        calls = meter.statistics("/r").calls
        assert (calls[Verb.PULL].in_flight, calls[Verb.CHECK].in_flight) == (2, 1)
    for error in (NotFound("x"), NotFound("y"), ZeroDivisionError(), KeyboardInterrupt()):
        with pytest.raises(type(error)), meter.working(Verb.PULL):
            raise error
    found = meter.statistics("/r").calls[Verb.PULL]
    assert found.results == {"ok": 2, "NotFound": 2, "bug": 1, "cancelled": 1}
    assert found.in_flight == 0
    assert found.seconds >= 0


@given(st.lists(st.floats(0, 1e12)), st.lists(st.floats(0, 1e10), min_size=1, unique=True).map(sorted))
def test_a_histogram_has_each_value_once(values: Sequence[float], bounds: Sequence[float]) -> None:
    found = Histogram(tuple(bounds))
    for one in values:
        found = found.with_one(one)
    assert sum(found.counts) == len(values)
    assert found.sum == pytest.approx(sum(values))
    for number, bound in enumerate(bounds):
        assert sum(found.counts[: number + 1]) == sum(one <= bound for one in values)


def test_a_pull_that_fetched_nothing_is_not_timed() -> None:
    meter = Meter()
    meter.pulled(0, 1.0)
    meter.pulled(2 * 10**6, 2.0)
    found = meter.statistics("/r")
    assert sum(found.pull_seconds.counts) == sum(found.pull_throughput.counts) == 1
    assert (found.pull_seconds.sum, found.pull_throughput.sum) == (2.0, 1e6)


# -- the format ---------------------------------------------------------------------------------


def test_all_of_it_can_be_read() -> None:
    meter = Meter()
    meter.spent({Phase.FETCH: Spent(0.25, 1e-7)})
    meter.moved(Moved.FETCHED, 5)
    meter.had(Layers.FOUND, 3)
    meter.pulled(5, 0.5)
    meter.collected(content=2, bytes=70)
    meter.paused(0.25)
    meter.paused(0.125)
    with meter.working(Verb.PULL):
        text = exposition(meter.statistics("/a"), Meter().statistics("/b"))
    samples = parsed(text)
    assert value(samples, "calls_in_flight", call="pull", root="/a") == 1
    assert value(samples, "calls_total", call="pull", result="ok", root="/a") == 0
    assert value(samples, "phase_seconds_total", phase="fetch", state="waiting", root="/a") == 1e-7
    assert value(samples, "bytes_total", kind="fetched", root="/a") == 5
    assert value(samples, "layers_total", kind="found", root="/a") == 3
    assert value(samples, "collected_total", kind="content", root="/a") == 2
    assert value(samples, "collected_bytes_total", root="/a") == 70
    assert value(samples, "collection_pause_seconds_sum", root="/a") == 0.375
    assert value(samples, "collection_pause_longest_seconds", root="/a") == 0.25
    for root, count in (("/a", 1), ("/b", 0)):
        buckets = [
            (labels["le"], found)
            for labels, found in samples["lamina_pull_throughput_bytes_per_second_bucket"]
            if labels["root"] == root
        ]
        assert [found for _, found in buckets] == sorted(found for _, found in buckets)
        assert buckets[-1] == ("+Inf", count)
        assert value(samples, "pull_throughput_bytes_per_second_count", root=root) == count
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


@given(st.text())
def test_any_root_can_be_told(root: str) -> None:
    samples = parsed(exposition(Meter().statistics(root)))
    assert {labels["root"] for found in samples.values() for labels, _ in found} == {root}


# -- what an engine counts ----------------------------------------------------------------------


@pytest.mark.root
def test_pulls_are_counted_once_however_many_share_them(tmp_path: Path, umask_0: None) -> None:
    async def work(engine: Engine, client: Client, served: Served, registry: FakeRegistry) -> None:
        pull = engine.pull
        whole = sum(layer.size for layer in served.layers)

        async def all_at_once() -> None:
            await pull(str(served.reference), client, snapshotter="overlay")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(all_at_once)
        first = engine.statistics()
        assert first.calls[Verb.PULL].results == {"ok": 3}
        assert first.pulls_shared == 2
        assert (first.moved[Moved.FETCHED], first.moved[Moved.FOUND]) == (whole, 0)
        assert first.layers == {
            **dict.fromkeys(Layers, 0),
            Layers.APPLIED: 2,
        }
        assert sum(first.pull_seconds.counts) == 1
        assert set(first.phases) == set(Phase)
        assert all(spent.busy > 0 for spent in first.phases.values())

        await all_at_once()
        again = engine.statistics()
        assert (again.moved[Moved.FETCHED], again.moved[Moved.FOUND]) == (whole, whole)
        assert again.layers[Layers.FOUND] == 2
        assert again.pull_throughput == first.pull_throughput, "what was here is not counted"

        registry.plan("manifests", reset(), times=9)
        with pytest.raises(Unavailable):
            await pull(str(served.reference), client)
        with trio.CancelScope() as scope:
            scope.cancel()
            await pull(str(served.reference), client)
        results = engine.statistics().calls[Verb.PULL].results
        assert results == {"ok": 4, "Unavailable": 1, "cancelled": 1}
        parsed(exposition(engine.statistics()))

    async def run(registry: FakeRegistry) -> None:
        served = Served(registry, (HELLO, BIG))
        async with open_engine(tmp_path / "root", platform=ON_AMD64) as engine:
            with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                async with open_client(access()) as client:
                    await work(engine, client, served, registry)

    with FakeRegistry().running() as registry:
        trio.run(run, registry)


@pytest.mark.root
def test_imports_and_collections_are_counted(tmp_path: Path, umask_0: None) -> None:
    layers = [archive(member("a")), archive(member("b"))]
    source = layout(tmp_path / "image", layers, tag="x/y:1", compression="none")

    async def run() -> Statistics:
        async with open_engine(tmp_path / "root") as engine:
            with workers_inline(pytest.MonkeyPatch(), engine.stores.root):
                await engine.import_image(source, snapshotter="overlay")
                await engine.import_image(source, snapshotter="overlay", replace=True)
                await engine.unpack("x/y:1", snapshotter="overlay")
                await engine.remove_image("x/y:1", collect=True)
            await engine.check()
            return engine.statistics()

    found = trio.run(run)
    whole = sum(map(len, layers))
    assert (found.moved[Moved.STORED], found.moved[Moved.FOUND]) == (whole, whole)
    assert found.moved[Moved.UNPACKED] > 0
    assert (found.layers[Layers.APPLIED], found.layers[Layers.FOUND]) == (2, 4)
    calls = {work: calls.results.get("ok", 0) for work, calls in found.calls.items()}
    assert calls == {
        Verb.PULL: 0,
        Verb.PUSH: 0,
        Verb.IMPORT: 2,
        Verb.UNPACK: 1,
        Verb.COLLECT: 1,
        Verb.CHECK: 1,
        Verb.LAUNCH: 0,
        Verb.DESTROY: 0,
    }
    assert (found.collected["content"], found.collected["snapshots"]) == (4, 2)
    assert found.collected["bytes"] > whole
    assert found.pauses.count > 0
    assert 0 < found.pauses.longest <= found.pauses.total
