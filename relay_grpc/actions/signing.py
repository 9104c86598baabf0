"""Webhook secrets and signatures (pure).

Standard Webhooks 1.0 (github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md), and the older
X-Signature over the body alone, which a replay passes: only for receivers that know no better.
"""

import base64
import binascii
import hmac
import secrets as random
from collections.abc import Iterable

SECRET_PREFIX = "whsec_"  # noqa: S105 (no secret)
SECRET_BYTES_MIN, SECRET_BYTES_MAX = 24, 64  # Standard Webhooks, "Signature scheme"


def new_secret() -> str:
    """Makes a signing secret: "whsec_" and the base64 of 32 random bytes."""
    return SECRET_PREFIX + base64.b64encode(random.token_bytes(32)).decode()


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


def sign(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Returns one entry of webhook-signature. message_id: without a dot; timestamp: Unix seconds."""
    mac = hmac.digest(secret, f"{message_id}.{timestamp}.".encode() + body, "sha256")
    return "v1," + base64.b64encode(mac).decode()


def signature_header(secrets: Iterable[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """Returns the value of webhook-signature: one entry per secret, so that receivers verify through a rotation."""
    return " ".join(sign(secret, message_id, timestamp, body) for secret in secrets)


def body_signature(secret: bytes, body: bytes) -> str:
    """Returns the value of the older X-Signature."""
    return "sha256=" + hmac.digest(secret, body, "sha256").hex()
