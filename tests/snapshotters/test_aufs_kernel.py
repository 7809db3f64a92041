"""The aufs backend on a kernel that has aufs: run there with `-m aufs`; nowhere else can it pass."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.mount import mounted
from engine.root import Root
from engine.snapshots import Snapshotter
from engine.stores import Stores
from engine.testing.snapshotter_suite import SnapshotterSuite
from engine.testing.trees import differences, read_tree
from snapshotters import aufs
from snapshotters.probe import knows_file_system
from tests.conftest import AMD64
from tests.property.layer_model import Member, describe
from tests.property.test_layer_stacks import ROUNDS, STACKS, expected_tree, packed
from tests.snapshotters.test_settling import ENTRIES
from tests.support import apply_stack, branches, commit_chain
from tests.union_reader import read_union

pytestmark = [pytest.mark.aufs, pytest.mark.root, pytest.mark.usefixtures("umask_0")]


@pytest.fixture(autouse=True)
def _kernel() -> None:
    assert knows_file_system("aufs"), "this kernel has no aufs (try `modprobe aufs`)"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    with Root(tmp_path / "root") as opened:
        yield opened


@pytest.mark.parametrize("check", SnapshotterSuite.names())
def test_contract(check: str, root: Root, tmp_path: Path) -> None:
    def make() -> Snapshotter:
        return aufs.plugin.create(root.snapshots / "aufs", root.meta, "default")

    SnapshotterSuite(make, tmp_path).run(check)


def check_stack(stack: list[list[Member]], tmp_path: Path, *, at_once: bool) -> None:
    """Hold the kernel's view of a stack against the model's, and the test's own reader's."""
    expected = expected_tree(stack)
    if expected is None:
        return
    here, target = tmp_path / str(next(ROUNDS)), tmp_path / "mnt"
    target.mkdir(exist_ok=True)
    with Root(here) as opened:
        stores = Stores(opened, "default", AMD64)
        backend = stores.snapshotter("aufs")
        layers = [packed(layer) for layer in stack]
        top = commit_chain(backend, layers) if at_once else apply_stack(backend, layers)
        for make in (backend.view, backend.prepare):
            with mounted(make(make.__name__, top), target):
                seen = read_tree(target)
            assert not differences(seen, describe(expected))
        assert not differences(seen, read_union(branches(stores, top)))
        stores.close()
    shutil.rmtree(here)


@given(stack=STACKS, at_once=st.booleans())
@settings(max_examples=250)
def test_the_kernel_agrees_with_the_model(
    stack: list[list[Member]], at_once: bool, tmp_path: Path
) -> None:
    check_stack(stack, tmp_path, at_once=at_once)


@given(stack=st.lists(st.lists(ENTRIES, max_size=5), min_size=3, max_size=6))
@settings(max_examples=250)
def test_the_kernel_agrees_on_folders_replaced_again_and_again(
    stack: list[list[Member]], tmp_path: Path
) -> None:
    check_stack(stack, tmp_path, at_once=True)
