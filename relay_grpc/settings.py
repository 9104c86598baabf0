"""Every environment variable that Relay reads, with its default and its bounds; nothing else reads the environment.

`load` reports all problems together, so that an operator fixes them in one go. docs/reference.md tells them all.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from relay_grpc.setting_types import (
    Address,
    AuditKeys,
    CheckpointPlace,
    Failpoint,
    HashKey,
    Issuers,
    Listen,
    NamedKeys,
    Networks,
    PostgresUrl,
    RedisUrl,
    SigningSecret,
    VerifierKeys,
)

MOST_CALLS, MOST_EXECUTIONS = 10_000_000, 1_000_000  # that a limit can be, in units a minute


class SettingsError(Exception):
    """The environment can't be used. problems: one sentence each, beginning with the variable's name."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Settings(BaseModel):
    """The settings of one process."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: PostgresUrl | None = Field(
        None, alias="DATABASE_URL", description="PostgreSQL 15 or later. Unset: an embedded one in the data folder."
    )
    database_public_url: PostgresUrl | None = Field(
        None, alias="DATABASE_PUBLIC_URL", description="What `relay migrate` connects to. Unset: DATABASE_URL."
    )
    database_connections: int = Field(
        10, alias="RELAY_DATABASE_CONNECTIONS", ge=1, le=100, description="The most connections that calls have open."
    )
    redis_url: RedisUrl | None = Field(
        None, alias="REDIS_URL", description="Redis or Valkey, for limits that instances share. Unset: each its own."
    )
    redis_timeout: float = Field(
        0.04,
        alias="RELAY_REDIS_TIMEOUT",
        ge=0.005,
        le=1,
        description="Seconds that a Redis which is lost or frozen may cost the calls that find it so.",
    )
    rate_limit_enabled: bool = Field(True, alias="RATE_LIMIT_ENABLED", description="Whether calls are limited at all.")
    executions_per_minute: int = Field(
        60, alias="RATE_LIMIT_EXEC_PER_MIN", ge=1, le=MOST_EXECUTIONS, description="Executions a minute, per workspace."
    )
    calls_per_minute: int = Field(
        600, alias="RELAY_RATE_LIMIT_CALLS_PER_MIN", ge=1, le=MOST_CALLS, description="Other calls, per workspace."
    )
    rate_limit_shadow: bool = Field(
        False,
        alias="RELAY_RATE_LIMIT_SHADOW",
        description="Count and tell the limits, and refuse nothing: to try them out.",
    )
    oidc_issuers: Issuers = Field(
        (),
        alias="RELAY_OIDC_ISSUERS",
        description="Whose users may call: URL AUDIENCE, by comma; the URL is the tokens' iss, the audience in their "
        "aud. Unset: nobody's.",
    )
    trusted_proxies: Networks = Field(
        (),
        alias="RELAY_TRUSTED_PROXIES",
        description="Networks whose x-forwarded-for tells who calls: CIDR, by comma. Unset: nobody's.",
    )
    actions_enabled: bool | None = Field(
        None,
        alias="ACTIONS_ENABLED",
        description="Whether actions are previewed and executed; retries of what was executed go on. "
        "Unset: in development alone.",
    )
    webhook_url: str | None = Field(
        None,
        alias="WEBHOOK_URL",
        pattern="^https?://",
        description="The default connection of the bootstrap workspace, which `relay bootstrap` makes, and on the "
        "embedded database every start; needs ACTIONS_SIGNING_SECRET.",
    )
    actions_signing_secret: SigningSecret | None = Field(
        None, alias="ACTIONS_SIGNING_SECRET", description="Signs that connection: whsec_..., or 24 to 64 characters."
    )
    telemetry_enabled: bool = Field(True, alias="TELEMETRY_ENABLED", description="Whether /metrics answers.")
    otel_enabled: bool = Field(False, alias="OTEL_ENABLED", description="Whether spans are exported.")
    otel_endpoint: str | None = Field(
        None,
        alias="OTEL_ENDPOINT",
        pattern="^https?://",
        description="Where to: an OTLP/HTTP receiver such as http://tempo:4318.",
    )
    otel_sample_ratio: float = Field(
        0.01, alias="RELAY_OTEL_SAMPLE_RATIO", ge=0, le=1, description="The share of traces begun here that is kept."
    )
    env: Literal["development", "production"] | None = Field(
        None, alias="RELAY_ENV", description="Unset: production with a DATABASE_URL, development without."
    )
    data_dir: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("relay", appauthor=False)),
        alias="RELAY_DATA_DIR",
        description="Where a development start keeps its database and keys. Unset: relay in the user's data folder, "
        "on Linux the XDG data home.",
    )
    listen: Listen = Field(
        Address(host="127.0.0.1", port=50051), alias="RELAY_LISTEN", description="Where gRPC is served."
    )
    http_listen: Listen = Field(
        Address(host="127.0.0.1", port=8080), alias="RELAY_HTTP_LISTEN", description="Where metrics and health are."
    )
    tls_certificate: Path | None = Field(
        None,
        alias="RELAY_TLS_CERTIFICATE",
        description="PEM chain. Unset: plaintext, in production on loopback alone.",
    )
    tls_key: Path | None = Field(None, alias="RELAY_TLS_KEY", description="PEM private key of RELAY_TLS_CERTIFICATE.")
    tls_client_ca: Path | None = Field(
        None, alias="RELAY_TLS_CLIENT_CA", description="PEM: clients must show a certificate of this authority (mTLS)."
    )
    reflection: bool | None = Field(
        None, alias="RELAY_REFLECTION", description="gRPC server reflection. Unset: in development alone."
    )
    egress_allow: Networks = Field(
        (), alias="RELAY_EGRESS_ALLOW", description="Networks that deliveries may reach all the same: CIDR, by comma."
    )
    encryption_keys: NamedKeys = Field(
        (),
        alias="RELAY_ENCRYPTION_KEYS",
        description="Encrypt secrets at rest: ID:BASE64 (32 bytes), by comma; the first encrypts. "
        "Unset in development: made once, in the data folder.",
    )
    key_peppers: NamedKeys = Field(
        (),
        alias="RELAY_KEY_PEPPERS",
        description="Prove API keys that were proven before without a hash: ID:BASE64 (32 bytes), by comma; the first "
        "is used from now on. Unset in development: made once, in the data folder.",
    )
    hash_key: HashKey | None = Field(
        None,
        alias="RELAY_HASH_KEY",
        description="Keys the hashes in audit events: 32 characters or more. "
        "Unset in development: made once, in the data folder.",
    )
    audit_keys: AuditKeys = Field(
        (),
        alias="RELAY_AUDIT_KEYS",
        description="Sign the audit log's checkpoints: ID:BASE64 (an Ed25519 seed of 32 bytes), by comma; all of them "
        "sign. Unset in development: made once, in the data folder.",
    )
    audit_old_keys: VerifierKeys = Field(
        (),
        alias="RELAY_AUDIT_OLD_KEYS",
        description="Public keys of audit keys that were lost, as `relay audit keys` printed them, by comma: the logs "
        "that they signed last go on.",
    )
    audit_checkpoints: CheckpointPlace | None = Field(
        None,
        alias="RELAY_AUDIT_CHECKPOINTS",
        description="Where checkpoints are kept outside the database: a folder, or an https:// URL that takes them by "
        "POST. Unset in development: a folder in the data folder; in production: nowhere, which it warns of.",
    )
    attempt_timeout: float = Field(
        15.0, alias="RELAY_ATTEMPT_TIMEOUT", ge=0.1, le=30, description="Seconds that one delivery may take in all."
    )
    lease: float = Field(
        45.0,
        alias="RELAY_LEASE",
        ge=0.3,
        le=600,
        description="Seconds after which an attempt whose worker is gone is made anew; 3 times the above or more.",
    )
    sweep_interval: float = Field(
        1.0,
        alias="RELAY_SWEEP_INTERVAL",
        ge=0.05,
        le=60,
        description="Seconds between looks for what is due.",
    )
    connection_concurrency: int = Field(
        8,
        alias="RELAY_CONNECTION_CONCURRENCY",
        ge=1,
        le=256,
        description="Attempts that an instance makes at one time for one connection; more wait their turn.",
    )
    retry_floor: float = Field(
        60.0,
        alias="RELAY_RETRY_FLOOR",
        ge=0,
        le=3600,
        description="Seconds that follow a timeout or an answer of 429 before the next attempt, at least.",
    )
    breaker_pause: float = Field(
        30.0,
        alias="RELAY_BREAKER_PAUSE",
        ge=0.1,
        le=3600,
        description="Seconds that a connection's breaker, once open, waits for its first probe; doubled up to an hour.",
    )
    execution_retention: float = Field(
        720.0,
        alias="RELAY_EXECUTION_RETENTION",
        ge=76,
        le=87600,
        description="Hours that executions which have ended are kept, with their attempts and idempotency keys.",
    )
    failpoint: Failpoint | None = Field(
        None,
        alias="RELAY_FAILPOINT",
        description="For tests: POINT:NTH kills the server when it comes to that point for the nth time.",
    )
    shutdown_grace: float = Field(
        20.0, alias="RELAY_SHUTDOWN_GRACE", ge=0, le=300, description="Seconds that calls have to end on SIGTERM."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", alias="RELAY_LOG_LEVEL", description="What the log on standard error tells."
    )

    @property
    def is_development(self) -> bool:
        return self.env == "development" if self.env else self.database_url is None

    @property
    def actions_are_enabled(self) -> bool:
        return self.is_development if self.actions_enabled is None else self.actions_enabled

    @property
    def reflection_is_on(self) -> bool:
        return self.is_development if self.reflection is None else self.reflection

    def combinations(self) -> list[str]:
        """What is wrong with the values taken together."""
        problems = []
        if bool(self.webhook_url) != bool(self.actions_signing_secret):
            problems.append("WEBHOOK_URL and ACTIONS_SIGNING_SECRET: set both or neither")
        for name, keys in (
            ("RELAY_ENCRYPTION_KEYS", self.encryption_keys),
            ("RELAY_KEY_PEPPERS", self.key_peppers),
            ("RELAY_AUDIT_KEYS", self.audit_keys),
        ):
            if len({key.id for key in keys}) < len(keys):
                problems.append(f"{name}: two keys have the same id")
        if len({issuer.url for issuer in self.oidc_issuers}) < len(self.oidc_issuers):
            problems.append("RELAY_OIDC_ISSUERS: an issuer is there twice")
        if self.lease < 3 * self.attempt_timeout and not math.isclose(self.lease, 3 * self.attempt_timeout):
            problems.append("RELAY_LEASE: must be at least 3 times RELAY_ATTEMPT_TIMEOUT")
        if self.otel_enabled and not self.otel_endpoint:
            problems.append("OTEL_ENDPOINT: OTEL_ENABLED needs one, such as http://127.0.0.1:4318")
        if bool(self.tls_certificate) != bool(self.tls_key):
            problems.append("RELAY_TLS_CERTIFICATE and RELAY_TLS_KEY: set both or neither")
        if self.tls_client_ca and not self.tls_certificate:
            problems.append("RELAY_TLS_CLIENT_CA: needs RELAY_TLS_CERTIFICATE")
        for name, path in (
            ("RELAY_TLS_CERTIFICATE", self.tls_certificate),
            ("RELAY_TLS_KEY", self.tls_key),
            ("RELAY_TLS_CLIENT_CA", self.tls_client_ca),
        ):
            if path and not path.is_file():
                problems.append(f"{name}: there is no file {path}")
        return problems if self.is_development else problems + self._unsafe_in_production()

    def _unsafe_in_production(self) -> list[str]:
        problems = []
        if self.failpoint:
            problems.append("RELAY_FAILPOINT: production does not kill itself")
        if not self.database_url:
            problems.append("DATABASE_URL: RELAY_ENV=production does not run on the embedded database")
        if self.webhook_url and not self.webhook_url.startswith("https://"):
            problems.append("WEBHOOK_URL: production delivers to https:// alone")
        if not self.encryption_keys:
            problems.append("RELAY_ENCRYPTION_KEYS: production needs one; `relay keygen` makes it")
        if not self.key_peppers:
            problems.append("RELAY_KEY_PEPPERS: production needs one; `relay keygen` makes it")
        if not self.audit_keys:
            problems.append("RELAY_AUDIT_KEYS: production needs one; `relay keygen` makes it")
        if self.audit_checkpoints and self.audit_checkpoints.get_secret_value().startswith("http://"):
            problems.append("RELAY_AUDIT_CHECKPOINTS: production pushes to https:// alone")
        if any(not issuer.url.startswith("https://") for issuer in self.oidc_issuers):
            problems.append("RELAY_OIDC_ISSUERS: production trusts https:// alone")
        if any(network.prefixlen == 0 for network in self.trusted_proxies):
            problems.append("RELAY_TRUSTED_PROXIES: who trusts all addresses believes every caller; name the proxies")
        if not self.hash_key:
            problems.append("RELAY_HASH_KEY: production needs one; `relay keygen` makes it")
        if not self.tls_certificate and not self.listen.is_loopback:
            problems.append(
                f"RELAY_LISTEN: {self.listen} would serve plaintext to the network; "
                "set RELAY_TLS_CERTIFICATE and RELAY_TLS_KEY, or listen on 127.0.0.1 behind a proxy"
            )
        return problems

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Reads the environment; overrides go by field name and win. Empty variables count as unset.

        Raises SettingsError with every problem.
        """
        names = {field: str(info.alias) for field, info in cls.model_fields.items()}
        values: dict[str, Any] = {k: v for k, v in (os.environ if environ is None else environ).items() if v != ""}
        values |= {names[field]: value for field, value in overrides.items() if value is not None}
        problems = []
        try:
            settings = cls.model_validate(values)
        except ValidationError as error:
            wrong = {str(detail["loc"][0]) for detail in error.errors()}
            problems = [f"{detail['loc'][0]}: {_sentence(detail['msg'])}" for detail in error.errors()]
            settings = cls.model_validate({k: v for k, v in values.items() if k not in wrong})
        problems += settings.combinations()
        if problems:
            raise SettingsError(list(dict.fromkeys(problems)))
        return settings


def _sentence(message: str) -> str:
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    return message[:1].lower() + message[1:]
