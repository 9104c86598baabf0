"""Which destinations this server may reach: URLs, addresses and ports. No I/O."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from yarl import URL

HTTPS_PORTS = frozenset({443, 8443})

# The union of what Svix (is_allowed), Smokescreen and Convoy deny, spelled out: ipaddress.is_private and is_global let
# a third of it through. What embeds an IPv4 address (NAT64, 6to4, Teredo) is denied whole: nothing is to be decoded.
_DENIED = tuple(
    ip_network(network)
    for network in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # the platform of Azure, though a public address
        "169.254.0.0/16",  # link-local, cloud metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # IETF protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        # Only 2000::/3 is global unicast (RFC 4291). The rest holds loopback, IPv4-compatible, NAT64 (64:ff9b::/96 and
        # 64:ff9b:1::/48), discard, SRv6 (5f00::/16), unique local, link-local, site-local and multicast addresses.
        "::/3",
        "4000::/2",
        "8000::/1",
        "2001::/23",  # IETF protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)
_LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))

_URL = re.compile(
    r"(https?)://"
    r"(\[[0-9a-f:.]+\]|[\w-]{1,63}(?:\.[\w-]{1,63})*)"  # the host
    r"(?::([0-9]{1,5}))?"  # the port
    r"(?:[/?][!-~]*)?",
    re.ASCII | re.IGNORECASE,
)
# What getaddrinfo reads as an IPv4 address: the "ends in a number" rule of url.spec.whatwg.org.
_ENDS_IN_NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.IGNORECASE)


class EgressRefused(Exception):
    """The destination's address or port is not allowed. One text for every reason, so that it tells nothing of them."""

    def __init__(self) -> None:
        super().__init__("the destination is not one this server may reach")


class InvalidUrlError(ValueError):
    """The URL can't be a destination, whatever it resolves to. Its text is for the person who wrote the URL."""


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """What may be reached.

    allow_loopback: this machine too, on any port. For development alone.
    https_only: nothing but https, on ports 443 and 8443.
    allow: networks of the operator's own that may be reached on any port, whatever else is said.
    """

    allow_loopback: bool
    https_only: bool
    allow: tuple[IPv4Network | IPv6Network, ...] = ()

    def permits(self, address: str, port: int) -> bool:
        """Whether this address and port may be dialled. What is not an address may not."""
        try:
            ip = _unmapped(ip_address(address))
        except ValueError:
            return False
        if any(ip in network for network in self.allow) or (self.allow_loopback and any(ip in n for n in _LOOPBACK)):
            return True
        return not denied(ip) and (not self.https_only or port in HTTPS_PORTS)


def denied(address: IPv4Address | IPv6Address) -> bool:
    """Whether the address is on a network that no webhook receiver lives on. An IPv4-mapped address is the IPv4 one."""
    ip = _unmapped(address)
    return any(ip in network for network in _DENIED)


def _unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def check_url(url: str, policy: EgressPolicy) -> URL:
    """Parses a destination, strictly enough that no two parsers read it differently. Raises InvalidUrlError.

    The host's address is not judged here: that is done where it is resolved and where it is dialled.
    """
    match = _URL.fullmatch(url)
    if match is None or "\\" in url or "#" in url:
        raise InvalidUrlError(
            "write it as https://host:port/path in printable ASCII, without user information, fragment or backslash"
            " (an international host name in its xn-- form)"
        )
    scheme, host, port = match.groups()
    try:
        if host.startswith("["):
            IPv6Address(host[1:-1])
        elif _ENDS_IN_NUMBER.fullmatch(host):
            IPv4Address(host)
    except ValueError:
        raise InvalidUrlError("write an address in its canonical form, such as 192.0.2.1 or [2001:db8::1]") from None
    if port is not None and not 1 <= int(port) <= 65535:
        raise InvalidUrlError("the port is between 1 and 65535")
    if policy.https_only and scheme.lower() != "https":
        raise InvalidUrlError("only https:// is allowed")
    return URL(url, encoded=True)
