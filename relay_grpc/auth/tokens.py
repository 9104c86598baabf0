"""What a user's token says, and whether a key of its issuer signed it. No I/O.

A token is a signed JWT: an ID token of OpenID Connect, or an access token of RFC 9068. The rules are those of RFC 8725.
Nothing of a token chooses how it is checked: its header may name a key of the issuer, and has to name an algorithm that
this very key is for; keys, URLs and certificates inside it are not looked at.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, TypeGuard

from joserfc import jws
from joserfc.errors import ExpiredTokenError, JoseError, UnsupportedAlgorithmError
from joserfc.jwk import ECKey, JWKRegistry, Key, OKPKey, RSAKey
from joserfc.jwt import JWTClaimsRegistry

# Every algorithm that may sign, and the one kind of key that it is for.
ALGORITHMS = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "RSA"),
    "ES256": "P-256",
    "ES384": "P-384",
    "ES512": "P-521",
    **dict.fromkeys(("EdDSA", "Ed25519"), "Ed25519"),
}
# RFC 8725, 3.11: an issuer signs more than credentials, such as notices of a logout, with the same keys.
TYPES = {"", "jwt", "application/jwt", "at+jwt", "application/at+jwt"}

SKEW = 30  # seconds by which the issuer's clock may differ from ours
MAX_TOKEN = 8 * 1024  # characters; all metadata of a call has 8 KiB
MAX_HEADER = 2 * 1024
MAX_TEXT = 255  # characters of a subject, as OpenID Connect has it, and of a name
MAX_KEYS = 100
RSA_BITS = range(2048, 8192 + 1)


class Defect(StrEnum):
    """What is wrong with a token. For metrics: callers are never told."""

    MALFORMED = "malformed"
    ISSUER = "issuer"
    ALGORITHM = "algorithm"
    CLAIMS = "claims"
    EXPIRED = "expired"
    KEY = "signing_key"
    SIGNATURE = "signature"


class TokenRefused(Exception):
    """The token is no good."""

    def __init__(self, defect: Defect) -> None:
        super().__init__(defect)
        self.defect = defect


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it was presented: nothing in it is to be believed before both checks have passed."""

    signed: jws.CompactSignature
    algorithm: str
    key_id: str | None
    issuer: str
    claims: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a token that is good stands for. subject: the user's id at the issuer."""

    issuer: str
    subject: str
    name: str
    expires_at: datetime


class Keys:
    """The keys of an issuer that can check signatures. published: the "keys" of its JWK set."""

    def __init__(self, published: Iterable[Any]) -> None:
        self.published = list(published)[:MAX_KEYS]
        self._keys = [(kind, key) for entry in self.published if (key := _import(entry)) and (kind := _kind(key))]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, algorithm: str, key_id: str | None) -> Key | None:
        """The key of this id for this algorithm; without an id, the only one that there is. None: not exactly one."""
        found = [
            key
            for kind, key in self._keys
            if kind == ALGORITHMS[algorithm] and key.alg in (None, algorithm) and key_id in (None, key.kid)
        ]
        return found[0] if len(found) == 1 else None


class _Registry(jws.JWSRegistry):
    """What joserfc reads and checks for us."""

    max_header_length = MAX_HEADER

    def get_alg(self, name: str) -> Any:
        if name not in ALGORITHMS:
            raise UnsupportedAlgorithmError(name)
        return self.algorithms[name]


_REGISTRY = _Registry(strict_check_header=False)  # RFC 7515, 4: what is not understood and not critical is ignored


def parse(text: str) -> Token:
    """Takes a token apart, the cheapest look first. Raises TokenRefused."""
    if len(text) > MAX_TOKEN or text.count(".") != 2:
        raise TokenRefused(Defect.MALFORMED)
    try:
        signed = jws.extract_compact(text.encode("ascii"), registry=_REGISTRY)
        header = signed.headers()
        _REGISTRY.check_header(header)
        claims = json.loads(signed.payload)
        issuer = claims["iss"]
    except (JoseError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise TokenRefused(Defect.MALFORMED) from None
    # No extension is understood here: neither those that are critical, nor the unencoded payload of RFC 7797.
    if not isinstance(issuer, str) or "crit" in header or "b64" in header:
        raise TokenRefused(Defect.MALFORMED)
    if header["alg"] not in ALGORITHMS:
        raise TokenRefused(Defect.ALGORITHM)
    if header.get("typ", "").lower() not in TYPES:
        raise TokenRefused(Defect.CLAIMS)
    return Token(signed, header["alg"], header.get("kid"), issuer, claims)


def check_claims(token: Token, issuer: str, audience: str, now: float) -> Identity:
    """Whom the token would stand for, were it signed. now: seconds since the epoch. Raises TokenRefused."""
    claims = token.claims
    registry = JWTClaimsRegistry(
        now=int(now),
        leeway=SKEW,
        iss={"essential": True, "value": issuer},
        aud={"essential": True, "value": audience},
        sub={"essential": True},
        exp={"essential": True},
    )
    try:
        registry.validate(claims)
        expires_at = datetime.fromtimestamp(claims["exp"], UTC)
    except ExpiredTokenError:
        raise TokenRefused(Defect.EXPIRED) from None
    except (JoseError, ValueError, OverflowError, OSError):  # the last three: a time beyond the year 9999
        raise TokenRefused(Defect.CLAIMS) from None
    # "cnf": good together with a key of the bearer's alone (RFC 7800). "events": a notice, not a credential (RFC 8417).
    if not _is_text(claims["sub"]) or "cnf" in claims or "events" in claims:
        raise TokenRefused(Defect.CLAIMS)
    return Identity(issuer, claims["sub"], _name(claims), expires_at)


def check_signature(token: Token, key: Key) -> None:
    """key: one that `Keys.find` found for the token. Raises TokenRefused."""
    try:
        signed = jws.validate_compact(token.signed, key, registry=_REGISTRY)
    except (JoseError, ValueError):
        signed = False
    if not signed:
        raise TokenRefused(Defect.SIGNATURE)


def _name(claims: dict[str, Any]) -> str:
    """What people call the user: the first of the usual claims that can be shown, or else the user's id."""
    email = claims.get("email") if claims.get("email_verified") is not False else None
    for name in (email, claims.get("preferred_username"), claims.get("name")):
        if _is_text(name) and name.isprintable():
            return name
    return str(claims["sub"])


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether it is text of a fit length that a column and a message can hold."""
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_TEXT or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _import(published: Any) -> Key | None:
    """The key of one entry of a JWK set; None for one that is no use here, which leaves the others their use."""
    try:
        key = JWKRegistry.import_key(published)
        key.check_use("sig")
        key.check_key_op("verify")
    except Exception:  # whatever an issuer may write, and whatever two libraries make of that
        return None
    return None if key.is_private else key  # who publishes the private part has made everybody a signer


def _kind(key: Key) -> str:
    """What of ALGORITHMS' kinds it is; "" for a key that nothing should be signed with."""
    match key:
        case RSAKey():
            return "RSA" if key.public_key.key_size in RSA_BITS else ""
        case ECKey() | OKPKey():
            return key.curve_name
        case _:
            return ""
