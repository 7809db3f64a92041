"""Mounts: long option lists by both ways, unwinding, and knowing what is in use."""

import errno
import os
from pathlib import Path

import pytest

from engine import mount as mounting
from engine.errors import (
    EngineError,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
)
from engine.mount import Mount, activate, deactivate, deactivate_below, mounted, with_options, writes_to
from engine.mounts.options import REMOUNT
from engine.mounts.table import MountTable, is_mounted

pytestmark = pytest.mark.root


def uses(folder: Path) -> bool:
    return MountTable.read().uses(folder)


def lower_folders(folder: Path, count: int) -> list[Path]:
    lowers = [folder / f"lower-{number:03}-{'x' * 60}" for number in range(count)]
    for number, lower in enumerate(lowers):
        lower.mkdir(parents=True)
        (lower / f"file{number}").touch()
    return lowers


def overlay_of(lowers: list[Path]) -> Mount:
    joined = "lowerdir=" + ":".join(map(str, lowers))
    return Mount(type="overlay", source="overlay", options=["ro", joined, "index=off"])


def unknown(*_arguments: object) -> None:
    raise OSError(errno.EINVAL, "Invalid argument")


def test_more_layers_than_a_page_of_options(tmp_path: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    with mounted([overlay_of(lower_folders(tmp_path, 100))], target):
        assert len(list(target.iterdir())) == 100


def test_the_same_on_a_kernel_without_lowerdir_plus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fallback of older kernels, which names layers relative to their folder: short names fit.
    lowers = [tmp_path / ("z" * 150) / str(number) for number in range(60)]
    for number, lower in enumerate(lowers):
        lower.mkdir(parents=True)
        (lower / f"file{number}").touch()
    target = tmp_path / "mnt"
    target.mkdir()
    where = Path.cwd()

    monkeypatch.setattr(mounting, "_mount_by_parts", unknown)
    with mounted([overlay_of(lowers)], target):
        assert len(list(target.iterdir())) == 60
    assert Path.cwd() == where, "the process itself must not move"
    with pytest.raises(ResourceExhausted, match="too many layers"):
        activate([overlay_of(lower_folders(tmp_path / "long", 100))], target)
    assert not is_mounted(target)


def test_a_list_is_mounted_whole_or_not_at_all(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "mnt"
    (source / "below").mkdir(parents=True)
    target.mkdir()
    bind = Mount(type="bind", source=str(source), options=["rbind", "rw"])
    below = Mount(type="tmpfs", source="tmpfs", options=["size=1m"], target="/below")
    missing = Mount(type="bind", source=str(tmp_path / "nowhere"), options=["rbind"], target="/below")
    with pytest.raises(NotFound, match="mounting bind on"):
        activate([bind, below, missing], target)
    assert not is_mounted(target)


def test_only_what_is_below_a_folder_is_taken_out_of_sight(tmp_path: Path) -> None:
    folder, beside = tmp_path / "folder", tmp_path / "folder-beside"
    tmpfs = Mount(type="tmpfs", source="tmpfs", options=["size=1m"])
    for place in (folder / "a", beside):
        place.mkdir(parents=True)
    with mounted([tmpfs], beside):
        activate([tmpfs], folder / "a")
        (folder / "a" / "b").mkdir()
        activate([tmpfs], folder / "a" / "b")  # the outer one first would take this one with it
        deactivate_below(folder)
        assert is_mounted(beside)
    assert not is_mounted(folder / "a")


def test_a_list_may_mount_below_its_first(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "mnt"
    (source / "below").mkdir(parents=True)
    (source / "file").touch()
    target.mkdir()
    mounts = [
        Mount(type="bind", source=str(source), options=["rbind", "rw"]),
        Mount(type="tmpfs", source="tmpfs", options=["size=1m"], target="/below"),
    ]
    with mounted(mounts, target):
        assert (target / "file").exists()
        assert is_mounted(target / "below")
        (target / "below" / "new").touch()
    assert not is_mounted(target)
    assert list((source / "below").iterdir()) == []


@pytest.mark.parametrize("fails", ["remount", "statvfs"])
def test_a_bind_that_cannot_be_made_read_only_is_none(
    tmp_path: Path, fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel makes every bind writable at first: one that stays so must not stay at all.
    source, target = tmp_path / "source", tmp_path / "mnt"
    source.mkdir()
    target.mkdir()
    real = mounting._mount

    def no_remount(where: str, place: str, kind: str, flags: int, data: str) -> None:
        if flags & REMOUNT:
            raise OSError(errno.EPERM, "Operation not permitted")
        real(where, place, kind, flags, data)

    def no_statvfs(_path: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if fails == "remount":
        monkeypatch.setattr(mounting, "_mount", no_remount)
    else:
        monkeypatch.setattr(os, "statvfs", no_statvfs)
    bind = Mount(type="bind", source=str(source), options=["rbind", "ro"])
    with pytest.raises(PermissionDenied):
        activate([bind], target)
    assert not is_mounted(target)


def test_read_only_binds_are_read_only(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "mnt"
    source.mkdir()
    target.mkdir()
    with (
        mounted([Mount(type="bind", source=str(source), options=["rbind", "ro"])], target),
        pytest.raises(OSError, match="Read-only"),
    ):
        (target / "file").touch()


def test_knows_mount_points_with_odd_names(tmp_path: Path) -> None:
    target = tmp_path / "a b\tc\\d\r\x1c\x0b\x85\n"
    target.mkdir()
    bind = Mount(type="bind", source=str(tmp_path), options=["rbind", "ro"])
    assert not is_mounted(target)
    with mounted([bind], target):
        assert is_mounted(target)
    assert not is_mounted(target)


@pytest.mark.parametrize("kind", ["bind", "lower", "upper"])
def test_knows_what_a_mount_is_made_of(tmp_path: Path, kind: str) -> None:
    folders = [tmp_path / "snapshots" / "overlay" / str(number) for number in (1, 2, 11)]
    for folder in folders:
        (folder / "fs").mkdir(parents=True)
        (folder / "work").mkdir()
    target = tmp_path / "mnt"
    target.mkdir()
    one, two, eleven = folders
    options = {
        "bind": ("bind", f"{one}/fs", ["rbind", "ro"]),
        "lower": ("overlay", "overlay", ["ro", f"lowerdir={one}/fs:{eleven}/fs"]),
        "upper": (
            "overlay",
            "overlay",
            [f"lowerdir={eleven}/fs", f"upperdir={one}/fs", f"workdir={one}/work"],
        ),
    }
    type_, source, words = options[kind]
    assert not uses(one)
    with mounted([Mount(type=type_, source=source, options=words)], target):
        assert uses(one)
        assert not uses(two)
    assert not uses(one)


def test_unmounting_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        deactivate(tmp_path)


def test_a_link_to_a_mount_is_not_unmounted(tmp_path: Path) -> None:
    # Else whoever can put a link in the way would choose what goes.
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to("mnt")
    bind = Mount(type="bind", source=str(tmp_path), options=["rbind"])
    with mounted([bind], tmp_path / "mnt"):
        for lazy in (False, True):
            with pytest.raises(EngineError, match="unmounting"):
                deactivate(tmp_path / "link", lazy=lazy)
        assert is_mounted(tmp_path / "mnt")


def test_a_busy_mount_is_not_unmounted(tmp_path: Path) -> None:
    target = tmp_path / "mnt"
    target.mkdir()
    activate([Mount(type="tmpfs", source="tmpfs", options=["size=1m"])], target)
    with (target / "file").open("w"), pytest.raises(FailedPrecondition, match="in use"):
        deactivate(target)
    assert is_mounted(target)
    deactivate(target)


@pytest.mark.parametrize("kind", ["bind", "overlay", "relative overlay"])
def test_flags_reach_the_mount(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "relative overlay":
        monkeypatch.setattr(mounting, "_mount_by_parts", unknown)
    lowers = lower_folders(tmp_path, {"bind": 2, "overlay": 100}.get(kind, 40))
    target = tmp_path / "mnt"
    target.mkdir()
    bind = Mount(type="bind", source=str(lowers[0]), options=["rbind", "rw"])
    mount = bind if kind == "bind" else overlay_of(lowers)
    with mounted(with_options([mount], ["nosuid", "nodev", "noexec"]), target):
        shown = os.statvfs(target).f_flag
    assert shown & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC) == 0xE
    assert bool(shown & os.ST_RDONLY) == (kind != "bind")


def test_a_bind_keeps_what_the_mount_of_its_source_forbids(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "mnt"
    source.mkdir()
    target.mkdir()
    outer = Mount(type="tmpfs", source="tmpfs", options=["size=1m", "nosuid", "noexec"])
    with mounted([outer], source):
        bind = Mount(type="bind", source=str(source), options=["rbind", "ro"])
        with mounted([bind], target):
            shown = os.statvfs(target).f_flag
    assert shown & (os.ST_NOSUID | os.ST_NOEXEC | os.ST_RDONLY) == os.ST_NOSUID | os.ST_NOEXEC | 1


def test_a_long_aufs_mount_is_made_in_calls_of_a_page_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No kernel here has aufs: what it would be told is written down.
    calls: list[tuple[int, str]] = []

    def noted(_source: str, _target: str, kind: str, flags: int, data: str) -> None:
        assert kind == "aufs"
        calls.append((flags, data))

    monkeypatch.setattr(mounting, "_mount", noted)
    branches = ":".join(f"/{'x' * 100}/{number}=ro+wh" for number in range(120))
    options = ["ro", "dio", f"br:{branches}", "nosuid"]
    activate([Mount(type="aufs", source="none", options=options)], tmp_path)
    assert [flags for flags, _ in calls] == [0x3] + [0x23] * (len(calls) - 1)
    assert len(calls) > 2
    assert all(len(data) < 4095 for _, data in calls)


def test_a_long_aufs_mount_is_whole_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The first piece is mounted (here as a tmpfs), a later one is refused: lower branches are missing.
    real = mounting._mount

    def short(_source: str, target: str, _kind: str, flags: int, _data: str) -> None:
        if flags & REMOUNT:
            raise OSError(errno.EINVAL, "Invalid argument")
        real("tmpfs", target, "tmpfs", 0, "")

    monkeypatch.setattr(mounting, "_mount", short)
    branches = ":".join(f"/{'x' * 100}/{number}=ro+wh" for number in range(120))
    with pytest.raises(EngineError):
        activate([Mount(type="aufs", source="none", options=[f"br:{branches}"])], tmp_path)
    assert not is_mounted(tmp_path)


@pytest.mark.parametrize(
    ("mounts", "folder"),
    [
        ([Mount(type="bind", source="/a", options=["rbind", "rw"])], "/a"),
        ([Mount(type="bind", source="/a", options=["rbind", "ro"])], None),
        ([Mount(type="overlay", source="overlay", options=["lowerdir=/l", "upperdir=/u"])], "/u"),
        ([Mount(type="overlay", source="overlay", options=["ro", "lowerdir=/l:/m"])], None),
        ([Mount(type="aufs", source="none", options=["dio", "br:/u=rw:/l=ro+wh"])], "/u"),
        ([Mount(type="aufs", source="none", options=["ro", "dio", "br:/l=ro+wh"])], None),
    ],
)
def test_knows_where_what_is_written_goes(mounts: list[Mount], folder: str | None) -> None:
    assert writes_to(mounts) == (Path(folder) if folder else None)
