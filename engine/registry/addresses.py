"""Which addresses others than the configuration may lead to.

Pure. Whoever names a host, in a redirect or as the server that gives out tokens, has us send a request:
it must not reach what only this machine can, least of all a cloud's store of credentials.
"""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

__all__ = ["Address", "Policy", "is_open", "is_open_with_secrets", "parse_address"]

Address = IPv4Address | IPv6Address

Policy = Callable[[Address], bool]
"""Say whether others may lead to an address; those that stand for IPv4 ones are given as such."""

_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052
_METADATA = frozenset(
    map(ip_address, ("100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254"))
)  # of clouds that do not have it at a link-local address alone: Alibaba, Azure, Amazon, Google


def parse_address(text: str) -> Address | None:
    """Return the address that a text is, as IPv4 if it stands for that; None for a name."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


def is_open(address: Address) -> bool:
    """Say whether an address means another machine wherever it is used, and not a cloud's own."""
    near = address.is_loopback or address.is_link_local or address.is_unspecified
    return not (near or address.is_multicast or address in _METADATA)


def is_open_with_secrets(address: Address) -> bool:
    """Say that of an address that a password is to go to: only of public ones."""
    return is_open(address) and address.is_global
