"""Whose tokens are good: the issuers' keys, read and kept fresh, and the check of a token against them.

An issuer tells where its keys are at ISSUER/.well-known/openid-configuration (OpenID Connect Discovery). They are read
soon after the start, or when they are first needed: an issuer that is down keeps nobody but its own users out. A token
is checked once; from then on a keyed hash of its text finds what came of it, for as long as the token lasts and its
issuer's keys stay the same. That takes about 3 us instead of 50 to 600, too little for either to leave the event loop.
"""

import asyncio
import hashlib
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import aiohttp

from relay_grpc import errors
from relay_grpc.actions.destinations import EgressRefused
from relay_grpc.actions.egress import Egress
from relay_grpc.auth import tokens
from relay_grpc.auth.tokens import Defect, Identity, Keys, Token, TokenRefused
from relay_grpc.setting_types import OidcIssuer
from relay_grpc.telemetry import Metrics

log = logging.getLogger(__name__)
READ_SECONDS = 5.0  # for both documents together
MAX_DOCUMENT = 256 * 1024  # bytes
CACHE_SIZE = 100_000


@dataclass(frozen=True, slots=True)
class Pace:
    """When an issuer's keys are read, in seconds.

    refresh: after which they are read again. stale: after which they are no longer believed, where that did not work.
    spacing: that at least lie between two readings, however many tokens name keys that nobody knows.
    """

    refresh: float = 300.0
    stale: float = 3600.0
    spacing: float = 10.0


class IssuerUnusableError(Exception):
    """The issuer does not tell its keys; the text tells the operator why."""


