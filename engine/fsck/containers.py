"""Checks that each container has what it was made of, and each folder of one a container.

Sync. A record comes before its folder and goes after it: a folder of which a look after it was seen
finds no record is nobody's for ever. Children are noted with their records, in one transaction.
"""

import os
from collections.abc import Iterator
from functools import partial

from engine.errors import FailedPrecondition, os_errors
from engine.fs.attributes import folder_descriptor
from engine.fs.removal import remove_entry
from engine.fsck.findings import Finding, Trouble, What
from engine.kv.environment import Transaction
from engine.kv.schema import CONTAINERS, KIN, MOUNTS, SNAPSHOTS, Container, Kin
from engine.kv.table import Damaged
from engine.metadata.containers import ON_THE_WAY
from engine.provision.places import all_folders, folder_of, is_unique, mount_keys
from engine.root import Root

__all__ = ["check_containers"]


def check_containers(root: Root) -> Iterator[Trouble]:
    """Yield what is wrong with containers, and the folders that belong to none."""
    try:
        names = sorted(os.listdir(all_folders(root.path)))
    except FileNotFoundError:
        names = []
    with root.meta.read() as txn:
        found = [(key[0], one) for key, one in CONTAINERS.entries(txn)]
        known = [(space, one) for space, one in found if isinstance(one, Container)]
        troubles = [trouble for space, one in known for trouble in _missing(root, txn, space, one)]
    yield from troubles
    if len(known) < len(found):
        return  # whose the folders are, nobody knows
    uniques = {one.unique for _, one in known}
    for name in names:
        if name not in uniques:
            is_ours = is_unique(name)
            detail = "no container has it" if is_ours else "it is nothing of lamina's; move it away"
            finding = Finding(
                what=What.FOLDER, name=f"containers/{_shown(name)}", detail=detail, is_damage=is_ours
            )
            yield Trouble(finding, partial(_remove, root, name) if is_ours else None)


def _missing(root: Root, txn: Transaction, namespace: str, container: Container) -> Iterator[Trouble]:
    def told(detail: str) -> Finding:
        return Finding(what=What.CONTAINER, name=container.id, namespace=namespace, detail=detail)

    parent = container.parent
    if parent and CONTAINERS.any(txn, namespace, parent):
        if not KIN.any(txn, namespace, parent, container.id):
            finding = told(f"it is not noted as a child of {parent}")
            yield Trouble(finding, partial(_note_child, root, namespace, container))
    elif parent:
        yield Trouble(told(f"its parent {parent} is gone; remove it with `lamina rm {container.id}`"))
    if container.state in ON_THE_WAY:
        return
    for key in mount_keys(container):
        has_mount = MOUNTS.any(txn, namespace, key)
        if not (has_mount and SNAPSHOTS.any(txn, container.backend, namespace, key)):
            detail = f"its root file system {key} is gone; remove it with `lamina rm {container.id}`"
            yield Trouble(told(detail))


def _note_child(root: Root, namespace: str, container: Container) -> str:
    with root.meta.write() as txn:
        if CONTAINERS.get(txn, namespace, container.id) != container:
            raise FailedPrecondition("it was changed meanwhile; check once more")
        kin = Kin(parent=container.parent, child=container.id)
        KIN.put(txn, kin, namespace, container.parent, container.id)
    return "noted"


def _remove(root: Root, name: str) -> str:
    """Remove a folder that is nobody's; a mount in it is told of, and keeps it."""
    with root.meta.read() as txn:
        for _, record in CONTAINERS.entries(txn):
            if isinstance(record, Damaged) or record.unique == name:
                raise FailedPrecondition("a record has it by now; check once more")
    with os_errors(str(folder_of(root.path, name))), folder_descriptor(all_folders(root.path)) as above:
        remove_entry(above, os.fsencode(name))
    return "removed"


def _shown(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
