import asyncio
import dataclasses
import datetime
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil
import pytest
import rfc8785
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from standardwebhooks import Webhook
from yarl import URL

from relay_grpc import errors
from relay_grpc.actions import signing
from relay_grpc.actions.destinations import EgressPolicy
from relay_grpc.actions.egress import Egress
from relay_grpc.actions.execution import AttemptResult, Job, Outcome
from relay_grpc.actions.providers.webhook import WebhookProvider
from tests.actions.caller import eventually
from tests.faults.hostile import (
    BOMB,
    CHUNK,
    CHUNKED,
    OK,
    TRUSTED,
    Script,
    answers,
    hangs,
    make_certificates,
    says,
    says_and_resets,
    says_for_ever,
    serving,
)

DEVELOPMENT = EgressPolicy(allow_loopback=True, https_only=False)
PRODUCTION = EgressPolicy(allow_loopback=False, https_only=True)
SECRETS = tuple(signing.new_secret() for _ in range(2))
TIMEOUT = 0.4
HMAC = signing.Scheme.HMAC


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[WebhookProvider]:
    egress = Egress(DEVELOPMENT)
    yield WebhookProvider(egress, timeout=TIMEOUT)
    await egress.close()


def loopback(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
    """A getaddrinfo by which every name is this machine."""
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]


PARAMETERS: dict[str, Any] = {"payload": {"order": "or_1829"}}
PAYLOAD = rfc8785.dumps(PARAMETERS["payload"])


def job(url: str, parameters: dict[str, Any] = PARAMETERS, **values: Any) -> Job:
    return Job(
        execution_id=values.pop("execution_id", None) or uuid4(),
        action="webhook.send",
        parameters=rfc8785.dumps(parameters).decode(),
        configuration={"url": url, "body_signature": values.pop("body_signature", False)},
        keys=tuple(signing.Key(signing.Scheme.HMAC, signing.decode_secret(secret)) for secret in SECRETS),
        **values,
    )


@dataclass
class Receiver:
    """An ordinary receiver that keeps what it gets. until: what requests that end in "hang" wait for."""

    url: str = ""
    status: int = 200
    until: asyncio.Event | None = None
    requests: list[tuple[web.BaseRequest, bytes]] = field(default_factory=list)

    async def receive(self, request: web.BaseRequest) -> web.Response:
        self.requests.append((request, await request.read()))
        if self.until and request.path_qs.endswith("hang"):
            await self.until.wait()
        return web.Response(status=self.status, text="thanks", headers={"location": "/elsewhere"})


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with RawTestServer(receiver.receive, host="127.0.0.1") as server:
        receiver.url = f"http://127.0.0.1:{server.port}/hook?token=t"
        yield receiver


async def delivers(provider: WebhookProvider, sent: Job) -> AttemptResult:
    """Executes; fails the test where an attempt outlives its deadline by far."""
    return await asyncio.wait_for(provider.execute(sent), TIMEOUT + 5)


async def test_the_receiver_gets_what_was_signed(provider: WebhookProvider, receiver: Receiver) -> None:
    payload: dict[str, Any] = {"order": "or_1829", "customer": "Zoë", "note": "\u20ac \U0001f600", "amount": 1299.5}
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    sent = job(receiver.url, {"payload": payload}, body_signature=True, traceparent=trace)
    result = await delivers(provider, sent)
    assert result == AttemptResult(Outcome.SUCCESS, 200, "thanks")

    [(request, body)] = receiver.requests
    assert (request.method, request.path_qs) == ("POST", "/hook?token=t")
    assert body == rfc8785.dumps(payload)
    assert request.headers["webhook-id"] == str(sent.execution_id)
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"].startswith("Relay/")
    assert request.headers["traceparent"] == trace
    assert request.headers["x-signature"] == signing.body_signature(sent.keys[0].raw, body)
    for secret in SECRETS:
        assert Webhook(secret).verify(body, dict(request.headers)) == payload


