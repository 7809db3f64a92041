"""A further command in a container, as the runtime reads it: like the first but for what was asked.

Sync; safe from any thread.
"""

from pathlib import Path

import msgspec

from engine.errors import os_errors
from engine.oci.runtime_spec import ContainerUser, Spec
from engine.running.runc import ExecCommand

__all__ = ["write_process"]


def write_process(folder: Path, command: ExecCommand, target: Path) -> None:
    """Write `process` of a specification for a command in the container of a folder.

    A runtime that is told a user by options would add to the groups of the first process.
    """
    with os_errors(str(folder)):
        spec = msgspec.json.decode((folder / "config.json").read_bytes(), type=Spec)
        first = spec.process
        user = first.user
        if command.uid is not None:
            user = ContainerUser(uid=command.uid, gid=command.gid or 0, additional_gids=command.groups)
        over = {variable.partition("=")[0] for variable in command.env}
        kept = [variable for variable in first.env if variable.partition("=")[0] not in over]
        process = msgspec.structs.replace(
            first,
            args=command.args,
            env=[*kept, *command.env],
            cwd=command.cwd or first.cwd,
            user=user,
            terminal=command.terminal,
        )
        target.write_bytes(msgspec.json.encode(process))
