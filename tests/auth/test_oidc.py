"""How an issuer's keys are read, believed, rotated and given up, and what the issuer can't do to this server."""

import asyncio
import logging
import ssl
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from joserfc.jwk import generate_key

from relay_grpc import errors
from relay_grpc.actions.destinations import EgressPolicy
from relay_grpc.actions.egress import Egress
from relay_grpc.app import ANYWHERE
from relay_grpc.auth import oidc, tokens
from relay_grpc.auth.oidc import Pace, TokenVerifier
from relay_grpc.setting_types import OidcIssuer
from relay_grpc.telemetry import Metrics
from tests.auth.issuer import AUDIENCE, Answer, Issuer, Provider, issuing, never, providing
from tests.clients.test_client import self_signed

USUAL = Pace()
EAGER = Pace(spacing=0.0)


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with issuing() as one:
        yield one


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with providing() as one:
        yield one


@asynccontextmanager
async def trusting(
    url: str, pace: Pace = USUAL, *, https_only: bool = False, **options: Any
) -> AsyncIterator[TokenVerifier]:
    """A verifier that trusts this issuer. https_only: as in production."""
    egress = Egress(EgressPolicy(allow_loopback=True, https_only=https_only, allow=ANYWHERE))
    verifier = TokenVerifier([OidcIssuer(url=url, audience=AUDIENCE)], egress, Metrics(), pace=pace, **options)
    try:
        yield verifier
    finally:
        verifier.close()
        await egress.close()


def readings(verifier: TokenVerifier, outcome: str) -> int:
    return int(verifier._metrics.registry.get_sample_value("relay_oidc_readings_total", {"outcome": outcome}) or 0)


async def is_good(verifier: TokenVerifier, token: str) -> bool:
    try:
        await verifier.verify(token)
    except errors.Unauthenticated:
        return False
    return True


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


# A real provider


@pytest.mark.parametrize("algorithm", ["RS256", "PS256", "ES256", "EdDSA"])
@pytest.mark.filterwarnings("ignore::joserfc.errors.SecurityWarning")
async def test_who_signed_in_at_a_real_provider_is_who_they_are(provider: Provider, algorithm: str) -> None:
    provider.sign_with(algorithm)
    async with trusting(provider.url) as verifier:
        for name in ("alice", "bob"):
            identity = await verifier.verify(await provider.token(name))
            assert (identity.issuer, identity.subject) == (provider.url, name)
            assert identity.name == f"{name}@example.com"
            assert 0 < identity.expires_at.timestamp() - time.time() <= 3600


async def test_a_real_providers_token_can_not_be_changed(provider: Provider) -> None:
    provider.sign_with("RS256")
    token = await provider.token("alice")
    async with trusting(provider.url) as verifier:
        assert await is_good(verifier, token)
        for position in range(0, len(token), 7):
            other = "A" if token[position] != "A" else "B"
            assert not await is_good(verifier, token[:position] + other + token[position + 1 :])


async def test_keys_that_a_real_provider_rotates_are_followed_at_once(provider: Provider) -> None:
    async with trusting(provider.url, EAGER) as verifier:
        before = await provider.token("alice")
        assert await is_good(verifier, before)
        provider.rotate()
        assert await is_good(verifier, before)  # nobody has told yet
        after = await provider.token("alice")
        assert await is_good(verifier, after)
        assert not await is_good(verifier, before)
        assert readings(verifier, "ok") == 3  # the last one looked for the key that is gone


async def test_a_token_for_another_client_of_the_provider_is_none(provider: Provider) -> None:
    token = await provider.token("alice")
    egress = Egress(EgressPolicy(allow_loopback=True, https_only=False))
    verifier = TokenVerifier([OidcIssuer(url=provider.url, audience="other")], egress, Metrics())
    assert not await is_good(verifier, token)
    await egress.close()


# Reading keys, and how often


async def test_keys_are_read_when_they_are_needed_and_by_one_for_all(issuer: Issuer) -> None:
    async with trusting(issuer.url) as verifier:
        assert issuer.asked == []
        minted = [issuer.token(issuer.claims(sub=f"user-{i}")) for i in range(50)]
        identities = await asyncio.gather(*(verifier.verify(token) for token in minted))
        assert [one.subject for one in identities] == [f"user-{i}" for i in range(50)]
        assert issuer.asked == ["/.well-known/openid-configuration", "/keys"]


async def test_a_new_key_works_at_once_and_a_removed_one_stops_with_the_reading(issuer: Issuer) -> None:
    async with trusting(issuer.url, EAGER) as verifier:
        old = issuer.token()
        assert await is_good(verifier, old)
        issuer.published.clear()
        issuer.add_key("EC", "P-256", "new")
        assert await is_good(verifier, issuer.token(kid="new", alg="ES256"))
        assert not await is_good(verifier, old)