async def test_headers_of_the_connection_are_sent_and_never_in_place_of_ours(
    provider: WebhookProvider, receiver: Receiver
) -> None:
    headers = {"Authorization": "Bearer 0123456789", "X-Tier": "gold", "Webhook-Id": "forged", "X-Signature": "forged"}
    sent = job(receiver.url, body_signature=True, headers=headers)
    assert (await delivers(provider, sent)).outcome is Outcome.SUCCESS
    [(request, body)] = receiver.requests
    assert (request.headers["authorization"], request.headers["x-tier"]) == ("Bearer 0123456789", "gold")
    assert request.headers.getall("webhook-id") == [str(sent.execution_id)]
    assert request.headers.getall("x-signature") == [signing.body_signature(sent.keys[0].raw, body)]


async def test_what_a_receiver_sends_back_of_the_headers_is_hidden(provider: WebhookProvider) -> None:
    sent = {"Authorization": "Bearer 0123456789", "X-Tier": "gold"}
    async with serving(answers("400 Bad Request", body=b"no: Bearer 0123456789, gold")) as hostile:
        result = await delivers(provider, job(hostile.url, headers=sent))
    assert result.response_excerpt == "no: Bearer [hidden], gold"


async def test_keys_of_both_schemes_sign(provider: WebhookProvider, receiver: Receiver) -> None:
    raw = signing.new_ed25519()
    ed25519, hmac = signing.Key(signing.Scheme.ED25519, raw), signing.Key(HMAC, signing.decode_secret(SECRETS[0]))
    for keys in ((ed25519,), (ed25519, hmac)):
        sent = dataclasses.replace(job(receiver.url, body_signature=True), keys=keys)
        assert (await delivers(provider, sent)).outcome is Outcome.SUCCESS
    (alone, body), (both, _) = receiver.requests
    assert [entry[:4] for entry in alone.headers["webhook-signature"].split()] == ["v1a,"]
    assert "x-signature" not in alone.headers  # nothing is there to make it with
    Webhook(SECRETS[0]).verify(body, dict(both.headers))
    assert both.headers["x-signature"] == signing.body_signature(hmac.raw, body)

    configuration = {"url": receiver.url, "body_signature": True, "headers": ["X-Tier"]}
    plan = await provider.plan("webhook.send", PARAMETERS, configuration, (signing.Scheme.ED25519, HMAC))
    assert plan.signatures == ("v1a", "v1", "body")
    assert "with the headers X-Tier, signed (Standard Webhooks v1a and v1, and X-Signature" in plan.summary
    plan = await provider.plan("webhook.send", PARAMETERS, configuration, (signing.Scheme.ED25519,))
    assert plan.signatures == ("v1a",)


async def test_a_connection_may_have_less_time_and_never_more(provider: WebhookProvider) -> None:
    async with serving(hangs) as hostile:
        for own, seconds in ((0.1, 0.1), (30, TIMEOUT)):
            sent = job(hostile.url)
            sent = dataclasses.replace(sent, configuration={**sent.configuration, "timeout": own})
            started = time.monotonic()
            result = await delivers(provider, sent)
            assert seconds <= time.monotonic() - started < seconds + 0.25
            assert (result.outcome, result.error) == (Outcome.TIMEOUT, f"no complete answer within {seconds:g} s")


NOW = 784111777.0  # Sun, 06 Nov 1994 08:49:37 GMT, the examples of RFC 9110, 5.6.7


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("000000000120", 120.0),
        (str(10**12), 30 * 86400.0),
        ("9" * 7000, 30 * 86400.0),
        ("Sun, 06 Nov 1994 08:51:37 GMT", 120.0),
        ("Sunday, 06-Nov-94 08:51:37 GMT", 120.0),
        ("Sun Nov  6 08:51:37 1994", 120.0),
        ("Sun, 06 Nov 1994 09:51:37 +0100", 120.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 30 * 86400.0),
        ("Sun, 06 Nov 1994 08:49:36 GMT", None),
        ("Thu, 01 Jan 1970 00:00:00 GMT", None),
        ("Sun, 06 Nov S994 08:49:37 +9999999999", None),
        ("Mon, 99 Foo 999999999999 99:99:99 -0000", None),
        ("-1", None),
        ("+5", None),
        ("1.5", None),
        ("1e3", None),
        ("0x10", None),
        ("\u0665", None),
        ("soon", None),
        ("5, 6", None),
        ("inf", None),
        ("nan", None),
        ("", None),
        (None, None),
    ],
)
async def test_retry_after_is_read_as_the_standard_says(value: str | None, seconds: float | None) -> None:
    egress = Egress(DEVELOPMENT)
    header = [] if value is None else [f"retry-after: {value}"]
    async with serving(answers("503 Service Unavailable", *header)) as hostile:
        result = await WebhookProvider(egress, clock=lambda: NOW).execute(job(hostile.url))
    await egress.close()
    assert (result.outcome, result.status_code, result.retry_after) == (Outcome.REFUSED, 503, seconds)


