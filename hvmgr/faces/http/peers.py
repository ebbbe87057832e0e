"""Where a client comes from, as far as limits count it: who has one IPv6 address has all of its network."""

from __future__ import annotations

import ipaddress

_PREFIX = 64  # what one site, often one machine, is given


def origin(peer: str) -> str:
    """The address of an IPv4 client, the network of an IPv6 client."""
    try:
        address = ipaddress.ip_address(peer.partition("%")[0])
    except ValueError:
        return peer
    if address.version == 4 or address.is_loopback:
        return peer
    return str(ipaddress.ip_network((address, _PREFIX), strict=False))
