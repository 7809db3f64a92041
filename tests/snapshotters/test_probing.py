"""What trying a backend out leaves alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.errors import InvalidArgument
from engine.mount import Mount, mounted
from snapshotters import overlay

pytestmark = pytest.mark.root


@pytest.mark.parametrize("is_known", [True, False])
def test_overlay_is_tried_without_a_flush_where_the_kernel_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool
):
    tried = []

    @contextmanager
    def recorded(mounts: Sequence[Mount], target: Path) -> Iterator[None]:
        if mounts[0].type == "overlay":
            tried.append("volatile" in mounts[0].options)
            if not is_known and tried[-1]:
                raise InvalidArgument("no such option")
        with mounted(mounts, target):
            yield

    monkeypatch.setattr(overlay, "mounted", recorded)
    assert overlay.plugin.probe(tmp_path).mounts
    assert tried == ([True] if is_known else [True, False])