async def test_attempts_share_the_id_and_have_timestamps_of_their_own(receiver: Receiver) -> None:
    now = iter([time.time() - 1.5, time.time()])
    egress = Egress(DEVELOPMENT)
    provider = WebhookProvider(egress, clock=lambda: next(now))
    execution_id = uuid4()
    for _ in range(2):
        await provider.execute(job(receiver.url, execution_id=execution_id))
    await egress.close()
    first, second = (request.headers for request, _ in receiver.requests)
    assert UUID(first["webhook-id"]) == UUID(second["webhook-id"]) == execution_id
    assert int(first["webhook-timestamp"]) < int(second["webhook-timestamp"])
    assert "x-signature" not in first
    assert "traceparent" not in first
    for request, body in receiver.requests:
        Webhook(SECRETS[0]).verify(body, dict(request.headers))


@pytest.mark.parametrize(
    "parameters",
    [
        {"payload": {}},
        {"payload": {"a": 1}, "method": "PUT"},
        {"payload": {"payload": {"payload": "}}"}, "method": '{"payload":{}}'}, "method": "PATCH"},
        {"payload": {"numbers": [1e20, 1e21, 1e16, 1e-7, 0.1, -0.0, 5.0, 2**53 - 1, 1.7976931348623157e308]}},
        {"payload": {"text": 'ä€😀 \u2028 \u0000 \x7f " \\ / \r\n', "דּ": 1, "\u20ac": 2, "\ufb33": 3, "😀": 4}},
    ],
)
async def test_what_is_planned_is_what_is_sent(
    provider: WebhookProvider, receiver: Receiver, parameters: dict[str, Any]
) -> None:
    sent = job(receiver.url, parameters)
    plan = await provider.plan(sent.action, parameters, sent.configuration, (HMAC,))
    assert (await delivers(provider, sent)).outcome is Outcome.SUCCESS
    [(request, body)] = receiver.requests
    assert (
        (plan.method, plan.body_bytes) == (request.method, len(body)) == (parameters.get("method", "POST"), len(body))
    )
    assert body == rfc8785.dumps(parameters["payload"])


async def test_a_plan_shows_where_and_how_without_the_query(provider: WebhookProvider) -> None:
    configuration = {"url": "http://127.0.0.1:9/hook?token=t", "body_signature": True}
    plan = await provider.plan("webhook.send", {"payload": {"a": 1}}, configuration, (HMAC,))
    assert (plan.url, plan.addresses, plan.signatures) == ("http://127.0.0.1:9/hook", ("127.0.0.1",), ("v1", "body"))
    assert plan.summary == (
        "POST 7 bytes of JSON to http://127.0.0.1:9/hook, signed (Standard Webhooks v1, and X-Signature over the body)"
    )
    assert plan.warnings == ("http:// sends the payload unencrypted",)

    plan = await provider.plan(
        "webhook.send", {"payload": {}}, {"url": "https://a.invalid/", "body_signature": False}, (HMAC,)
    )
    assert (plan.addresses, plan.signatures) == ((), ("v1",))
    assert plan.summary == "POST 2 bytes of JSON to https://a.invalid/, signed (Standard Webhooks v1)"
    assert plan.warnings == ("the host name does not resolve now",)


