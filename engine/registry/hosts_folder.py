"""Finds how a registry is reached in a folder of `hosts.toml` files, and loads what they name.

Sync; safe from any thread.
"""

import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engine.errors import InvalidArgument, from_os_error, os_errors, printable
from engine.registry.hosts import Host, Tls, default_host, folder_names, parse_hosts

__all__ = ["HostsFolder", "trust"]


class HostsFolder:
    """The hosts of registries: by `folder`, or without one where each registry itself is.

    `plain_http` has a registry spoken to by HTTP where nothing is configured for it.
    """

    def __init__(self, folder: Path | None = None, *, plain_http: bool = False) -> None:
        self._folder = folder
        self._plain_http = plain_http

    def __call__(self, domain: str) -> Sequence[Host]:
        """Return the hosts of a registry in the order to ask them."""
        for name in folder_names(domain) if self._folder else ():
            assert self._folder
            found = self._folder / name
            with os_errors(f"{found}"):
                is_there, has_file = found.is_dir(), (found / "hosts.toml").is_file()
            if has_file:
                return self._parsed(found, domain)
            if is_there:
                return [self._dockers(found, domain)]
        return [default_host(domain, plain_http=self._plain_http)]

    def _dockers(self, folder: Path, domain: str) -> Host:
        tls = _docker(folder)
        host = default_host(domain, plain_http=self._plain_http)
        if (tls.ca or tls.client) and not self._plain_http:
            # Of this machine too: who says whom to trust means TLS.
            host = replace(host, origin=replace(host.origin, scheme="https"))
        return replace(host, tls=tls)

    def _parsed(self, folder: Path, domain: str) -> Sequence[Host]:
        try:
            with os_errors(f"{folder}/hosts.toml"):
                text = (folder / "hosts.toml").read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InvalidArgument(f"{folder}/hosts.toml is not UTF-8") from None
        return parse_hosts(text, domain, str(folder), plain_http=self._plain_http)


def _docker(folder: Path) -> Tls:
    """Return what docker's files in a folder say: `*.crt`, and `*.cert` with `*.key`."""
    with os_errors(f"{folder}"):
        files = sorted(folder.iterdir())
    return Tls(
        ca=tuple(str(file) for file in files if file.suffix == ".crt"),
        client=tuple(
            (str(file), str(file.with_suffix(".key"))) for file in files if file.suffix == ".cert"
        ),
    )


@contextmanager
def _certificates(file: str) -> Iterator[None]:
    try:
        yield
    except (ssl.SSLError, ValueError):  # of which the former is an OSError
        raise InvalidArgument(f"{printable(file)} has no certificate and key in PEM that fit") from None
    except OSError as error:
        raise from_os_error(error, file) from error


def _no_password() -> str:
    """Answer for a key that is locked: else OpenSSL would ask on the terminal."""
    return ""


def trust(tls: Tls) -> ssl.SSLContext:
    """Return the TLS settings for a host; InvalidArgument for a file that is none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # As built in: `load_default_certs` would go by the environment.
    built_in = ssl.get_default_verify_paths()
    if Path(built_in.openssl_cafile).is_file():
        context.load_verify_locations(cafile=built_in.openssl_cafile)
    if Path(built_in.openssl_capath).is_dir():
        context.load_verify_locations(capath=built_in.openssl_capath)
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    for file in tls.ca:
        with _certificates(file):
            context.load_verify_locations(cafile=file)
    for certificate, key in tls.client:
        with _certificates(certificate):
            context.load_cert_chain(certificate, key or None, password=_no_password)
    return context
