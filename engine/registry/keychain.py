"""Credentials from docker's `config.json` and from the programs that it names.

Sync; safe from any thread. The file is read anew for each question: someone may log in meanwhile.
"""

import subprocess
from pathlib import Path

from engine import limits
from engine.errors import FailedPrecondition, NotFound, PermissionDenied, Refused, Unavailable, os_errors
from engine.registry.credentials import Credential, DockerConfig, parse_answer, parse_docker_config

__all__ = ["Keychain"]

_NOT_FOUND = (
    b"credentials not found"  # github.com/docker/docker-credential-helpers, credentials/error.go
)


class Keychain:
    """The credentials that the file at `path` leads to; of a file that is not there, none."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, host: str) -> Credential | None:
        """Return the credential for a host. Raises Refused, Unavailable and others."""
        config = self._read()
        program, name = config.for_host(host)
        return _ask(program, name) if program else config.credential(host)

    def _read(self) -> DockerConfig:
        try:
            with os_errors(f"{self._path}"), self._path.open("rb") as file:
                data = file.read(limits.CREDENTIALS_FILE + 1)
        except NotFound:
            return DockerConfig()
        if len(data) > limits.CREDENTIALS_FILE:
            raise Refused(f"{self._path} is over {limits.CREDENTIALS_FILE} bytes")
        return parse_docker_config(data, str(self._path))


def _ask(program: str, name: str) -> Credential | None:
    try:
        done = subprocess.run(
            [program, "get"],
            input=name.encode(),
            capture_output=True,
            timeout=limits.CREDENTIAL_PROGRAM_S,
            check=False,
        )
    except FileNotFoundError:
        raise FailedPrecondition(
            f"{program} is not installed, though docker's config.json names it for {name}"
        ) from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{program} did not answer within {limits.CREDENTIAL_PROGRAM_S} s") from None
    if done.returncode and done.stdout.startswith(_NOT_FOUND):
        return None
    if done.returncode:  # what it wrote might hold a secret
        raise PermissionDenied(f"{program} failed with {done.returncode} for {name}; run it by hand")
    return parse_answer(done.stdout, program)