@pytest.mark.parametrize(
    ("url", "reason", "problem"),
    [
        ("https://10.0.0.1/", "EGRESS_REFUSED", "the destination is not one this server may reach"),
        ("https://localhost/", "EGRESS_REFUSED", "the destination is not one this server may reach"),
        ("https://8.8.8.8:22/", "EGRESS_REFUSED", "the destination is not one this server may reach"),
        ("https://2130706433/", "INVALID_REQUEST", "canonical form"),
        ("https://user@receiver.example/", "INVALID_REQUEST", "without user information"),
        ("http://receiver.example/", "INVALID_REQUEST", "only https"),
    ],
)
async def test_destinations_are_refused_when_checked_planned_and_sent(url: str, reason: str, problem: str) -> None:
    egress = Egress(PRODUCTION)
    provider = WebhookProvider(egress)
    configuration = {"url": url, "body_signature": False}
    for refused in (
        provider.check(configuration),
        provider.plan("webhook.send", {"payload": {}}, configuration, (HMAC,)),
    ):
        with pytest.raises(errors.InvalidRequest, match=problem) as refusal:
            await refused
        assert refusal.value.reason == reason
        assert [path for path, _ in refusal.value.violations] == ["webhook.url"]
    result = await provider.execute(job(url))
    assert (result.outcome, result.status_code, result.response_excerpt) == (Outcome.EGRESS_REFUSED, 0, "")
    assert problem in result.error
    await egress.close()


async def test_a_name_that_does_not_resolve_may_be_configured(provider: WebhookProvider) -> None:
    await provider.check({"url": "https://receiver.invalid/", "body_signature": False})
    result = await delivers(provider, job("https://receiver.invalid/"))
    assert (result.outcome, result.error) == (Outcome.UNREACHABLE, "the host name does not resolve")


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_2xx_is_success(provider: WebhookProvider, receiver: Receiver, status: int) -> None:
    receiver.status = status
    result = await delivers(provider, job(receiver.url))
    assert (result.outcome, result.status_code, result.error) == (Outcome.SUCCESS, status, "")


@pytest.mark.parametrize("status", [301, 302, 303, 304, 307, 308, 400, 404, 410, 429, 500, 503])
@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_every_other_status_is_refused_and_no_redirect_is_followed(
    provider: WebhookProvider, receiver: Receiver, status: int, method: str
) -> None:
    receiver.status = status
    result = await delivers(provider, job(receiver.url, {"method": method, "payload": {}}))
    assert (result.outcome, result.status_code) == (Outcome.REFUSED, status)
    assert f"answered {status}" in result.error
    assert len(receiver.requests) == 1


