"""A root file system with one static program in it, and the real runtime that runs it.

Sync. `Bench.run` writes a bundle as lamina does and has runc run it to its end.
"""

import os
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.oci.execution import Execution
from engine.oci.platform import Platform
from engine.oci.runtime_spec import Spec
from engine.running.bundle import Setting, make_spec, write_bundle
from engine.running.options import RunOptions
from engine.stores import host_platform
from tests.conftest import peer

__all__ = ["ANY", "HOST", "Bench", "shell"]

HOST = host_platform()
ANY = Execution(platform=HOST)
_COMMANDS = (
    "cat chown dmesg env grep id ifconfig ls mkdir mount nproc ps pwd sh sleep stat test touch true wc"
)
PASSWD = "root:x:0:0:root:/root:/bin/sh\nwww:x:33:34:www:/srv:/bin/sh\n"
GROUP = "root:x:0:\nwheel:x:10:root\nwww:x:34:\nextra:x:77:www\n"


def shell(script: str, **options: Any) -> RunOptions:
    """Return options that run a script."""
    return RunOptions(args=["/bin/sh", "-c", script], **options)


class Bench:
    """A bundle's folder, and the root file system in it."""

    def __init__(self, folder: Path, user: int = 0) -> None:
        """`user` is who runs the runtime, and whose files these are."""
        self.folder = folder
        self.rootfs = folder / "rootfs"
        self.unique = secrets.token_hex(8)
        self._user = user
        (self.rootfs / "bin").mkdir(parents=True, exist_ok=True)
        (self.rootfs / "etc").mkdir()
        shutil.copy(peer("busybox"), self.rootfs / "bin/busybox")
        for name in _COMMANDS.split():
            (self.rootfs / "bin" / name).symlink_to("busybox")
        (self.rootfs / "etc/passwd").write_text(PASSWD)
        (self.rootfs / "etc/group").write_text(GROUP)
        self.give(user)

    def give(self, user: int) -> None:
        """Have all files belong to a user of the host's."""
        for path in (self.folder, self.rootfs, *self.rootfs.rglob("*")):
            os.chown(path, user, user, follow_symlinks=False)

    def setting(self, host: Platform = HOST, parent: int = 0) -> Setting:
        return Setting(unique=self.unique, rootfs=self.rootfs, host=host, parent=parent)

    def spec(self, options: RunOptions, execution: Execution = ANY, parent: int = 0) -> Spec:
        """Make the specification, as the user who will run it."""
        os.setegid(self._user)
        os.seteuid(self._user)
        try:
            return make_spec(execution, options, self.setting(parent=parent))
        finally:
            os.seteuid(0)
            os.setegid(0)

    def refused(self, options: RunOptions, execution: Execution = ANY) -> EngineError:
        """Return the error that making the specification ends with."""
        with pytest.raises(EngineError) as error:
            self.spec(options, execution)
        assert "\n" not in str(error.value)
        return error.value

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of the runtime."""
        user = str(self._user)
        other = ["setpriv", "--reuid", user, "--regid", user, "--clear-groups"] if self._user else []
        return [*other, peer("runc"), "--root", str(self.folder / "runc"), *arguments]

    def started(
        self, options: RunOptions, execution: Execution = ANY, parent: int = 0
    ) -> subprocess.Popen[str]:
        """Run a container in the foreground."""
        write_bundle(self.folder, self.spec(options, execution, parent))
        os.chown(self.folder / "config.json", self._user, self._user)
        return subprocess.Popen(
            self.command("run", "--bundle", str(self.folder), self.unique),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, options: RunOptions, execution: Execution = ANY, *, code: int = 0, parent: int = 0
    ) -> str:
        """Run a container to its end; return what it wrote."""
        started = self.started(options, execution, parent)
        output, messages = started.communicate(timeout=30)
        assert started.returncode == code, messages
        return output

    def lines(self, options: RunOptions, execution: Execution = ANY, parent: int = 0) -> list[str]:
        """Run a container to its good end; return the lines that it wrote."""
        return self.run(options, execution, parent=parent).splitlines()
