"""A further command in a container, as the runtime reads it: like the first but for what was asked.

Sync; safe from any thread.
"""

from pathlib import Path

import msgspec

from engine.errors import os_errors
from engine.oci.runtime_spec import ContainerUser, Spec
from engine.provision.inside import open_rootfs
from engine.provision.users import resolve_user
from engine.running.options import ExecOptions

__all__ = ["write_process"]


def write_process(folder: Path, options: ExecOptions, target: Path) -> None:
    """Write `process` of a specification for a command in the container of a folder.

    NotFound for a user whom its root file system does not know, and what else `resolve_user` raises. A
    runtime that is told a user by options of its own would add to the groups of the first process.
    """
    with os_errors(str(folder)):
        spec = msgspec.json.decode((folder / "config.json").read_bytes(), type=Spec)
        first = spec.process
        user, env = first.user, options.env
        if options.user:
            with open_rootfs(Path(spec.root.path)) as root:
                account = resolve_user(root, options.user)
            user = ContainerUser(uid=account.uid, gid=account.gid, additional_gids=account.groups)
            env = (f"HOME={account.home}", *env)
        over = {variable.partition("=")[0] for variable in env}
        kept = [variable for variable in first.env if variable.partition("=")[0] not in over]
        process = msgspec.structs.replace(
            first,
            args=options.args,
            env=[*kept, *env],
            cwd=options.cwd or first.cwd,
            user=user,
            terminal=options.terminal,
        )
        target.write_bytes(msgspec.json.encode(process))