END = b"content-length: 0\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("script", "outcome", "status"),
    [
        pytest.param(hangs, Outcome.TIMEOUT, 0, id="accepts, then hangs"),
        pytest.param(says_for_ever(OK + b"x-drip: ", b"x", 0.02), Outcome.TIMEOUT, 0, id="drips a header"),
        pytest.param(says_for_ever(OK, b"x-drip: x\r\n", 0.02), Outcome.TIMEOUT, 0, id="drips headers"),
        pytest.param(says_for_ever(b"", b"HTTP/1.1 103 Early\r\n\r\n", 0.001), Outcome.TIMEOUT, 0, id="endless 103"),
        pytest.param(says(b"HTTP/1.1 103 Early\r\n\r\n" * 9), Outcome.UNREACHABLE, 0, id="many 103 at once"),
        pytest.param(says(b"HTTP/1.1 103 Early\r\n\r\n" * 7 + OK + END), Outcome.SUCCESS, 200, id="some 103 at once"),
        pytest.param(says_for_ever(CHUNKED, b"1\r\nx\r\n", 0.02), Outcome.TIMEOUT, 200, id="drips the body"),
        pytest.param(says_for_ever(CHUNKED, CHUNK), Outcome.SUCCESS, 200, id="endless chunked body"),
        pytest.param(
            says_for_ever(OK + b"content-length: 1073741824\r\n\r\n", b"x" * 4096), Outcome.SUCCESS, 200, id="1 GiB"
        ),
        pytest.param(says_for_ever(OK, b"x-many: x\r\n" * 1000), Outcome.UNREACHABLE, 0, id="endless headers"),
        pytest.param(says(OK + b"x-many: x\r\n" * 100_000 + b"\r\n"), Outcome.UNREACHABLE, 0, id="100k headers"),
        pytest.param(says(OK + b"x-long: " + b"x" * (1 << 20)), Outcome.UNREACHABLE, 0, id="1 MiB header"),
        pytest.param(
            says(OK + (b"x-long: " + b"x" * 7000 + b"\r\n") * 4 + END), Outcome.SUCCESS, 200, id="28 KiB of headers"
        ),
        pytest.param(says(OK + (b"x-long: " + b"x" * 7000 + b"\r\n") * 5 + END), Outcome.UNREACHABLE, 0, id="35 KiB"),
        pytest.param(says(OK + b"x-many: x\r\n" * 62 + END), Outcome.SUCCESS, 200, id="64 headers"),
        pytest.param(says(OK + b"x-many: x\r\n" * 64 + END), Outcome.UNREACHABLE, 0, id="66 headers"),
        pytest.param(says_for_ever(b"HTTP/1.1 200 ", b"x" * 4096), Outcome.UNREACHABLE, 0, id="endless status line"),
        pytest.param(says_and_resets(b""), Outcome.UNREACHABLE, 0, id="resets at once"),
        pytest.param(says_and_resets(OK), Outcome.UNREACHABLE, 0, id="resets amid headers"),
        pytest.param(says_and_resets(CHUNKED + b"5\r\nhello\r\n"), Outcome.UNREACHABLE, 200, id="resets amid the body"),
        pytest.param(says(OK + b"content-length: 9\r\n\r\nhello"), Outcome.UNREACHABLE, 200, id="body too short"),
        pytest.param(says(CHUNKED + b"zz\r\n"), Outcome.UNREACHABLE, 0, id="no chunk"),
        # aiohttp closes the connection and tells the reader nothing: only the deadline ends it.
        pytest.param(says(CHUNKED, b"zz\r\n", pause=0.05), Outcome.TIMEOUT, 200, id="no chunk, later"),
        pytest.param(says(), Outcome.UNREACHABLE, 0, id="closes at once"),
        pytest.param(says(b"SSH-2.0-OpenSSH_9.2\r\n"), Outcome.UNREACHABLE, 0, id="not HTTP"),
        pytest.param(says(b"\x15\x03\x01\x00\x02\x02\x46"), Outcome.UNREACHABLE, 0, id="a TLS alert"),
        pytest.param(says(b"HTTP/1.1 200 OK\r\nx: \x00\r\n\r\n"), Outcome.UNREACHABLE, 0, id="NUL in a header"),
        pytest.param(says(b"HTTP/1.1 410 Gone\r\nconnection: close\r\n\r\n"), Outcome.REFUSED, 410, id="410"),
    ],
)
async def test_hostile_receivers_cost_one_bounded_attempt(
    provider: WebhookProvider, script: Script, outcome: Outcome, status: int
) -> None:
    async with serving(script) as hostile:
        result = await delivers(provider, job(hostile.url))
    assert (result.outcome, result.status_code) == (outcome, status)
    assert (result.error == "") is (outcome is Outcome.SUCCESS)
    assert "127.0.0.1" not in result.error
    assert len(result.response_excerpt) <= 4096


async def test_hostile_receivers_do_not_hold_up_others_on_the_same_host(receiver: Receiver) -> None:
    """Many tenants may share a host: of an automation service, say."""
    egress = Egress(DEVELOPMENT)
    provider = WebhookProvider(egress)
    receiver.until = asyncio.Event()
    hanging = [asyncio.create_task(provider.execute(job(receiver.url + "&hang"))) for _ in range(200)]
    await eventually(lambda: len(receiver.requests) == len(hanging))
    assert (await delivers(provider, job(receiver.url))).outcome is Outcome.SUCCESS
    assert not any(attempt.done() for attempt in hanging)
    receiver.until.set()
    assert {(await attempt).outcome for attempt in hanging} == {Outcome.SUCCESS}
    await egress.close()


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # so large that it does not fit the sockets
async def test_a_receiver_that_answers_without_reading_ends_at_the_deadline(provider: WebhookProvider) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(OK + b"content-length: 5\r\n\r\n")
        await asyncio.sleep(TIMEOUT * 3)

    async with serving(script, body=False) as hostile:
        result = await delivers(provider, job(hostile.url, {"payload": {"a": "x" * (8 << 20)}}))
    assert (result.outcome, result.status_code) == (Outcome.TIMEOUT, 200)


