"""What the values of settings are: read from text, and refused with what they should be."""

import base64
import binascii
import re
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr
from relay.proofs import ProofError, VerifierKey

from relay_grpc import failpoints


class Address(BaseModel):
    """Where to listen. port 0: the system chooses."""

    model_config = ConfigDict(frozen=True)
    host: str
    port: int = Field(ge=0, le=65535)

    @classmethod
    def parse(cls, text: Any) -> Any:
        host, colon, port = str(text).rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError("should be HOST:PORT, such as 127.0.0.1:50051")
        return cls(host=host.strip("[]"), port=int(port))

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _postgres_url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
        raise ValueError("should be a postgresql:// URL")
    return value


def _redis_url(value: SecretStr) -> SecretStr:
    if not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("should be a redis://, rediss:// or unix:// URL")
    return value


def _signing_secret(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    try:
        raw = base64.b64decode(text[6:], validate=True) if text.startswith("whsec_") else text.encode()
    except binascii.Error:
        raw = b""
    if not 24 <= len(raw) <= 64:
        raise ValueError("should be whsec_ and the base64 of 24 to 64 bytes, or 24 to 64 characters")
    return value


def _split(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class NamedKey(BaseModel):
    """Key material that is rotated: an id, which is stored beside what it made, and 32 bytes. Written ID:BASE64."""

    model_config = ConfigDict(frozen=True)
    id: str
    key: bytes = Field(repr=False)

    @classmethod
    def parse(cls, text: Any) -> Any:
        id_, colon, encoded = str(text).partition(":")
        try:
            key = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            key = b""
        if not colon or not id_ or len(key) != 32:
            raise ValueError("each key should be ID:BASE64 with 32 bytes, such as those of 'relay keygen'")
        return cls(id=id_, key=key)


def _audit_key(text: Any) -> Any:
    key = NamedKey.parse(text)
    if "+" in key.id or any(map(str.isspace, key.id)):
        raise ValueError('an id names its key in checkpoints, so it has no spaces and no "+" (C2SP signed-note)')
    return key


_ISSUER = re.compile(
    r"(?P<url>https?://(?:[\w.-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:/(?:(?![?#\\])[!-~])*)?)\s+(?P<audience>[!-~]+)",
    re.ASCII,
)


class OidcIssuer(BaseModel):
    """Who signs users' tokens, and for whom they have to be meant. Written URL AUDIENCE.

    No URL has a "#" in it, so URL#USER names one user of one issuer.
    """

    model_config = ConfigDict(frozen=True)
    url: str
    audience: str

    @classmethod
    def parse(cls, text: Any) -> Any:
        match = _ISSUER.fullmatch(str(text))
        if match is None or len(match["url"]) > 255:
            raise ValueError(
                "each issuer should be URL AUDIENCE, such as https://login.example.com relay; "
                "the URL has no user, query or fragment, and 255 characters at most"
            )
        return cls(**match.groupdict())


def _verifier_key(text: Any) -> Any:
    try:
        return VerifierKey.parse(str(text))
    except ProofError as error:
        raise ValueError(str(error)) from None


_CHECKPOINT_URL = re.compile(r"https?://[^@/?#\s]+([/?][^#\s]*)?")


def _checkpoint_place(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    if "://" in text and not _CHECKPOINT_URL.fullmatch(text):
        raise ValueError("should be a folder, or an https:// URL without user and fragment")
    return value


def _failpoint(value: Any) -> Any:
    point, colon, nth = str(value).rpartition(":")
    if not colon or point not in failpoints.POINTS or not nth.isdecimal() or int(nth) < 1:
        raise ValueError(f"should be POINT:NTH, where POINT is one of {', '.join(failpoints.POINTS)}")
    return point, int(nth)


PostgresUrl = Annotated[SecretStr, AfterValidator(_postgres_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
SigningSecret = Annotated[SecretStr, AfterValidator(_signing_secret)]
Listen = Annotated[Address, BeforeValidator(Address.parse)]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], BeforeValidator(_split)]
NamedKeys = Annotated[tuple[Annotated[NamedKey, BeforeValidator(NamedKey.parse)], ...], BeforeValidator(_split)]
AuditKeys = Annotated[tuple[Annotated[NamedKey, BeforeValidator(_audit_key)], ...], BeforeValidator(_split)]
Issuers = Annotated[tuple[Annotated[OidcIssuer, BeforeValidator(OidcIssuer.parse)], ...], BeforeValidator(_split)]
HashKey = Annotated[SecretStr, Field(min_length=32)]
VerifierKeys = Annotated[tuple[Annotated[VerifierKey, BeforeValidator(_verifier_key)], ...], BeforeValidator(_split)]
CheckpointPlace = Annotated[SecretStr, AfterValidator(_checkpoint_place)]
Failpoint = Annotated[tuple[str, int], BeforeValidator(_failpoint)]
