"""The one way out of this server: where it may go is decided on the address that is dialled."""

import asyncio
import select
import socket
import ssl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib.metadata import version
from typing import Any, cast

import aiohttp
from aiohttp.abc import AbstractResolver, AbstractStreamWriter, ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection

from relay_grpc import failpoints
from relay_grpc.actions.destinations import EgressPolicy, EgressRefused, check_url

RESOLVE_SECONDS = 5.0
# Lookups at one time: by requests, as many as the dispatcher has attempts, so that those of names whose servers hang
# leave the others theirs; by checks and previews.
REQUEST_LOOKUPS, OTHER_LOOKUPS = 256, 32
CONNECT_SECONDS = 3.0
READ_BUFFER_BYTES = 16 * 1024
HEADERS_MAX, HEADER_BYTES_MAX = 64, 32 * 1024  # of an answer
WAITING_ANSWERS_MAX = 8  # on one connection: interim ones (1xx), or of who does not keep to HTTP


class _Resolver(AbstractResolver):
    """getaddrinfo in threads of its own: a name server that hangs must not hold up the rest of the process."""

    def __init__(self, policy: EgressPolicy, getaddrinfo: Callable[..., list[Any]], lookups: int) -> None:
        self._policy = policy
        self._getaddrinfo = partial(getaddrinfo, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        self._threads = ThreadPoolExecutor(lookups, thread_name_prefix="resolver")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolves a name or a literal. Raises EgressRefused if any answer is, OSError if there is none within 5 s."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(RESOLVE_SECONDS):
            answers = await loop.run_in_executor(self._threads, self._getaddrinfo, host, port, family)
        if not answers:
            raise OSError(f"{host} has no address")
        if not all(self._policy.permits(address[0], port) for *_, address in answers):
            raise EgressRefused
        return [
            ResolveResult(hostname=host, host=address[0], port=port, family=family, proto=proto, flags=0)
            for family, _, proto, _, address in answers
        ]

    async def close(self) -> None:
        """Drops the lookups that wait. One that runs ends by itself."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class _Protocol(ResponseHandler):
    """A connection that a receiver can't use up this server by.

    One that is flooded with answers is broken off: aiohttp keeps all that came at once, kilobytes for each. Closing
    does not wait: the orderly end of TLS would, for the receiver, up to 30 s.
    """

    def close(self) -> None:
        self.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if len(self._buffer) > WAITING_ANSWERS_MAX:
            self._buffer.clear()
            self.set_exception(aiohttp.ClientPayloadError("too many answers"))
            if self.transport is not None:
                self.transport.abort()


class _Connector(aiohttp.TCPConnector):
    """Leaves kept connections on which anything came since: it would pass for the answer to the next request.

    Such as the 408 by which some servers end an idle connection. What is closed by now is left too.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._factory = partial(cast(type[ResponseHandler], _Protocol), loop=self._loop)

    async def _get(self, key: Any, traces: Any) -> Connection | None:
        while connection := await super()._get(key, traces):
            if _is_silent(connection):
                return connection
            connection.close()
        return None


def _is_silent(connection: Connection) -> bool:
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or protocol.should_close:
        return False
    unread = select.poll()  # what the event loop has not looked at yet
    unread.register(transport.get_extra_info("socket").fileno(), select.POLLIN)
    return not unread.poll(0)


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Keeps aiohttp from sending an idempotent request again when the connection breaks: one attempt is one request."""
    try:
        return await send(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as failure:
        raise aiohttp.ClientConnectionError(*failure.args) from failure


async def _small_head(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Refuses an answer whose headers are too large as a whole: aiohttp bounds each of them, and their number."""
    response = await send(request)
    if sum(len(name) + len(value) for name, value in response.raw_headers) > HEADER_BYTES_MAX:
        response.close()
        raise aiohttp.ClientResponseError(response.request_info, (), message="the headers are too large")
    return response


class Body(aiohttp.BytesPayload):
    """The body of one attempt's request.

    sent: whether any byte of the request may have left this server. aiohttp writes the head with the body's beginning.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.sent = False

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        failpoints.reach("attempt.connected")
        if writer.transport is None or writer.transport.is_closing():
            raise aiohttp.ClientConnectionResetError("the connection is closed")
        self.sent = True
        await super().write_with_length(writer, content_length)
        failpoints.reach("attempt.sent")


class Egress:
    """The only way out of this server. Make it inside a running loop.

    The guard is `_socket`: aiohttp calls it with the very address that is then dialled, for names and literals alike
    (for literals it asks no resolver), so a name that is bound to another address in between gains nothing. Everything
    else refuses early. Kept connections are shared by (host, port, TLS): each was guarded when it was dialled, and only
    the holder of that host's name and certificate answers on it, whichever workspace asks.
    """

    def __init__(self, policy: EgressPolicy, getaddrinfo: Callable[..., list[Any]] = socket.getaddrinfo) -> None:
        self._policy = policy
        self._resolver = _Resolver(policy, getaddrinfo, OTHER_LOOKUPS)
        self._request_resolver = _Resolver(policy, getaddrinfo, REQUEST_LOOKUPS)
        connector = _Connector(
            resolver=self._request_resolver,
            use_dns_cache=False,
            socket_factory=self._socket,
            happy_eyeballs_delay=None,  # aiohappyeyeballs' race would swallow the guard's refusal
            ssl=ssl.create_default_context(),
            limit=0,  # the dispatcher bounds the attempts; hanging receivers must not hold up others, on any host
            keepalive_timeout=4,  # below the 5 s of Node and uvicorn: a POST should not meet a connection being closed
        )
        self.session = aiohttp.ClientSession(
            connector=connector,
            headers={"user-agent": f"Relay/{version('relay-grpc')}", "accept-encoding": "identity"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            middlewares=(_once, _small_head),
            read_bufsize=READ_BUFFER_BYTES,
            max_headers=HEADERS_MAX,
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
        self, method: str, url: str, *, body: bytes | Body, headers: Mapping[str, str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """Sends one request; redirects are not followed and the answer is not decoded. The caller sets the deadline.

        Raises InvalidUrlError at once; on entering EgressRefused, aiohttp.ClientError.
        """
        target = check_url(url, self._policy)
        return self.session.request(method, target, data=body, headers=headers, allow_redirects=False)

    async def close(self) -> None:
        await self.session.close()
        await self._resolver.close()
        await self._request_resolver.close()
