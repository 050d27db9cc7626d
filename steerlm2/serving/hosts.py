"""Which names a server answers to: protection from DNS rebinding.

A web page can make a user's browser ask any address, also 127.0.0.1, under a name of the page's own
domain, and then read the answers. Such a request tells that name in its Host header. So a server
that asks for no API key answers only to names that no stranger can point at it.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence

LOOPBACK_HOSTS = ("localhost", "*.localhost", "127.0.0.0/8", "::1/128")
ADDRESSES = ("0.0.0.0/0", "::/0")
"""Nobody can be sent to an address by a name."""


def usual_hosts(host: str, address: str, api_key: str | None) -> tuple[str, ...]:
    """`allowed_hosts` of a server that is told none.

    Args:
        host: that the config names.
        address: that is listened on.
    """
    if api_key is not None:  # which a page doesn't have
        return ("*",)
    if ipaddress.ip_address(address).is_loopback:
        return (*LOOPBACK_HOSTS, host)
    return (*LOOPBACK_HOSTS, *ADDRESSES, host, socket.gethostname())


def host_of(header: str) -> str:
    """The host in a Host header, without its port, in lower case."""
    host = re.sub(r":\d*$", "", header.strip()) if not header.endswith("]") else header
    return host.removeprefix("[").removesuffix("]").rstrip(".").lower()


def is_allowed(host: str, allowed: Sequence[str]) -> bool:
    """Whether a host is one of a list of names, "*.NAME", addresses and networks, or "*"."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    for own in allowed:
        if own == "*" or own.lower() == host:
            return True
        if own.startswith("*.") and host.endswith(own[1:].lower()):
            return True
        if address is not None and "/" in own and address in ipaddress.ip_network(own, False):
            return True
    return False