async def test_only_16_kib_of_an_endless_answer_are_asked_for(provider: WebhookProvider) -> None:
    written = 0
    ended = asyncio.Event()

    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(CHUNKED)
        try:
            while True:
                writer.write(CHUNK)
                await writer.drain()
                written += len(CHUNK)
        finally:
            ended.set()

    async with serving(script) as hostile:
        result = await delivers(provider, job(hostile.url))
        await asyncio.wait_for(ended.wait(), 5)  # the connection is closed, not drained
    assert result.response_excerpt == "x" * 4096
    assert written < 16 << 20  # what the buffers of two sockets take


@pytest.mark.parametrize(
    ("headers", "body", "excerpt"),
    [
        (b"", b"\xff\xfehello\x00\xc3", "\ufffd\ufffdhello\ufffd"),
        (b"", "€".encode() * 5000, "€" * 1365),
        (b"", b"\xff" * 5000, "\ufffd" * 1365),
        (b"", b"\x00" * 5000 + b"x", "x"),
        (b"content-encoding: gzip\r\n", BOMB, BOMB.decode("utf-8", "replace").replace("\0", "")),
    ],
    ids=["invalid UTF-8", "cut in a character", "replacements", "NULs", "gzip bomb"],
)
async def test_the_excerpt_is_at_most_4_kib_of_text_as_it_came(
    provider: WebhookProvider, headers: bytes, body: bytes, excerpt: str
) -> None:
    async with serving(says(OK + headers + b"content-length: %d\r\n\r\n" % len(body) + body)) as hostile:
        result = await delivers(provider, job(hostile.url))
    assert result.outcome is Outcome.SUCCESS
    assert result.response_excerpt == excerpt.encode()[:4096].decode("utf-8", "ignore")
    assert "\0" not in result.response_excerpt


async def test_nobody_listening_is_unreachable(provider: WebhookProvider) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = await delivers(provider, job(f"http://127.0.0.1:{port}/"))
    assert (result.outcome, result.status_code) == (Outcome.UNREACHABLE, 0)
    assert result.error == "the receiver can't be reached: connection refused or no route"


async def test_a_cancelled_attempt_is_cancelled(provider: WebhookProvider) -> None:
    async with serving(hangs) as hostile:
        attempt = asyncio.create_task(provider.execute(job(hostile.url)))
        await asyncio.sleep(0.1)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt


async def test_a_kept_connection_that_is_found_closed_costs_no_attempt(provider: WebhookProvider) -> None:
    """The receiver closes after each answer, unannounced, and the loop has not seen that when the next one is sent."""
    async with receiver_that_closes() as (url, received):
        for _ in range(20):
            assert await delivers(provider, job(url)) == AttemptResult(Outcome.SUCCESS, 200)
            time.sleep(0.05)  # what comes in between, the loop looks at when it is about to write
    assert len(received) == 20


@pytest.mark.parametrize("seen", [True, False])
async def test_what_comes_on_a_kept_connection_is_no_answer_to_the_next_request(seen: bool) -> None:
    """As the 408 by which some servers end an idle connection. seen: by the loop, before the next request is made."""
    received: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as stream, suppress(ConnectionError):
                while stream.readline() != b"\r\n":
                    pass
                received.append(stream.read(len(PAYLOAD)))
                connection.sendall(OK + b"content-length: 5\r\n\r\nasked")
                time.sleep(0.02)
                connection.sendall(OK + b"content-length: 7\r\n\r\nunasked")
                stream.read()  # until the other side closes

    egress = Egress(DEVELOPMENT)
    provider = WebhookProvider(egress, timeout=TIMEOUT)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = asyncio.create_task(asyncio.to_thread(serve, listener))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        assert await delivers(provider, job(url)) == AttemptResult(Outcome.SUCCESS, 200, "asked")
        if seen:
            await asyncio.sleep(0.1)
        else:
            time.sleep(0.1)
        assert await delivers(provider, job(url)) == AttemptResult(Outcome.SUCCESS, 200, "asked")
        assert received == [PAYLOAD] * 2
        await egress.close()
        await receiver


