"""A snapshot of any layers is equal to them when it is compared, and to no others."""

import itertools
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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
            for key in chain_ids([digest_of(layer) for layer in layers]):
                assert backend.measure(key).inodes == backend.usage(key).inodes, name
        stores.close()
    shutil.rmtree(here)


def remove(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def chmod(path: bytes) -> None:
    if os.path.islink(path):
        remove(path)
    else:
        os.chmod(path, os.lstat(path).st_mode ^ 0o001)


def add(path: bytes) -> None:
    folder = path if os.path.isdir(path) and not os.path.islink(path) else os.path.dirname(path)
    with open(os.path.join(folder, b"zz"), "xb"):
        pass


def give_away(path: bytes) -> None:
    os.chown(path, os.lstat(path).st_uid + 1, -1, follow_symlinks=False)


def turn(path: bytes) -> None:
    """Put a file where a folder was, and a folder where anything else was."""
    was_folder = os.path.isdir(path) and not os.path.islink(path)
    remove(path)
    if was_folder:
        with open(path, "xb"):
            pass
    else:
        os.mkdir(path)


DAMAGE = (remove, chmod, add, give_away, turn)


@given(stack=STACKS, at=st.integers(0, 10_000), damage=st.sampled_from(DAMAGE))
def test_whatever_is_done_to_it_is_found(
    stack: list[list[Member]], at: int, damage: Callable[[bytes], None], tmp_path: Path
) -> None:
    assume(expected_tree(stack) is not None)
    here = tmp_path / str(next(ROUNDS))
    with Root(here) as root:
        stores = Stores(root, "default", AMD64)
        for name in BACKENDS:
            layers = [packed(layer) for layer in stack]
            backend = stores.snapshotter(name)
            apply_stack(backend, layers)
            paths = sorted(
                os.path.join(folder, name)
                for tree in root.snapshots.joinpath(name).glob("*/fs")
                for folder, folders, files in os.walk(os.fsencode(tree))
                for name in (*folders, *files)
            )
            # What a marker of the union has besides its name says nothing.
            paths = [path for path in paths if not is_marker(path)]
            if paths:
                damage(paths[at % len(paths)])
                assert compared(backend, layers), (name, paths[at % len(paths)])
        stores.close()
    shutil.rmtree(here)


def is_marker(path: bytes) -> bool:
    info = os.lstat(path)
    is_device = stat.S_ISCHR(info.st_mode) and not info.st_rdev
    return is_device or os.path.basename(path).startswith(b".wh.")
