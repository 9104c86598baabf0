"""Receivers that do what no receiver should, each on a port of its own.

In this process by `serving`; in one of their own, so that they take none of the test's time, by `python -m
tests.faults.hostile FOLDER DRIP`: it says their URLs as a line of JSON, and once its input ends, what each of them got.
"""

import asyncio
import gzip
import json
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
CHUNK = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
BOMB = gzip.compress(bytes(64 << 20))  # 1000:1
RETRY_DATE = timedelta(minutes=90)  # from now, what the receiver "429, a date" asks for
TRUSTED = "ca.pem"  # for SSL_CERT_FILE


def says(*parts: bytes, pause: float = 0.0) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)

    return script


def says_for_ever(head: bytes, part: bytes, pause: float = 0.0) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause)

    return script


def says_and_resets(head: bytes) -> Script:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        writer.transport.abort()

    return script


async def hangs(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read(-1)  # until the other side gives up


def answers(status: str, *headers: str, body: bytes = b"") -> Script:
    head = "\r\n".join((f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers, "", ""))
    return says(head.encode() + body)


async def asks_for_a_date(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    date = format_datetime(datetime.now(UTC) + RETRY_DATE, usegmt=True)
    await answers("429 Too Many Requests", f"retry-after: {date}")(_, writer)


@dataclass(frozen=True)
class Behaviour:
    """outcome, status: of an attempt, as execution_attempts has them. certificate: of make_certificates, over TLS."""

    name: str
    script: Script
    outcome: str
    status: int
    certificate: str = ""


def behaviours(drip: float) -> Sequence[Behaviour]:
    """The 26 of a hostile neighbourhood, of which two behave. drip: seconds between bytes."""
    too_many = "429 Too Many Requests"
    return (
        Behaviour("200 over TLS", answers("200 OK", body=b"thanks"), "success", 200, "good"),
        Behaviour("204", says(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n"), "success", 204),
        Behaviour("200 with HTML", answers("200 OK", "content-type: text/html", body=b"<p>Hello"), "success", 200),
        Behaviour("301", answers("301 Moved Permanently", "location: /again"), "refused", 301),
        Behaviour("307", answers("307 Temporary Redirect", "location: /again"), "refused", 307),
        Behaviour("400", answers("400 Bad Request"), "refused", 400),
        Behaviour("404", answers("404 Not Found"), "refused", 404),
        Behaviour("410", answers("410 Gone"), "refused", 410),
        Behaviour("429, 5 s", answers(too_many, "retry-after: 5"), "refused", 429),
        Behaviour("429, 10^12 s", answers(too_many, f"retry-after: {10**12}"), "refused", 429),
        Behaviour("429, negative", answers(too_many, "retry-after: -7200"), "refused", 429),
        Behaviour("429, a date", asks_for_a_date, "refused", 429),
        Behaviour("500", answers("500 Internal Server Error", body=b"x" * 8192), "refused", 500),
        Behaviour("503", answers("503 Service Unavailable", "retry-after: soon"), "refused", 503),
        Behaviour("accepts, then hangs", hangs, "timeout", 0),
        Behaviour("drips headers", says_for_ever(OK + b"x-drip: ", b"x", drip), "timeout", 0),
        Behaviour("drips the body", says_for_ever(CHUNKED, b"1\r\nx\r\n", drip), "timeout", 200),
        Behaviour("endless chunked body", says_for_ever(CHUNKED, CHUNK), "success", 200),
        Behaviour("1 GiB", says_for_ever(OK + b"content-length: 1073741824\r\n\r\n", b"x" * 65536), "success", 200),
        Behaviour("gzip bomb", answers("200 OK", "content-encoding: gzip", body=BOMB), "success", 200),
        Behaviour("100k headers", says(OK + b"x-many: x\r\n" * 100_000 + b"\r\n"), "unreachable", 0),
        Behaviour("resets after headers", says_and_resets(CHUNKED), "unreachable", 200),
        Behaviour("not HTTP", says(b"SSH-2.0-OpenSSH_9.2\r\n"), "unreachable", 0),
        Behaviour("certificate of nobody", hangs, "unreachable", 0, "untrusted"),
        Behaviour("certificate expired", hangs, "unreachable", 0, "expired"),
        Behaviour("certificate of another host", hangs, "unreachable", 0, "other host"),
    )


@dataclass
class Hostile:
    """A receiver that runs. connections, open: that came, and that are there. requests: whose head it read.

    bytes: of requests.
    """

    url: str = ""
    connections: int = 0
    open: int = 0
    requests: int = 0
    bytes: int = 0


@asynccontextmanager
async def serving(script: Script, tls: ssl.SSLContext | None = None, *, body: bool = True) -> AsyncIterator[Hostile]:
    """A receiver that reads each request, with its body or without, and then follows the script."""
    receiver = Hostile()
    conversations: set[asyncio.Task[None] | None] = set()

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversations.add(asyncio.current_task())
        receiver.connections += 1
        receiver.open += 1
        with suppress(ConnectionError, ssl.SSLError, asyncio.CancelledError, asyncio.IncompleteReadError):
            first = await reader.readexactly(1)
            receiver.bytes += 1
            if first == b"\x16":  # a TLS handshake, where there is no TLS
                await script(reader, writer)
                return
            head = first + await reader.readuntil(b"\r\n\r\n")
            receiver.requests += 1
            if body:
                length = re.search(rb"\r\ncontent-length: (\d+)\r\n", head.lower())
                receiver.bytes += len(head) + len(await reader.readexactly(int(length[1]) if length else 0))
            await script(reader, writer)
        writer.close()
        receiver.open -= 1

    server = await asyncio.start_server(converse, "127.0.0.1", 0, ssl=tls, limit=1 << 20)
    port = server.sockets[0].getsockname()[1]
    receiver.url = f"https://localhost:{port}/" if tls else f"http://127.0.0.1:{port}/"
    try:
        yield receiver
    finally:
        server.close()
        for conversation in filter(None, conversations):
            conversation.cancel()


def make_certificates(folder: Path) -> Mapping[str, ssl.SSLContext]:
    """Server contexts by the names that Behaviour.certificate uses; whom to trust is in the file TRUSTED."""
    authority_key, stranger_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = _certificate("an authority", authority_key, "an authority", authority_key, authority=True)
    (folder / TRUSTED).write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    contexts = {}
    for name, host, signer, expired in (
        ("good", "localhost", authority_key, False),
        ("untrusted", "localhost", stranger_key, False),
        ("expired", "localhost", authority_key, True),
        ("other host", "other.example", authority_key, False),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        file = folder / f"{name}.pem"
        file.write_bytes(
            _certificate(host, key, "an authority", signer, expired=expired).public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        contexts[name] = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        contexts[name].load_cert_chain(file)
    return contexts


def _certificate(
    host: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    signer: ec.EllipticCurvePrivateKey,
    *,
    authority: bool = False,
    expired: bool = False,
) -> x509.Certificate:
    subject, by = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in (host, issuer))
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(by, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=-1 if expired else 1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host.replace(" ", "-"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )


async def main(folder: Path, drip: float) -> None:
    async with AsyncExitStack() as stack:
        certificates = make_certificates(folder)
        receivers = {
            one.name: await stack.enter_async_context(serving(one.script, certificates.get(one.certificate)))
            for one in behaviours(drip)
        }
        print(json.dumps({name: receiver.url for name, receiver in receivers.items()}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        print(json.dumps({name: receiver.requests for name, receiver in receivers.items()}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), float(sys.argv[2])))
