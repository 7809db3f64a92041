"""How commands reach registries: options for hosts, TLS and a proxy, and docker's credentials.

Sync.
"""

import os
from functools import wraps
from pathlib import Path

import click

from engine.cli.context import Command
from engine.registry.client import Access
from engine.registry.hosts_folder import HostsFolder
from engine.registry.keychain import Keychain

__all__ = ["access_options"]

_HOSTS = "/etc/containerd/certs.d"

_plain = click.option(
    "--plain-http", is_flag=True, help="Speak HTTP to a registry that no hosts.toml tells of."
)
_hosts = click.option(
    "--hosts-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=_HOSTS,
    help=f"Folder of containerd's hosts.toml: mirrors and TLS ({_HOSTS}).",
)
_proxy = click.option("--proxy", metavar="URL", help="HTTP proxy; none is taken from the environment.")


def access_options(command: Command) -> Command:
    """Give a command the options for how registries are reached, as its argument `access`."""

    @wraps(command)
    def reached(
        *args: object, plain_http: bool, hosts_dir: Path, proxy: str | None, **options: object
    ) -> object:
        access = Access(
            hosts=HostsFolder(hosts_dir, plain_http=plain_http),
            credentials=Keychain(_docker_config()),
            proxy=proxy,
        )
        return command(*args, access=access, **options)

    return _plain(_hosts(_proxy(reached)))


def _docker_config() -> Path:
    folder = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    return Path(folder) / "config.json"
