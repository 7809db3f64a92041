"""Hostile layers: every row of the attack catalogue that the apply path meets, on every backend.

What decides is the table of layer rules in docs/layers.md; each row ends in an error that leaves
nothing, or in one exact tree, the same on every backend.
"""

import pytest

from engine import limits
from engine.stores import Stores
from engine.testing.trees import differences
from tests.security.harness import Fails, Input, World, expected, layers_of, run
from tests.security.rows_archives import ARCHIVES
from tests.security.rows_attributes import ATTRIBUTES
from tests.security.rows_paths import PATHS
from tests.security.rows_whiteouts import WHITEOUTS
from tests.support import BACKENDS, apply_stack, tree_of

pytestmark = pytest.mark.root

ROWS = (*PATHS, *WHITEOUTS, *ATTRIBUTES, *ARCHIVES)
INPUTS = [pytest.param(case, id=f"{row.id}-{name}") for row in ROWS for name, case in row.inputs.items()]
"""Every input of every row."""


def _is_applied_stack(case: Input) -> bool:
    """Say whether layers are combined here, which each backend does in its own way."""
    several = callable(case.layers) or len(case.layers) > 1
    return several and not isinstance(case.expect, Fails)


STACKS = [param for param in INPUTS if _is_applied_stack(param.values[0])]


@pytest.fixture
def bounded(request, monkeypatch):
    """Lower the bounds that the input asks for."""
    for name, value in request.getfixturevalue("case").limits.items():
        assert value < getattr(limits, name)
        monkeypatch.setattr(limits, name, value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.usefixtures("umask_0", "bounded")
def test_hostile(case: Input, backend: str, stores: Stores, world: World):
    run(case, backend, stores, world)


@pytest.mark.parametrize("case", STACKS)
@pytest.mark.usefixtures("umask_0", "bounded")
def test_backends_agree(case: Input, stores: Stores, world: World):
    """What is applied has the same attributes and times on every backend, not only the same shape."""
    fitting = [name for name in BACKENDS if not isinstance(expected(case, name, world), Fails)]
    layers = layers_of(case, world)
    trees = {
        name: tree_of(stores, name, apply_stack(stores.snapshotter(name), layers), world.top / "mnt")
        for name in fitting
    }
    for name in fitting[1:]:
        assert differences(trees[fitting[0]], trees[name]) == []
