"""Each invariant of docs/testing.md has tests that are named after it, or a reason why not."""

import re
from pathlib import Path

import pytest

_TOP = Path(__file__).parents[1]
_INVARIANTS = [
    *(f"GC-{number:02}" for number in range(1, 25)),
    *(f"P{number}" for number in range(1, 13)),
    *(f"MS-{number:02}" for number in (*range(4, 16), 18, 24, *range(26, 39))),
    *(f"ND-{number:02}" for number in range(1, 14)),
    *(f"R-{number:02}" for number in (*range(1, 13), 14, 15, 16)),
    *(f"CRI-{number:02}" for number in range(4, 18)),
    *(f"UP-{number:02}" for number in range(1, 22)),
    *(f"MC-{number:02}" for number in range(1, 16)),
    *(f"BK-{number:02}" for number in range(1, 19)),
    *("E-01", "E-02", "E-05", "P-18", "P-19", "P-31", "M-15"),
]
_ROWS = {
    found[1]: found[2]
    for found in re.finditer(
        r"^\| ([A-Z]+-\d\d|P\d+) \|[^|]+\| ([^|]+) \|$",
        (_TOP / "docs" / "testing.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
}


@pytest.mark.parametrize("invariant", _INVARIANTS)
def test_an_invariant_has_tests(invariant):
    said = _ROWS[invariant]
    tests = re.findall(r"`([^`:]+)::([^`]+)`", said)
    assert tests or said.startswith("not "), "neither a test nor a reason"
    for path, name in tests:
        source = (_TOP / path).read_text(encoding="utf-8")
        assert re.search(rf"^(def |class )?{name}\b", source, re.MULTILINE), f"{path} has no {name}"
        # `gc_01_03_04` is named after all three, `up_20c` after a part; P12 is `p12`, and P-12 `p_12`.
        kind, number = re.fullmatch(r"([A-Z]+)-?(\d+)", invariant).groups()
        plain = r"[pP](\d+)" if "-" not in invariant else rf"(?:_|\b){kind.lower()}((?:_?\d\d[a-z]?)+)"
        numbers = re.findall(plain, name)
        assert number in re.findall(r"\d+", " ".join(numbers)), f"{name} is not named after {invariant}"


def test_there_are_no_others():
    assert sorted(_ROWS) == sorted(_INVARIANTS)
