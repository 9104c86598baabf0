"""Where a call comes from: the connection's other end, or whom a trusted proxy passed it on for."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
HEADER = "x-forwarded-for"


def address_of(peer: str, metadata: Iterable[tuple[str, str | bytes]], proxies: Sequence[Network]) -> str:
    """The address of the caller, or the kind of its connection where that has none, such as "unix".

    peer: as gRPC tells it. proxies: whose header is believed, by address; so a socket without addresses is never one.
    Every proxy appends whom it heard from, so the header is read from its end: the first that is no proxy is the
    caller, and whatever stands before it is its own invention.
    """
    address, text = _address_of(peer)
    if not proxies or address is None or not _is_in(address, proxies):
        return text
    told = [hop for key, value in metadata if key == HEADER for hop in str(value).split(",")]
    for hop in reversed(told):
        further = parse(hop)
        if further is None:
            break
        address = further
        if not _is_in(address, proxies):
            break
    return str(address)


@lru_cache(maxsize=4096)  # connections
def _address_of(peer: str) -> tuple[Address | None, str]:
    """Of "ipv4:127.0.0.1:4711" and "ipv6:%5B::1%5D:4711", with its text; None: it is no network connection."""
    kind, _, rest = peer.partition(":")
    address = parse(rest.replace("%5B", "[").replace("%5D", "]")) if kind in ("ipv4", "ipv6") else None
    return address, str(address or kind)


def parse(text: str) -> Address | None:
    """An address, with or without a port; IPv4 as such where it came inside IPv6. None: it is none."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])  # without the zone, which means something to this host alone
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
