"""How an image wants to be run: the part of its config that says so, checked and bounded.

Pure. Whoever made the image decides all of it. What is refused here is what no runtime could run, or
what no tool writes; an image with it can still be stored, mounted and pushed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from engine import limits
from engine.errors import InvalidArgument, Refused, printable
from engine.oci.documents import convert, decode_json
from engine.oci.platform import Platform
from engine.oci.signals import parse_signal

__all__ = [
    "IDS",
    "Execution",
    "check_command",
    "check_env",
    "parse_execution",
    "read_execution",
    "split_user",
]


class Execution(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an image is run, where nobody says otherwise; what is empty it does not say."""

    platform: Platform = Platform()
    user: str = ""
    """`USER[:GROUP]`, by name or number."""
    env: Sequence[str] = ()
    """`KEY=VALUE`."""
    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    working_dir: str = ""
    volumes: Sequence[str] = ()
    """Folders whose content is a container's own, in order."""
    stop_signal: str = ""
    """Its name or number."""
    exposed_ports: Sequence[str] = ()
    labels: Mapping[str, str] = {}


class _Run(msgspec.Struct, frozen=True, kw_only=True, rename="pascal"):
    """`config` of an image's config (OCI image specification, config.md)."""

    user: str = ""
    env: list[str] = msgspec.field(default_factory=list)
    entrypoint: list[str] = msgspec.field(default_factory=list)
    cmd: list[str] = msgspec.field(default_factory=list)
    working_dir: str = ""
    volumes: dict[str, Any] = msgspec.field(default_factory=dict)
    stop_signal: str = ""
    exposed_ports: dict[str, Any] = msgspec.field(default_factory=dict)
    labels: dict[str, str] = msgspec.field(default_factory=dict)


class _RunConfig(msgspec.Struct, frozen=True, kw_only=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""
    config: _Run = _Run()


_NUMBER = re.compile(r"[-+]?[0-9]+")
IDS = range(2**32 - 1)  # the last, -1 to the kernel, is nobody's
_NAME_LENGTH = 256  # characters: LOGIN_NAME_MAX
_PORT = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(?:tcp|udp|sctp))?", re.IGNORECASE)


def parse_execution(data: bytes, what: str = "config") -> Execution:
    """Return how the image is run whose config is `data`. Raises Refused."""
    return read_execution(decode_json(data, what, limits.CONFIG), what)


def read_execution(config: object, what: str = "config") -> Execution:
    """Return how the image is run that has this config, a JSON value. Raises Refused."""
    read = convert(config, _RunConfig, what)
    run = read.config
    try:
        _check_words(run)
        split_user(run.user)
        if run.stop_signal:
            parse_signal(run.stop_signal)
        _check_paths(run)
        _check_ports(run.exposed_ports)
        _check_labels(run.labels)
    except InvalidArgument as error:
        raise Refused(f"{what}: {error}") from None
    return Execution(
        platform=Platform(os=read.os, architecture=read.architecture, variant=read.variant),
        user=run.user,
        env=tuple(run.env),
        entrypoint=tuple(run.entrypoint),
        cmd=tuple(run.cmd),
        working_dir=run.working_dir,
        volumes=tuple(run.volumes),
        stop_signal=run.stop_signal,
        exposed_ports=tuple(run.exposed_ports),
        labels=run.labels,
    )


def check_env(env: Sequence[str]) -> None:
    """Raise InvalidArgument unless each is `KEY=VALUE`, as all that runs programs wants it."""
    for line in env:
        if line.find("=") < 1:
            raise InvalidArgument(f"{printable(line)!r} is not KEY=VALUE")
        _check_word(line, "the environment")


def check_command(words: Sequence[str]) -> None:
    """Raise InvalidArgument for words of a command that no process can have."""
    for word in words:
        _check_word(word, "a command")


def _check_word(word: str, where: str) -> None:
    try:
        word.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{printable(word)!r} in {where} is not UTF-8") from None
    if "\0" in word:
        raise InvalidArgument(f"{printable(word)!r} in {where} has a NUL")


def split_user(text: str) -> tuple[int | str, int | str]:
    """Return user and group of `USER[:GROUP]`: numbers as such, "" for none. Raises InvalidArgument."""
    user, colon, group = text.partition(":")
    if not text.isprintable() or ":" in group or (colon and not group):
        raise InvalidArgument(f"{printable(text)!r} is not a user; write USER or USER:GROUP")
    return _account(user), _account(group)


def _account(text: str) -> int | str:
    if len(text) > _NAME_LENGTH:
        raise InvalidArgument(f"{printable(text)!r} is too long for a user or group")
    if not _NUMBER.fullmatch(text):
        return text
    if not text.isdigit() or int(text) not in IDS:
        raise InvalidArgument(f"{text} is no user or group; their numbers go from 0 to {IDS[-1]}")
    return int(text)


def _check_words(run: _Run) -> None:
    words = [*run.env, *run.entrypoint, *run.cmd]
    if len(words) > limits.RUN_WORDS:
        raise InvalidArgument(f"over {limits.RUN_WORDS} words of environment and command")
    if sum(len(word.encode()) + 1 for word in words) > limits.RUN_BYTES:
        raise InvalidArgument(f"over {limits.RUN_BYTES} bytes of environment and command")
    check_env(run.env)
    check_command([*run.entrypoint, *run.cmd])


def _check_paths(run: _Run) -> None:
    if len(run.volumes) > limits.RUN_VOLUMES:
        raise InvalidArgument(f"over {limits.RUN_VOLUMES} volumes")
    for path in (run.working_dir, *run.volumes):
        if path and not path.startswith("/"):
            raise InvalidArgument(f"the path {printable(path)!r} is not absolute")
    if "" in run.volumes:
        raise InvalidArgument("a volume without a path")


def _check_ports(ports: Mapping[str, Any]) -> None:
    if len(ports) > limits.RUN_PORTS:
        raise InvalidArgument(f"over {limits.RUN_PORTS} ports")
    for port in ports:
        found = _PORT.fullmatch(port)
        if not found or any(int(number) > 65535 for number in found.groups() if number):
            raise InvalidArgument(f"{printable(port)!r} is not a port")


def _check_labels(labels: Mapping[str, str]) -> None:
    if len(labels) > limits.RUN_LABELS:
        raise InvalidArgument(f"over {limits.RUN_LABELS} labels")
    if sum(len(key.encode()) + len(value.encode()) for key, value in labels.items()) > (
        limits.RUN_LABEL_BYTES
    ):
        raise InvalidArgument(f"over {limits.RUN_LABEL_BYTES} bytes of labels")
