"""Which destinations this server may reach, decided on the address that is dialled, and the one way to reach them."""

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

HTTPS_PORTS = frozenset({443, 8443})
RESOLVE_SECONDS = 5.0
CONNECT_SECONDS = 3.0
CONNECTIONS_PER_HOST = 32
READ_BUFFER_BYTES = 16 * 1024

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


class _Resolver(AbstractResolver):
    """getaddrinfo in threads of its own: a name server that hangs must not hold up the rest of the process."""

    def __init__(self, policy: EgressPolicy, getaddrinfo: Callable[..., list[Any]]) -> None:
        self._policy = policy
        self._getaddrinfo = partial(getaddrinfo, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="resolver")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolves a name or a literal. Raises EgressRefused if any answer is, OSError if there is none within 5 s."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(RESOLVE_SECONDS):
            answers = await loop.run_in_executor(self._threads, self._getaddrinfo, host, port, family)
        if not all(self._policy.permits(address[0], port) for *_, address in answers):
            raise EgressRefused
        return [
            ResolveResult(hostname=host, host=address[0], port=port, family=family, proto=proto, flags=0)
            for family, _, proto, _, address in answers
        ]

    async def close(self) -> None:
        """Drops the lookups that wait. One that runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Keeps aiohttp from sending an idempotent request again when the connection breaks: one attempt is one request."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as failure:
        raise aiohttp.ClientConnectionError(*failure.args) from failure


class Egress:
    """The only way out of this server. Make it inside a running loop.

    The guard is `_socket`: aiohttp calls it with the very address that is then dialled, for names and literals alike
    (for literals it asks no resolver), so a name that is bound to another address in between gains nothing. Everything
    else refuses early. Kept connections are shared by (host, port, TLS): each was guarded when it was dialled, and only
    the holder of that host's name and certificate answers on it, whichever workspace asks.
    """

    def __init__(self, policy: EgressPolicy, getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo) -> None:
        self._policy = policy
        self._resolver = _Resolver(policy, getaddrinfo)
        connector = aiohttp.TCPConnector(
            resolver=self._resolver,
            use_dns_cache=False,
            socket_factory=self._socket,
            happy_eyeballs_delay=None,  # aiohappyeyeballs' race would swallow the guard's refusal
            ssl=ssl.create_default_context(),
            limit=0,  # the dispatcher bounds the attempts; hanging receivers must not hold up the others here
            limit_per_host=CONNECTIONS_PER_HOST,
            keepalive_timeout=4,  # below the 5 s of Node and uvicorn: a POST should not meet a connection being closed
        )
        self.session = aiohttp.ClientSession(
            connector=connector,
            headers={"user-agent": f"Relay/{version('relay-grpc')}", "accept-encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            middlewares=(_once,),
            read_bufsize=READ_BUFFER_BYTES,
            max_headers=64,
        )

    def _socket(self, target: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, _, address = target
        if not self._policy.permits(address[0], address[1]):
            raise EgressRefused
        return socket.socket(family, kind, protocol)

    async def resolve(self, url: str) -> tuple[str, ...]:
        """Returns the addresses that the URL's host has now, all of them allowed.

        Raises InvalidUrlError, EgressRefused, or OSError where the name does not resolve within 5 s.
        """
        checked = check_url(url, self._policy)
        answers = await self._resolver.resolve(checked.raw_host or "", checked.port or 0)
        return tuple(dict.fromkeys(answer["host"] for answer in answers))

    def request(
        self, method: str, url: str, *, body: bytes, headers: Mapping[str, str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Sends one request; redirects are not followed and the answer is not decoded. The caller sets the deadline.

        Raises InvalidUrlError at once; on entering EgressRefused, aiohttp.ClientError.
        """
        target = check_url(url, self._policy)
        return self.session.request(method, target, data=body, headers=headers, allow_redirects=False)

    async def close(self) -> None:
        await self.session.close()
        await self._resolver.close()
