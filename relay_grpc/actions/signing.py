"""Webhook secrets and signatures (pure).

Standard Webhooks 1.0 (github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md), and the older
X-Signature over the body alone, which a replay passes: only for receivers that know no better.
"""

import base64
import binascii
import hmac
import secrets as random
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


class Scheme(StrEnum):
    """relay.v1.SignatureScheme; the same words as the Postgres enum secret_kind."""

    HMAC = "hmac"
    ED25519 = "ed25519"


@dataclass(frozen=True, slots=True)
class Key:
    """What signs deliveries. raw: the bytes of the HMAC secret, or the 32 of the Ed25519 private key."""

    scheme: Scheme
    raw: bytes = field(repr=False)


VERSIONS = {Scheme.HMAC: "v1", Scheme.ED25519: "v1a"}  # what their entries of webhook-signature begin with
SECRET_PREFIX = "whsec_"  # noqa: S105 (no secret)
PUBLIC_PREFIX = "whpk_"
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64  # Standard Webhooks, "Signature scheme"


def new_secret() -> str:
    """Makes an HMAC secret: "whsec_" and the base64 of 32 random bytes."""
    return encode_secret(random.token_bytes(32))


def new_ed25519() -> bytes:
    """Makes an Ed25519 private key: its 32 raw bytes (RFC 8032)."""
    return Ed25519PrivateKey.generate().private_bytes_raw()


def encode_secret(raw: bytes) -> str:
    """Returns an HMAC secret as its receivers are told it: "whsec_" and base64."""
    return SECRET_PREFIX + base64.b64encode(raw).decode()


def decode_secret(secret: str) -> bytes:
    """Returns the raw bytes of a "whsec_..." secret. Raises ValueError, which never quotes the secret."""
    if not secret.startswith(SECRET_PREFIX):
        raise ValueError(f"a signing secret begins with {SECRET_PREFIX}")
    try:
        raw = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"what follows {SECRET_PREFIX} is not padded base64") from None
    if not SECRET_BYTES_MIN <= len(raw) <= SECRET_BYTES_MAX:
        raise ValueError(f"a signing secret holds {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes, this one {len(raw)}")
    return raw


def public_key(raw: bytes) -> str:
    """Returns what receivers verify the signatures of an Ed25519 private key with: "whpk_" and base64."""
    public = Ed25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw()
    return PUBLIC_PREFIX + base64.b64encode(public).decode()


def sign(key: Key, message_id: str, timestamp: int, body: bytes) -> str:
    """Returns one entry of webhook-signature. message_id: without a dot; timestamp: Unix seconds."""
    content = f"{message_id}.{timestamp}.".encode() + body
    match key.scheme:
        case Scheme.HMAC:
            signature = hmac.digest(key.raw, content, "sha256")
        case Scheme.ED25519:
            signature = Ed25519PrivateKey.from_private_bytes(key.raw).sign(content)
    return f"{VERSIONS[key.scheme]},{base64.b64encode(signature).decode()}"


def signature_header(keys: Iterable[Key], message_id: str, timestamp: int, body: bytes) -> str:
    """Returns the value of webhook-signature: one entry per key, so that receivers verify through a rotation."""
    return " ".join(sign(key, message_id, timestamp, body) for key in keys)


def body_signature(secret: bytes, body: bytes) -> str:
    """Returns the value of the older X-Signature."""
    return "sha256=" + hmac.digest(secret, body, "sha256").hex()
