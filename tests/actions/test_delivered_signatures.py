"""What receivers really get, in the eyes of the published libraries and of verifiers written from the specification."""

import asyncio
import base64
import hmac
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc
import pytest
import rfc8785
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from relay.v1 import connections_pb2, connections_pb2_grpc
from standardwebhooks import Webhook, WebhookVerificationError
from svix.webhooks import Webhook as SvixWebhook

from relay_grpc import errors
from relay_grpc.actions import signing
from relay_grpc.actions.catalogue import find
from relay_grpc.actions.destinations import EgressPolicy
from relay_grpc.actions.egress import Egress
from relay_grpc.actions.execution import Job, Outcome
from relay_grpc.actions.providers.webhook import WebhookProvider
from relay_grpc.actions.signing import Key, Scheme
from tests.actions.caller import Caller, answer

pytestmark = pytest.mark.long  # the full counts take seconds
Figure = Callable[[str], None]
SEED = 20_251_123
BODIES, MUTANTS = 1000, 10_000
SECRET, PRIVATE_KEY = signing.new_secret(), signing.new_ed25519()
KEYS = (Key(Scheme.HMAC, signing.decode_secret(SECRET)), Key(Scheme.ED25519, PRIVATE_KEY))
PUBLIC_KEY = signing.public_key(PRIVATE_KEY)
ODD = [0.0, -0.0, 1e20, 1e21, 1e-7, 5e-324, 1.7976931348623157e308, 2**53 - 1, -(2**53) + 1, True, None, "", [], {}]


@dataclass(frozen=True)
class Delivered:
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Deliveries:
    """What came of what was sent. age: seconds by which the sender's clock is late."""

    egress: Egress
    url: str
    received: list[Delivered] = field(default_factory=list)

    async def send(self, payload: dict[str, Any], age: float = 0.0) -> Delivered:
        provider = WebhookProvider(self.egress, clock=lambda: time.time() - age)
        parameters = find("webhook.send").canonical({"payload": payload})
        job = Job(uuid4(), "webhook.send", parameters, {"url": self.url, "body_signature": True}, KEYS)
        assert (await provider.execute(job)).outcome is Outcome.SUCCESS
        return self.received[-1]


@pytest.fixture
async def deliveries() -> AsyncIterator[Deliveries]:
    async def receive(request: web.BaseRequest) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        made.received.append(Delivered(headers, await request.read()))
        return web.Response()

    async with RawTestServer(receive, host="127.0.0.1") as server:
        egress = Egress(EgressPolicy(allow_loopback=True, https_only=False))
        made = Deliveries(egress, str(server.make_url("/")))
        yield made
        await egress.close()


def verified_by_the_specification(delivered: Delivered) -> None:
    """By nothing of ours but the texts of the keys. Raises InvalidSignature."""
    headers = delivered.headers
    entries = dict(entry.split(",", 1) for entry in headers["webhook-signature"].split(" "))
    secret = base64.b64decode(SECRET.removeprefix("whsec_"))
    if not hmac.compare_digest(base64.b64decode(entries["v1"]), hmac.new(secret, signed(delivered), "sha256").digest()):
        raise InvalidSignature
    public(PUBLIC_KEY).verify(base64.b64decode(entries["v1a"]), signed(delivered))


def signed(delivered: Delivered) -> bytes:
    """What the signatures are of."""
    id_, timestamp = (delivered.headers[name].encode() for name in ("webhook-id", "webhook-timestamp"))
    return b".".join((id_, timestamp, delivered.body))


