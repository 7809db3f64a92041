"""What works is found by trying it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import plugins
from engine.errors import InvalidArgument, NotSupported
from engine.mount import Mount, mounted
from engine.root import open_root
from snapshotters import overlay
from tests.filesystems import formatted

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


def test_bk_01_03_what_does_not_work_is_passed_over(tmp_path: Path):
    """On an overlay no overlay can be mounted, whatever the kernel knows."""
    for name in ("lower", "upper", "work", "disk"):
        (tmp_path / name).mkdir()
    layers = [f"{option}dir={tmp_path}/{option}" for option in ("lower", "upper", "work")]
    disk = Mount(type="overlay", source="overlay", options=layers)
    with mounted([disk], tmp_path / "disk"), open_root(tmp_path / "disk/root") as root:
        probes = {backend.name: backend.probe for backend in plugins.backends(root)}
        assert not probes["overlay"].mounts
        assert probes["overlay"].reason
        assert probes["copy"].mounts
        assert plugins.default_name(root) == next(name for name in probes if probes[name].mounts)


def test_bk_02_04_what_does_not_work_is_refused_by_name(tmp_path: Path):
    """Overlay needs listings that tell types."""
    (tmp_path / "disk").mkdir()
    made = formatted("ext4", tmp_path / "image", tmp_path / "disk", make=("-O", "^filetype"))
    with made as disk, open_root(disk / "root") as root:
        with pytest.raises(NotSupported, match=r"overlay does not work here: .* do not tell types"):
            plugins.check(root, "overlay")
        with pytest.raises(InvalidArgument, match="no snapshotter 'other'"):
            plugins.check(root, "other")
        plugins.check(root, "copy")
