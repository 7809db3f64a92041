"""Checks that no attack of the catalogue is forgotten: each has rows here, or a reason why not."""

import re
from pathlib import Path

from tests.security.test_hostile_layers import ROWS

CATALOGUE = {
    # paths and links; whiteouts; attributes; the archive's bytes. Gaps are numbers that were merged.
    "P": [*range(1, 5), *range(6, 14), *range(15, 28), 29, 31],
    "H": [*range(1, 11), *range(12, 16), 17, 18],
    "X": [*range(1, 11), *range(13, 18)],
    "T": [1, *range(3, 14), *range(15, 19), 20, 21],
}

NOT_APPLY_PATH = {
    "P-18": "reading /etc/passwd and its like out of an image: tests/provision/test_users.py",
    "P-19": "volumes and working folder of a config: tests/running/test_hostile_rootfs.py",
    "P-20": "a container that swaps folders meanwhile: nobody else can write to what is being applied",
    "P-21": "links and foreign folders inside the store: checked where the root is opened",
    "P-22": "digests as paths: parsed before a layer is looked for, tested with the digest parser",
    "P-31": "files written into a container's root: tests/provision/test_inside.py",
    "X-15": "the immutable flag: no archive holds it, and none of these backends sets it",
    "T-21": "comparison with other readers over random archives: a property test of the tar reader",
}

APART = {"P-16", "X-01", "X-03", "X-13", "X-14", "X-16", "X-17"}
"""Those that have a test in test_hostile_apart.py beside their rows."""


def test_every_attack_has_rows_or_a_reason():
    ids = {f"{table}-{number:02}" for table, numbers in CATALOGUE.items() for number in numbers}
    rows = [row.id for row in ROWS]
    assert len(rows) == len(set(rows))
    assert set(rows) | NOT_APPLY_PATH.keys() == ids
    assert not set(rows) & NOT_APPLY_PATH.keys()


def test_every_row_has_inputs_and_a_reason():
    for row in ROWS:
        assert row.inputs, row.id
        assert row.why, row.id


def test_what_is_tested_apart_is():
    text = Path(__file__).with_name("test_hostile_apart.py").read_text(encoding="utf-8")
    assert set(re.findall(r'"""([PHXT]-\d\d)', text)) >= APART