def public(text: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(base64.b64decode(text.removeprefix("whpk_")))


def drawn(draw: random.Random, depth: int = 0) -> Any:
    """A JSON value."""
    kind = draw.randrange(5 if depth < 4 else 3)
    if kind == 0:
        return draw.choice([*ODD, draw.uniform(-1e9, 1e9), draw.randrange(-(2**53), 2**53)])
    if kind in (1, 2):
        return text(draw)
    if kind == 3:
        return [drawn(draw, depth + 1) for _ in range(draw.randrange(5))]
    return {text(draw): drawn(draw, depth + 1) for _ in range(draw.randrange(5))}


def text(draw: random.Random) -> str:
    planes = [(0x00, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(draw.randrange(12)))


async def test_1000_random_bodies_are_verified_as_they_came(deliveries: Deliveries, figure: Figure) -> None:
    draw = random.Random(SEED)
    payloads = [{}, *({text(draw): drawn(draw) for _ in range(draw.randrange(1, 8))} for _ in range(BODIES - 1))]
    for payload in payloads:
        delivered = await deliveries.send(payload)
        assert delivered.body == rfc8785.dumps(payload)
        Webhook(SECRET).verify(delivered.body, dict(delivered.headers))
        SvixWebhook(SECRET).verify(delivered.body, dict(delivered.headers))
        verified_by_the_specification(delivered)
        mac = hmac.new(signing.decode_secret(SECRET), delivered.body, "sha256").hexdigest()
        assert delivered.headers["x-signature"] == f"sha256={mac}"
    assert len(deliveries.received) == BODIES
    figure(f"{BODIES} bodies: standardwebhooks, svix and two independent verifiers (v1, v1a) accept all (seed {SEED})")


async def test_10_000_single_bit_mutations_are_accepted_by_nobody(deliveries: Deliveries, figure: Figure) -> None:
    draw = random.Random(SEED)
    originals = [await deliveries.send({"order": text(draw), "amount": draw.random()}) for _ in range(50)]
    accepted: list[Delivered] = []
    for number in range(MUTANTS):
        mutant = mutated(draw, originals[number % len(originals)])
        for verify in (Webhook(SECRET).verify, SvixWebhook(SECRET).verify):
            try:
                verify(mutant.body, dict(mutant.headers))
            except (WebhookVerificationError, ValueError):  # ValueError: no UTF-8 any more, or no signature
                continue
            accepted.append(mutant)
        try:
            verified_by_the_specification(mutant)
        except (InvalidSignature, ValueError, KeyError):
            continue
        accepted.append(mutant)
    assert not accepted
    figure(f"{MUTANTS} mutations of id, timestamp, body and signature: 0 accepted (seed {SEED})")


def mutated(draw: random.Random, delivered: Delivered) -> Delivered:
    """One bit is another: of the id, the timestamp, the body, or of each signature, whose base64 has bits to spare."""
    headers, body = dict(delivered.headers), delivered.body
    part = draw.choice(["webhook-id", "webhook-timestamp", "body", "webhook-signature"])
    if part == "body":
        body = flipped(draw, body, 8)
    elif part == "webhook-signature":
        entries = [entry.split(",", 1) for entry in headers[part].split(" ")]
        flips = [(version, flipped(draw, base64.b64decode(signature), 8)) for version, signature in entries]
        headers[part] = " ".join(f"{version},{base64.b64encode(raw).decode()}" for version, raw in flips)
    else:
        headers[part] = flipped(draw, headers[part].encode(), 7).decode()
    return Delivered(headers, body)


def flipped(draw: random.Random, data: bytes, bits: int) -> bytes:
    index = draw.randrange(len(data))
    return data[:index] + bytes([data[index] ^ 1 << draw.randrange(bits)]) + data[index + 1 :]


async def test_a_replay_after_301_seconds_is_refused(deliveries: Deliveries) -> None:
    for age, accepted in ((0, True), (295, True), (301, False), (-301, False)):
        delivered = await deliveries.send({"order": "or_1829"}, age)
        verified_by_the_specification(delivered)
        for verify in (Webhook(SECRET).verify, SvixWebhook(SECRET).verify):
            if accepted:
                verify(delivered.body, dict(delivered.headers))
            else:
                with pytest.raises(WebhookVerificationError, match="timestamp too"):
                    verify(delivered.body, dict(delivered.headers))


@pytest.mark.parametrize("number", [float("1e400"), float("-1e400"), float("nan")])
def test_numbers_that_json_lacks_get_no_preview(number: float) -> None:
    with pytest.raises(errors.InvalidRequest):
        find("webhook.send").canonical({"payload": {"number": number}})


def test_what_is_signed_has_no_name_twice() -> None:
    parameters = find("webhook.send").canonical({"payload": json.loads('{"a": 1, "a": 2}')})
    assert parameters == '{"payload":{"a":2}}'


async def test_a_rotation_under_load_leaves_no_delivery_that_a_receiver_cannot_verify(
    caller: Caller, long: bool, figure: Figure
) -> None:
    """Every key that was told before a delivery was asked for verifies it: none of them has expired."""
    count, rotations, rate = (1000, 9, 50.0) if long else (100, 4, 50.0)
    keys, told = [caller.connection.signing_secret], []
    previews = [await caller.preview(number=number) for number in range(count)]

    async def rotate(channel: grpc.aio.Channel) -> None:
        connections = connections_pb2_grpc.ConnectionsServiceStub(channel)
        for turn in range(rotations):
            await asyncio.sleep(count / rate / (rotations + 1))
            schemes = (connections_pb2.SIGNATURE_SCHEME_ED25519, connections_pb2.SIGNATURE_SCHEME_HMAC_SHA256)
            request = connections_pb2.RotateSecretRequest(id=caller.connection.id, signature_scheme=schemes[turn % 2])
            connection = await answer(connections.RotateSecret(request, metadata=caller.metadata))
            keys.append(connection.signing_secret or connection.signing_keys[0].public_key)

    async with grpc.aio.insecure_channel(str(caller.relay.app.listen)) as channel, asyncio.TaskGroup() as group:
        group.create_task(rotate(channel))
        began = time.monotonic()
        for number, preview in enumerate(previews):
            await asyncio.sleep(began + number / rate - time.monotonic())
            told.append(tuple(keys))
            group.create_task(caller.execute(preview))
    assert len(caller.receiver.requests) == count
    for headers, body in caller.receiver.requests:
        delivered = Delivered(headers, body)
        entries = [entry.split(",", 1) for entry in headers["webhook-signature"].split(" ")]
        for key in told[json.loads(body)["number"]]:
            if key.startswith("whsec_"):
                Webhook(key).verify(body, headers)
            else:
                assert any(
                    verifies(key, base64.b64decode(raw), delivered) for version, raw in entries if version == "v1a"
                )
    assert len(keys) == rotations + 1
    figure(f"{rotations} rotations under {rate:g} deliveries a second: 0 of {count} that a told key does not verify")


def verifies(key: str, signature: bytes, delivered: Delivered) -> bool:
    try:
        public(key).verify(signature, signed(delivered))
    except InvalidSignature:
        return False
    return True