async def test_tokens_of_unknown_keys_cause_one_reading_per_spacing(issuer: Issuer) -> None:
    attacker = generate_key("RSA", 2048)
    async with trusting(issuer.url, Pace(spacing=0.5)) as verifier:
        assert await is_good(verifier, issuer.token())
        await asyncio.sleep(0.5)
        started = time.monotonic()
        for batch in range(4):
            minted = [issuer.token(kid=f"{batch}-{i}", key=attacker) for i in range(50)]
            assert not any(await asyncio.gather(*(is_good(verifier, token) for token in minted)))
        allowed = 2 + int((time.monotonic() - started) / 0.5)
        assert 2 <= issuer.readings() <= allowed < 200


async def test_a_flood_of_forged_tokens_does_not_keep_a_new_key_from_being_found(issuer: Issuer) -> None:
    attacker = generate_key("RSA", 2048)
    async with trusting(issuer.url, Pace(spacing=0.3)) as verifier:
        assert await is_good(verifier, issuer.token())
        issuer.add_key("EC", "P-256", "new")
        good = issuer.token(kid="new", alg="ES256")
        async with asyncio.timeout(10):
            while not await is_good(verifier, good):
                assert not await is_good(verifier, issuer.token(kid="forged", key=attacker))
                await asyncio.sleep(0.02)


