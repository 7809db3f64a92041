"""What follows from measurements: medians, shares, limits, tables, pages, targets, options."""

import argparse
import dataclasses

import msgspec
import pytest

from benchmarks import contained, pulled
from benchmarks.cores import chunks, spread
from benchmarks.costs import Cost, spread_of
from benchmarks.registry import Served, tally
from benchmarks.report import Measured, Report, Runs, merged
from benchmarks.sharing import multiples
from benchmarks.tables import BEGIN, END, markdown, placed, text
from benchmarks.targets import CONTAINERS, reached
from benchmarks.unpack import listed, parser

OURS, FULL = "lamina overlay lazy", "lamina overlay full"


def runs(name: str, stage: str, *seconds: float, **more) -> Runs:
    return Runs(name, stage, costs=[Cost(s, s, s / 2, 50 * 10**6, 90 * 10**6) for s in seconds], **more)


def measured(image: str = "large:gzip") -> Measured:
    return Measured(
        image=image,
        layers=3,
        packed=400 * 10**6,
        size=1_500 * 10**6,
        entries=80_000,
        cores=2,
        rooflines={
            "hash": [Cost(0.5, 0.9, 0.1)],
            "write": [Cost(1.5, 0.5, 2.5), Cost(1.0, 0.5, 2.5), Cost(1.25, 0.5, 2.5)],
            "inflate": [Cost(1.0, 1.5, 0.5)],
        },
        contenders=[
            runs(OURS, "unpack", 2.0, 3.0, 2.5, is_ours=True),
            runs("ctr", "unpack", 10.0),
            runs("tar", "unpack", 5.0),
            runs(FULL, "import", 6.0, is_ours=True),
            runs("ctr", "import", 12.0),
            Runs("umoci", "unpack", left_out="it does not know zstd"),
        ],
    )


def test_the_middle_and_how_far_apart():
    assert spread_of([3.0, 1.0, 2.0, 8.0]) == spread_of([8.0, 1.0, 3.0, 2.0])
    found = spread_of([3.0, 1.0, 2.0, 8.0])
    assert (found.median, found.min, found.max) == (2.5, 1.0, 8.0)


def test_costs_one_after_the_other_add_up_but_for_the_peak_of_memory():
    assert Cost(1, 2, 3, 40, 50) + Cost(1, 1, 1, 60, 10) == Cost(2, 3, 4, 60, 50)


def test_the_limit_is_the_part_that_takes_longest_alone_and_all_parts_share_the_cores():
    image = measured()
    assert image.highest() == ("write", 1.25)
    assert image.all_work() == (1.0 + 3.0 + 2.0) / 2


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_work_is_shared_whole_and_evenly(cores: int):
    sizes = [7, 1, 1, 5, 3, 3, 2]
    apart, neighbours = (divide(sizes, float, cores) for divide in (spread, chunks))
    assert sorted(size for share in apart for size in share) == sorted(sizes)
    assert [size for share in neighbours for size in share] == sizes
    for shares in (apart, neighbours):
        assert len(shares) == cores
        assert max(map(sum, shares)) <= sum(sizes) / cores + max(sizes)


def test_nothing_is_shared_too():
    assert spread([], float, 2) == chunks([], float, 2) == [[], []]


def test_a_table_fits_a_terminal_and_says_who_was_left_out():
    table = text(measured())
    assert all(len(line) <= 80 for line in table.splitlines()), table
    row = next(line for line in table.splitlines() if line.startswith("ctr "))
    assert row.split() == [
        "ctr",
        "10.0",
        "s",
        "10.0-10.0",
        "0.25",
        "8.0",
        "150",
        "8,000",
        "15.0",
        "s",
        "50",
    ]
    assert "left out: umoci (unpack only): it does not know zstd" in table