@asynccontextmanager
async def receiver_that_closes() -> AsyncIterator[tuple[str, list[bytes]]]:
    """In a thread of its own."""
    received: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as stream:
                    while stream.readline() != b"\r\n":
                        pass
                    received.append(stream.read(len(PAYLOAD)))
                    connection.sendall(OK + b"content-length: 0\r\n\r\n")
                    time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(asyncio.to_thread(serve, listener))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/", received
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            await serving


@dataclass
class TlsReceiver:
    """Answers on TLS as receiver.example, with a certificate of its own making."""

    certificate: Path
    port: int = 0
    names: list[str | None] = field(default_factory=list)
    received: int = 0


def certificate(folder: Path, name: str, *, expired: bool = False) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + datetime.timedelta(days=-1 if expired else 1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, private = folder / "certificate.pem", folder / "key.pem"
    chain.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return chain, private


@asynccontextmanager
async def tls_receiver(folder: Path, *, expired: bool = False) -> AsyncIterator[TlsReceiver]:
    chain, private = certificate(folder, "receiver.example", expired=expired)
    receiver = TlsReceiver(chain)

    async def receive(_: web.BaseRequest) -> web.Response:
        receiver.received += 1
        return web.Response()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain, private)
    context.sni_callback = lambda _, name, __: receiver.names.append(name)
    server = RawTestServer(receive, host="127.0.0.1", scheme="https")
    await server.start_server(ssl=context)
    receiver.port = server.port or 0
    yield receiver
    await server.close()


async def test_a_certificate_that_is_not_trusted_is_unreachable(tmp_path: Path) -> None:
    egress = Egress(DEVELOPMENT, loopback)
    async with tls_receiver(tmp_path) as receiver:
        result = await WebhookProvider(egress).execute(job(f"https://receiver.example:{receiver.port}/"))
    await egress.close()
    assert (result.outcome, result.error) == (Outcome.UNREACHABLE, "the receiver's TLS certificate is not trusted")
    assert receiver.received == 0


@pytest.mark.parametrize(
    ("host", "expired", "outcome"),
    [
        ("receiver.example", False, Outcome.SUCCESS),
        ("other.example", False, Outcome.UNREACHABLE),
        ("receiver.example", True, Outcome.UNREACHABLE),
    ],
)
async def test_the_certificate_is_verified_for_the_name_and_not_for_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, expired: bool, outcome: Outcome
) -> None:
    async with tls_receiver(tmp_path, expired=expired) as receiver:
        monkeypatch.setenv("SSL_CERT_FILE", str(receiver.certificate))
        egress = Egress(DEVELOPMENT, loopback)
        result = await WebhookProvider(egress).execute(job(f"https://{host}:{receiver.port}/"))
        await egress.close()
    assert result.outcome is outcome
    assert receiver.names == [host]
    assert receiver.received == (outcome is Outcome.SUCCESS)


async def test_an_attempt_leaves_no_connection_behind_to_a_receiver_that_does_not_end_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def script(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK + b"content-length: 20000\r\n\r\n" + b"x" * 20_000)
        await writer.drain()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(60)

    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / TRUSTED))
    async with serving(script, make_certificates(tmp_path)["good"]) as hostile:
        port = URL(hostile.url).port
        egress = Egress(DEVELOPMENT)
        assert (await WebhookProvider(egress).execute(job(hostile.url))).outcome is Outcome.SUCCESS

        def left() -> list[Any]:
            return [one for one in psutil.Process().net_connections("tcp") if one.raddr and one.raddr[1] == port]

        await eventually(lambda: not any(one.status == psutil.CONN_ESTABLISHED for one in left()))
        await egress.close()


async def test_a_receiver_without_tls_is_unreachable_over_https(provider: WebhookProvider) -> None:
    async with serving(says(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as hostile:
        result = await delivers(provider, job(hostile.url.replace("http:", "https:")))
    assert result.outcome is Outcome.UNREACHABLE
