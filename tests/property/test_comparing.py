"""A snapshot of any layers is equal to them when it is compared, and to no others."""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given

from engine.diff.compare import Difference, compare_layer
from engine.oci.digest import digest_of
from engine.oci.identity import chain_ids
from engine.root import Root
from engine.snapshots import Snapshotter
from engine.stores import Stores
from tests.conftest import AMD64
from tests.property.layer_model import Member
from tests.property.test_layer_stacks import STACKS, expected_tree, packed
from tests.support import BACKENDS, apply_stack

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("umask_0")]

ROUNDS = itertools.count()


def compared(backend: Snapshotter, layers: Sequence[bytes]) -> list[Difference]:
    """Return what differs in the snapshots of a stack."""
    found: list[Difference] = []
    diff_ids = [digest_of(layer) for layer in layers]
    for layer, diff_id, key in zip(layers, diff_ids, chain_ids(diff_ids), strict=True):
        pieces = [layer[at : at + 1000] for at in range(0, len(layer), 1000)]
        came = compare_layer(pieces, backend.comparing(key), diff_id=diff_id)
        assert came.diff_id == diff_id
        found += came.differences
    return found


@given(stack=STACKS)
def test_what_was_applied_is_equal(stack: list[list[Member]], tmp_path: Path) -> None:
    assume(expected_tree(stack) is not None)
    here = tmp_path / str(next(ROUNDS))
    with Root(here) as root:
        stores = Stores(root, "default", AMD64)
        for name in BACKENDS:
            layers = [packed(layer) for layer in stack]
            backend = stores.snapshotter(name)
            apply_stack(backend, layers)
            assert compared(backend, layers) == [], name
        stores.close()
    shutil.rmtree(here)