async def test_keys_are_refreshed_in_the_background(issuer: Issuer) -> None:
    async with trusting(issuer.url, Pace(refresh=0.2, spacing=0.0)) as verifier:
        token = issuer.token()
        assert await is_good(verifier, token)
        verifier.refresh()
        assert issuer.readings() == 1  # not due yet
        issuer.published.clear()
        await asyncio.sleep(0.2)
        verifier.refresh()
        assert await is_good(verifier, token)  # nobody waits for it
        await until(lambda: readings(verifier, "ok") == 2)
        assert not await is_good(verifier, token)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The signatures that are checked from now on."""
    checked: list[Any] = []
    check = tokens.check_signature

    def count(*given: Any) -> None:
        checked.append(given)
        check(*given)

    monkeypatch.setattr(tokens, "check_signature", count)
    return checked


async def test_the_same_keys_read_again_leave_checked_tokens_checked(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = counted(monkeypatch)
    async with trusting(issuer.url, EAGER) as verifier:
        token = issuer.token()
        for more, checks in (([], 1), ([], 1), ([generate_key("EC", "P-256").as_dict(private=False)], 2)):
            issuer.published += more
            await verifier.issuers[issuer.url].read()
            assert await is_good(verifier, token)
            assert len(checked) == checks
        assert readings(verifier, "ok") == 3


async def test_a_caller_who_goes_away_does_not_end_the_reading_of_others(issuer: Issuer) -> None:
    release = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        await release.wait()
        return web.json_response({"keys": issuer.published})

    issuer.answers["/keys"] = slow
    async with trusting(issuer.url) as verifier:
        gone, other = (asyncio.create_task(verifier.verify(issuer.token())) for _ in range(2))
        await until(lambda: issuer.readings() == 1)
        gone.cancel()
        await asyncio.sleep(0)
        release.set()
        assert (await other).subject == "alice"
        assert gone.cancelled()
        assert issuer.readings() == 1


# Remembering tokens


async def test_a_token_is_good_until_it_ends_and_no_longer(issuer: Issuer) -> None:
    now = time.time()
    clock = [now]
    async with trusting(issuer.url, clock=lambda: clock[0]) as verifier:
        token = issuer.token(issuer.claims(exp=int(now) + 100))
        for after, good in ((0.0, True), (99.0, True), (128.0, True), (131.0, False), (99.0, True)):
            clock[0] = now + after
            assert await is_good(verifier, token) is good


async def test_the_memory_of_tokens_is_bounded(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "CACHE_SIZE", 10)
    checked = counted(monkeypatch)
    async with trusting(issuer.url) as verifier:
        minted = [issuer.token(issuer.claims(sub=f"user-{i}")) for i in range(25)]
        for token in minted:
            await verifier.verify(token)
            await verifier.verify(minted[0])  # used all the time, so never the oldest
        assert len(checked) == 25
        assert len(verifier._proofs) == 10
        assert not any(token in repr(verifier._proofs) for token in minted)


async def test_what_a_check_costs(issuer: Issuer, figure: Callable[[str], None]) -> None:
    """The first check is a signature, the next ones a look into memory; neither is worth a thread."""
    issuer.add_key("EC", "P-256", "p256")
    async with trusting(issuer.url) as verifier:
        told = []
        headers: list[dict[str, Any]] = [{"alg": "RS256"}, {"alg": "ES256", "kid": "p256"}]
        for header in headers:
            minted = [issuer.token(issuer.claims(sub=f"user-{i}"), **header) for i in range(301)]
            await verifier.verify(minted.pop())  # reads the keys
            first, later = [statistics.median([await _seconds(verifier, token) for token in minted]) for _ in range(2)]
            assert later < first / 4
            told.append(f"{header['alg']} {first * 1e6:.0f} us, then {later * 1e6:.1f} us")
        figure("; ".join(told))


async def _seconds(verifier: TokenVerifier, token: str) -> float:
    started = time.perf_counter()
    await verifier.verify(token)
    return time.perf_counter() - started


# Issuers that do not do what they should


async def test_an_issuer_that_is_down_keeps_its_users_out_until_it_is_back(
    issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(request: web.Request) -> web.StreamResponse:
        raise web.HTTPInternalServerError

    issuer.answers["/keys"] = broken
    caplog.set_level(logging.INFO, oidc.__name__)
    async with trusting(issuer.url, Pace(spacing=0.2)) as verifier:
        token = issuer.token()
        for _ in range(5):
            with pytest.raises(errors.DependencyUnavailable) as refusal:
                await verifier.verify(token)
            assert issuer.url in refusal.value.message
            assert refusal.value.retry_after is not None
        assert issuer.readings() <= 2  # not one per call
        del issuer.answers["/keys"]
        await asyncio.sleep(0.2)
        assert await is_good(verifier, token)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 2  # when it went and when it came, not once per try
    assert "answered 500" in said[0]
    assert "again" in said[1]


async def test_keys_are_believed_for_a_while_without_their_issuer_and_then_no_more(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "READ_SECONDS", 0.1)
    async with trusting(issuer.url, Pace(refresh=0.1, stale=0.8, spacing=0.05)) as verifier:
        token, fresh = issuer.token(), issuer.token(issuer.claims(sub="bob"))
        assert await is_good(verifier, token)
        issuer.answers["/keys"] = issuer.answers["/.well-known/openid-configuration"] = never
        await asyncio.sleep(0.2)
        verifier.refresh()
        assert await is_good(verifier, token)
        assert await is_good(verifier, fresh)
        await asyncio.sleep(0.7)
        await _refused(verifier, token)


async def endless(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" " * 65536)


async def dripping(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.05)


async def closing(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


DISCOVERY = "/.well-known/openid-configuration"
HOSTILE: dict[str, dict[str, Any]] = {
    "answers nothing": {DISCOVERY: never},
    "answers nothing the second time": {"/keys": never},
    "drips": {DISCOVERY: dripping},
    "never ends": {"/keys": endless},
    "hangs up": {DISCOVERY: closing},
    "fails": {DISCOVERY: (500, "{}")},
    "has no discovery": {DISCOVERY: (404, "{}")},
    "is not ready": {"/keys": (204, "")},
    "answers no JSON": {DISCOVERY: (200, "<html>")},
    "answers a list": {DISCOVERY: (200, "[]")},
    "answers without end in JSON": {DISCOVERY: (200, "[" * 100_000)},
    "answers too much": {"/keys": (200, '{"keys": []' + " " * 300_000 + "}")},
    "answers bytes that are no text": {"/keys": (200, "\udcff")},
    "has no keys": {"/keys": (200, "{}")},
    "has keys that are no list": {"/keys": (200, '{"keys": {}}')},
    "has no address of keys": {DISCOVERY: (200, '{"issuer": "URL"}')},
    "has an address that is a number": {DISCOVERY: (200, '{"issuer": "URL", "jwks_uri": 5}')},
    "has an address that is a file": {DISCOVERY: (200, '{"issuer": "URL", "jwks_uri": "file:///etc/passwd"}')},
    "has an address with a password": {DISCOVERY: (200, '{"issuer": "URL", "jwks_uri": "http://a:b@127.0.0.1/"}')},
    "says that it is another": {DISCOVERY: (200, '{"issuer": "https://evil.example", "jwks_uri": "URL/keys"}')},
    "says that it is almost itself": {DISCOVERY: (200, '{"issuer": "URL/", "jwks_uri": "URL/keys"}')},
    "does not say who it is": {DISCOVERY: (200, '{"jwks_uri": "URL/keys"}')},
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_an_issuer_that_misbehaves_costs_its_own_users_little_time_and_nobody_else_any(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for path, answer in HOSTILE[name].items():
        issuer.answers[path] = _saying(*answer, url=issuer.url) if isinstance(answer, tuple) else answer
    monkeypatch.setattr(oidc, "READ_SECONDS", 0.4)
    token = issuer.token()
    async with trusting(issuer.url) as verifier:
        longest = await _longest_pause(_refused(verifier, token))
        assert longest < 0.3  # the event loop went on
        assert (readings(verifier, "failed"), readings(verifier, "ok")) == (1, 0)


def _saying(status: int, text: str, *, url: str) -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = text.replace("URL", url).encode(errors="surrogateescape")
        return web.Response(status=status, body=body, content_type="application/json")

    return answer


async def _refused(verifier: TokenVerifier, token: str) -> None:
    with pytest.raises(errors.DependencyUnavailable):
        async with asyncio.timeout(10):
            await verifier.verify(token)


async def _longest_pause(work: Any) -> float:
    """Does the work, and tells for how long at most nothing else ran."""
    task = asyncio.ensure_future(work)
    longest, last = 0.0, time.monotonic()
    while not task.done():
        await asyncio.sleep(0.005)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    await task
    return longest


@pytest.mark.parametrize("path", [DISCOVERY, "/keys"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(issuer: Issuer, path: str, status: int) -> None:
    async with issuing() as elsewhere:

        async def redirect(request: web.Request) -> web.StreamResponse:
            return web.Response(status=status, headers={"location": elsewhere.url + path})

        issuer.answers[path] = redirect
        async with trusting(issuer.url) as verifier:
            await _refused(verifier, issuer.token())
        assert elsewhere.asked == []


async def test_proxies_of_the_environment_are_not_used(issuer: Issuer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with trusting(issuer.url) as verifier:
        assert await is_good(verifier, issuer.token())


async def test_one_key_that_nobody_understands_leaves_the_others_their_use(issuer: Issuer) -> None:
    good = issuer.published[0]
    issuer.published[:0] = [
        None,
        5,
        "key",
        [],
        {},
        {"kty": "AKP", "kid": "rsa2"},
        {"kty": "EC", "crv": "P-9", "x": "AA", "y": "AA"},
        {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
        {"kty": "OKP", "crv": "Ed25519", "x": "!"},
        {"kty": "RSA", "e": "AQAB"},
        {"kty": "RSA", "n": "AQAB", "e": "AQ"},
        good | {"kid": 5},
        good | {"kid": "other", "use": "unheard of"},
        good | {"kid": "other", "key_ops": "verify it"},
        {"kty": ["RSA"]},
    ]
    async with trusting(issuer.url) as verifier:
        assert await is_good(verifier, issuer.token())
        assert not await is_good(verifier, issuer.token(kid="other", key=issuer.keys["rsa"]))


@pytest.mark.parametrize("end", ["", "/"])
async def test_an_issuer_that_lives_on_a_path(end: str) -> None:
    async with issuing("/realms/one") as issuer:
        issuer.url += end
        async with trusting(issuer.url) as verifier:
            assert await is_good(verifier, issuer.token())


# TLS, as in production


@pytest.fixture
async def over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Issuer]:
    """An issuer on https:// whose certificate this machine's authorities vouch for."""
    key, certificate = self_signed("localhost")
    file = tmp_path / "pair.pem"
    file.write_bytes(key + certificate)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    async with issuing(ssl=context) as issuer:
        yield issuer


async def test_production_reads_keys_over_tls(over_tls: Issuer) -> None:
    async with trusting(over_tls.url, https_only=True) as verifier:
        assert await is_good(verifier, over_tls.token())


async def test_production_reads_no_keys_in_plaintext(over_tls: Issuer, issuer: Issuer) -> None:
    async def elsewhere(request: web.Request) -> web.StreamResponse:
        return web.json_response({"issuer": over_tls.url, "jwks_uri": f"{issuer.url}/keys"})

    issuer.published = over_tls.published
    over_tls.answers[DISCOVERY] = elsewhere
    async with trusting(over_tls.url, https_only=True) as verifier:
        await _refused(verifier, over_tls.token())
        assert issuer.asked == []
    async with trusting(over_tls.url) as verifier:  # development does
        assert await is_good(verifier, over_tls.token())
    async with trusting(issuer.url, https_only=True) as verifier:
        await _refused(verifier, issuer.token())


async def test_an_issuer_whose_certificate_nobody_vouches_for_is_not_read(
    over_tls: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    async with trusting(over_tls.url, https_only=True) as verifier:
        await _refused(verifier, over_tls.token())
        assert over_tls.asked == []