class Issuer:
    """One issuer and its keys."""

    def __init__(self, trusted: OidcIssuer, egress: Egress, metrics: Metrics, pace: Pace) -> None:
        self.url, self.audience = trusted.url, trusted.audience
        self._egress = egress
        self._metrics = metrics
        self._pace = pace
        self._keys: Keys | None = None
        self._read_at = self._tried_at = float("-inf")
        self._failing = False
        self._reading: asyncio.Task[None] | None = None

    @property
    def known(self) -> Keys | None:
        """The keys as they were last read; None: that is too long ago."""
        return self._keys if time.monotonic() - self._read_at < self._pace.stale else None

    async def keys(self) -> Keys:
        """The keys, read now where they are not known. Raises DependencyUnavailable."""
        if self.known is None:
            await self.read()
        keys = self.known
        if keys is None:
            wait = self._tried_at + self._pace.spacing - time.monotonic()
            raise errors.DependencyUnavailable(
                f"the keys of {self.url} can't be read, so its users' tokens can't be checked; try again",
                retry_after=max(1.0, wait),
            )
        return keys

    async def read(self) -> None:
        """Reads the keys anew, or waits for the reading that is under way; does nothing where the last is too fresh."""
        if (reading := self._begin()) is not None:
            await asyncio.shield(reading)  # callers share it, and none of them can cancel it

    def refresh(self) -> None:
        """Begins to read the keys anew if it is time to."""
        if time.monotonic() - self._read_at >= self._pace.refresh:
            self._begin()

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    def _begin(self) -> asyncio.Task[None] | None:
        if self._reading is not None and not self._reading.done():
            return self._reading
        if time.monotonic() - self._tried_at < self._pace.spacing:
            return None
        self._tried_at = time.monotonic()
        self._reading = asyncio.create_task(self._read())
        return self._reading

    async def _read(self) -> None:
        """What is known stays known where this fails."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(READ_SECONDS):
                published = await self._published()
        except (IssuerUnusableError, aiohttp.ClientError, EgressRefused, OSError, ValueError, RecursionError) as error:
            self._metrics.oidc_readings.labels("failed").inc()
            if not self._failing:
                log.warning("the keys of the issuer %s can't be read: %s", self.url, error or type(error).__name__)
            self._failing = True
            return
        self._metrics.oidc_readings.labels("ok").inc()
        if self._failing:
            log.warning("the keys of the issuer %s can be read again", self.url)
        self._failing = False
        if self._keys is None or self._keys.published != published:  # the same keys leave checked tokens checked
            self._keys = Keys(published)
            log.info("the issuer %s has %d keys", self.url, len(self._keys))
        self._read_at = began

    async def _published(self) -> list[Any]:
        discovery = await self._document(self.url.removesuffix("/") + "/.well-known/openid-configuration")
        if discovery.get("issuer") != self.url:
            raise IssuerUnusableError("its discovery document is another issuer's")
        key_set = await self._document(str(discovery.get("jwks_uri", "")))
        keys = key_set.get("keys")
        if not isinstance(keys, list):
            raise IssuerUnusableError("its jwks_uri has no JWK set")
        return keys[: tokens.MAX_KEYS]

    async def _document(self, url: str) -> dict[str, Any]:
        async with self._egress.request("GET", url, body=b"", headers={"accept": "application/json"}) as response:
            if response.status != 200:
                raise IssuerUnusableError(f"{url} answered {response.status}")
            content = bytearray()
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > MAX_DOCUMENT:
                    raise IssuerUnusableError(f"{url} answered more than {MAX_DOCUMENT} bytes")
        document = json.loads(content)
        if not isinstance(document, dict):
            raise IssuerUnusableError(f"{url} answered no JSON object")
        return document


@dataclass(frozen=True, slots=True)
class _Proof:
    """What came of a token. keys: those of the issuer that it was checked with."""

    identity: Identity
    keys: Keys


class TokenVerifier:
    """Checks users' tokens. One per process; close it.

    egress: the way to the issuers. clock: seconds since the epoch.
    """

    def __init__(
        self,
        trusted: Iterable[OidcIssuer],
        egress: Egress,
        metrics: Metrics,
        *,
        pace: Pace = Pace(),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.issuers = {one.url: Issuer(one, egress, metrics, pace) for one in trusted}
        self._metrics = metrics
        self._clock = clock
        self._proofs: OrderedDict[bytes, _Proof] = OrderedDict()
        self._cache_key = secrets.token_bytes(32)

    async def verify(self, text: str) -> Identity:
        """Whom the token stands for. Raises Unauthenticated and DependencyUnavailable."""
        digest = hashlib.blake2b(text.encode(), digest_size=16, key=self._cache_key).digest()
        proof = self._proofs.get(digest)
        if proof is not None and self._holds(proof):
            self._proofs.move_to_end(digest)
            return proof.identity
        try:
            proof = await self._prove(tokens.parse(text))
        except TokenRefused as refusal:
            self._proofs.pop(digest, None)
            self._metrics.auth_failures.labels(refusal.defect).inc()
            raise errors.Unauthenticated from None
        self._proofs[digest] = proof
        if len(self._proofs) > CACHE_SIZE:
            self._proofs.popitem(last=False)
        return proof.identity

    def refresh(self) -> None:
        """Begins to read what keys it is time to read again. To be called every few seconds."""
        for issuer in self.issuers.values():
            issuer.refresh()

    def close(self) -> None:
        for issuer in self.issuers.values():
            issuer.close()

    def _holds(self, proof: _Proof) -> bool:
        lasts = proof.identity.expires_at.timestamp() + tokens.SKEW > self._clock()
        return lasts and proof.keys is self.issuers[proof.identity.issuer].known

    async def _prove(self, token: Token) -> _Proof:
        """The cheapest first: of what is no token of an issuer, for us and for now, not even the key is looked up."""
        issuer = self.issuers.get(token.issuer)
        if issuer is None:
            raise TokenRefused(Defect.ISSUER)
        identity = tokens.check_claims(token, issuer.url, issuer.audience, self._clock())
        keys = await issuer.keys()
        key = keys.find(token.algorithm, token.key_id)
        if key is None:  # perhaps a key that is newer than what is known
            await issuer.read()
            keys = await issuer.keys()
            key = keys.find(token.algorithm, token.key_id)
        if key is None:
            raise TokenRefused(Defect.KEY)
        tokens.check_signature(token, key)
        return _Proof(identity, keys)