def test_a_page_gets_the_figures_between_its_marks():
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert placed(page, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert placed(placed(page, "new"), "newer") == placed(page, "newer")
    assert placed("", "new") == "new\n"


def test_markdown_has_every_image_and_marks_what_misses_its_target():
    report = Report({"cores": "2"}, {"caches": "warm"}, [measured(), measured("deep:gzip")])
    page = markdown(report)
    assert "### large:gzip" in page
    assert "### deep:gzip" in page
    assert "| unpack only, gzip, beside containerd | 0.25 | 0.3 |" in page
    assert "| unpack only, gzip, times the highest roofline | **2.00** | 1.35 |" in page


def test_targets_are_told_where_there_is_a_measurement():
    assert [target.value for target in reached([measured()])] == [0.25, 0.5, 0.5, 2.0, 50.0]
    assert reached([measured("another")]) == []


def test_a_report_is_read_as_it_was_written_and_of_an_image_the_last_counts():
    first = Report({"cores": "2"}, {}, [measured(), measured("deep:gzip")])
    again = msgspec.json.decode(msgspec.json.encode(first), type=Report)
    assert again == first
    later = Report({"cores": "4"}, {}, [dataclasses.replace(measured(), layers=9)])
    both = merged([again, later])
    assert [image.layers for image in both.images] == [9, 3]
    assert both.machine == {"cores": "4"}


def test_options():
    options = parser().parse_args(
        ["large", "deep:zstd", "--peer", "tar,tar+sync", "--backend", "copy,aufs"]
    )
    assert (options.image, options.peer) == (["large", "deep:zstd"], ["tar", "tar+sync"])
    assert (options.backend, options.stage) == (["copy", "aufs"], ["unpack", "import"])
    assert (options.repeat, options.cache) == (5, "warm")
    with pytest.raises(argparse.ArgumentTypeError, match="zip"):
        listed("tar", "ctr")("tar,zip")
    with pytest.raises(argparse.ArgumentTypeError, match="nothing"):
        listed("tar")(",")


def test_work_shared_is_told_as_multiples_of_one():
    busy = {
        "one caller": 2.0,
        "ten images on one base": 2.2,
        "ten callers, one image": 2.0,
        "one command": 2.5,
        "a command that finds all done": 0.5,
        "ten commands, one image": 7.0,
    }
    assert [each.value for each in multiples(busy)] == [1.1, 1.0, 1.0]


def pull_cost(seconds: float, **more: float) -> pulled.PullCost:
    return pulled.PullCost(seconds, seconds, 0.0, 10**6, 10**6, **more)


def pulls(**turns: list[pulled.PullCost]) -> pulled.PullReport:
    named = {name.replace("_", " "): costs for name, costs in turns.items()}
    return pulled.PullReport({"cores": "2"}, "large:gzip", 400 * 10**6, 0.02, 100e6, named)


def test_figures_of_pulls_are_told_as_far_as_there_are_measurements():
    report = pulls(
        full=[pull_cost(5.0), pull_cost(4.0), pull_cost(9.0)],
        lazy=[pull_cost(4.0)],
        ctr=[pull_cost(16.0)],
        far=[pull_cost(4.4)],
        transfer=[pull_cost(4.0)],
        unpack=[pull_cost(3.0)],
        again=[pull_cost(0.25, requests=2)],
        one_caller=[pull_cost(4.0)],
        ten_callers=[],
    )
    found = pulled.figures(report)
    assert [(figure.value, figure.misses) for figure in found] == [
        (5.0 / 16.0, False),
        (0.25, False),
        (4.4 / 4.0, False),
        (0.05, False),
        (2, False),
    ]
    page = pulled.markdown(report)
    assert "| full | 5.00 s | 4.00-9.00 | 5.0 s | 1 | 0.0 s |" in page
    again = msgspec.json.decode(msgspec.json.encode(report), type=pulled.PullReport)
    assert again == report
    later = pulls(full=[pull_cost(2.0)], ten_callers=[pull_cost(4.0)])
    both = pulled.merged([again, later]).turns
    assert {name: both[name] for name in ("lazy", "full", "ten callers")} == {
        "lazy": report.turns["lazy"],
        **later.turns,
    }


def test_what_left_the_registry_more_than_once_is_marked_however_little_it_is():
    found = pulled.figures(
        pulls(
            one_caller=[pull_cost(4.0, sent=10**9)],
            ten_callers=[pull_cost(4.4, sent=10**9), pull_cost(4.0, sent=10**9 + 1)],
            ten_processes=[pull_cost(8.0, sent=2 * 10**9)],
        )
    )
    assert [(figure.most, figure.misses) for figure in found] == [
        (1.05, False),
        (1, True),
        (None, False),
        (None, False),
    ]


def test_an_access_log_tells_what_a_registry_gave():
    line = '127.0.0.1 - - [now] "{} /v2/a/{} HTTP/1.1" {} {} "" "x"\n'.format
    said = line("HEAD", "manifests/1", 200, 9) + line("GET", "blobs/sha256:a", 200, 7)
    said += line("GET", "blobs/sha256:b", 206, 5) + line("GET", "blobs/sha256:b", 206, 4)
    assert tally(said, 0.5) == Served(4, 16, 0.5)
    said += line("HEAD", "blobs/sha256:b", 200, 5) + line("GET", "blobs/sha256:a", 404, 7)
    assert tally(said, 0.5) == Served(6, 16, 0.5)
    assert tally("", 0.0) == Served(0, 0, 0.0)


def test_figures_of_containers_are_told_as_far_as_there_are_measurements():
    turns = {
        "runc run": [0.02, 0.01, 0.03],
        "provisioned": [0.025],
        "runc run from the shell": [0.02],
        "imports": [0.2],
        "lamina run": [0.25],
        "provision and destroy": [0.005],
        "podman create and rm": [0.075],
        "beside many": [],
        "beside none": [0.003],
        "recover": [2.5],
    }
    report = contained.ContainerReport({"cores": "2"}, 1000, 20, turns)
    found = contained.figures(report)
    assert [(figure.value, figure.misses) for figure in found] == [
        (pytest.approx(1.25), False),
        (pytest.approx(2.5), True),
        (pytest.approx(1 / 15), False),
        (2.5, True),
    ]
    page = contained.markdown(report)
    assert "| recover of 1,000 containers, seconds | **2.50** | 2 | 2500.0 ms |" in page
    assert "| runc run | 3 | 20.0 ms | 10.0-30.0 |" in page
    again = msgspec.json.decode(msgspec.json.encode(report), type=contained.ContainerReport)
    assert again == report
    later = dataclasses.replace(report, turns={"recover": [1.0]})
    assert contained.merged([again, later]).turns == {**turns, "recover": [1.0]}
    assert {figure.most for figure in found} <= set(CONTAINERS.values())
