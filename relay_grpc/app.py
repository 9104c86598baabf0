"""The composition root: the only place that constructs the parts of a server, and takes them down in reverse."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from relay_grpc import errors
from relay_grpc.actions.catalogue import CATALOGUE
from relay_grpc.actions.dispatcher import Dispatcher
from relay_grpc.actions.egress import Egress, EgressPolicy
from relay_grpc.actions.providers.webhook import WebhookProvider
from relay_grpc.actions.service import ActionsService
from relay_grpc.audit.recorder import Recorder
from relay_grpc.audit.service import AuditService
from relay_grpc.auth.changes import Changes
from relay_grpc.auth.oidc import TokenVerifier
from relay_grpc.auth.roles import Roles
from relay_grpc.auth.service import AuthService
from relay_grpc.auth.users import UserVerifier
from relay_grpc.auth.verifier import KeyVerifier
from relay_grpc.connections.secrets import Vault
from relay_grpc.connections.service import ConnectionsService
from relay_grpc.db import Database
from relay_grpc.instances import Instances
from relay_grpc.interceptors.audit import audit
from relay_grpc.interceptors.authentication import authentication
from relay_grpc.interceptors.authorization import authorization
from relay_grpc.interceptors.base import Layer, register
from relay_grpc.interceptors.policy import methods
from relay_grpc.interceptors.rate_limit import rate_limit
from relay_grpc.interceptors.status import status
from relay_grpc.interceptors.tracing import tracing
from relay_grpc.interceptors.validation import validation
from relay_grpc.ratelimit.limiter import Limiter, LocalLimiter, RedisLimiter
from relay_grpc.settings import Address, Settings
from relay_grpc.sidecar import Sidecar
from relay_grpc.telemetry import Metrics, Tracer, tracer_provider

log = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 1024 * 1024
HOUSEKEEPING_SECONDS = 2.0
ANYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))

CHANNEL_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port that another server has is taken, not shared
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.absolute_max_metadata_size", 8 * 1024),
    # Above it grpcio resets calls instead of letting clients queue them, so the 100 of proxies refuses honest bursts.
    ("grpc.max_concurrent_streams", 1000),
    ("grpc.max_connection_idle_ms", 5 * 60_000),
    ("grpc.max_connection_age_ms", 30 * 60_000),
    ("grpc.max_connection_age_grace_ms", 30_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
)


class StartError(Exception):
    """The server can't start; the text tells the operator why and what to do."""


@dataclass(frozen=True, slots=True)
class App:
    """A running server: where it listens, and what tests look at."""

    listen: Address
    http_listen: Address
    db: Database
    metrics: Metrics
    limiter: Limiter | None
    recorder: Recorder


class Health(health.aio.HealthServicer):
    """The standard health service, with the List method that grpcio-health-checking does not implement yet."""

    async def List(self, _request: Any, _context: Any) -> Any:  # noqa: N802  # named by grpc.health.v1
        return health_pb2.HealthListResponse(  # type: ignore[attr-defined]  # newer than its types
            statuses={
                service: health_pb2.HealthCheckResponse(status=status)
                for service, status in self._server_status.items()  # type: ignore[attr-defined]
            }
        )


@asynccontextmanager
async def serving(settings: Settings, database_url: str) -> AsyncIterator[App]:
    """Runs a server until the block ends. settings: with key material. Raises StartError and DatabaseUnusable."""
    api = methods()
    hash_key = settings.hash_key.get_secret_value().encode() if settings.hash_key else b""
    async with AsyncExitStack() as stack:
        metrics = Metrics()
        tracer = Tracer(_tracer_provider(settings))
        stack.push_async_callback(tracer.shutdown)
        db = await Database.open(
            database_url, production=not settings.is_development, connections=settings.database_connections
        )
        stack.push_async_callback(db.close)
        instances = Instances(db)
        await instances.start()
        stack.push_async_callback(instances.stop)
        metrics.instances.set_function(lambda: instances.live)
        limiter = _limiter(settings, instances)
        if limiter is not None:
            stack.push_async_callback(limiter.close)
            metrics.rate_limiter_degraded.set_function(lambda: limiter.degraded)
        recorder = Recorder(db, hash_key, metrics)
        stack.push_async_callback(recorder.close)
        changes = Changes(db, metrics)
        stack.push_async_callback(changes.close)
        verifier = KeyVerifier(db, metrics, changes, settings.key_peppers)
        stack.push_async_callback(verifier.close)
        stack.push_async_callback(verifier.note_used)
        development = settings.is_development
        # It is the operator who names issuers, so they may be on the operator's own network.
        to_issuers = Egress(EgressPolicy(development, https_only=not development, allow=ANYWHERE))
        stack.push_async_callback(to_issuers.close)
        tokens = TokenVerifier(settings.oidc_issuers, to_issuers, metrics)
        stack.callback(tokens.close)
        users = UserVerifier(db, tokens, changes)
        stack.push_async_callback(users.close)
        vault = Vault({key.id: key.key for key in settings.encryption_keys})
        egress = Egress(EgressPolicy(development, https_only=not development, allow=settings.egress_allow))
        stack.push_async_callback(egress.close)
        webhooks = WebhookProvider(egress, settings.attempt_timeout)
        providers = (webhooks,)
        dispatcher = Dispatcher(
            db,
            vault,
            providers,
            CATALOGUE,
            metrics,
            tracer,
            lease=settings.lease,
            sweep_interval=settings.sweep_interval,
        )
        stack.push_async_callback(dispatcher.stop, 0)

        layers = _layers(settings, tracer, metrics, recorder, verifier, users, limiter)
        servicers = {
            "AuthService": AuthService(
                db, recorder, verifier, changes, Roles(db, recorder, changes, users.issuer), live=not development
            ),
            "ConnectionsService": ConnectionsService(db, recorder, vault, webhooks),
            "ActionsService": ActionsService(db, recorder, dispatcher, providers, enabled=settings.actions_are_enabled),
            "AuditService": AuditService(db),
        }
        server = grpc.aio.server(options=CHANNEL_OPTIONS)
        register(server, api, servicers, layers, proxies=settings.trusted_proxies)
        health_servicer = _add_health(server)
        services = sorted({method.path.split("/")[1] for method in api.values()})
        for service in services:
            await health_servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
        if settings.reflection_is_on:
            reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        listen = _listen(server, settings)

        stopping = asyncio.Event()

        async def ready() -> Mapping[str, bool]:
            return {"serving": not stopping.is_set(), "postgres": await db.answers()}

        async def stop_serving() -> None:
            """Calls and attempts under way share one grace: what the calls leave of it is the attempts'."""
            stopping.set()
            await health_servicer.enter_graceful_shutdown()
            started = time.monotonic()
            await server.stop(settings.shutdown_grace)
            await dispatcher.stop(max(0.0, settings.shutdown_grace - (time.monotonic() - started)))

        sidecar = Sidecar(
            settings.http_listen.host,
            settings.http_listen.port,
            metrics=metrics if settings.telemetry_enabled else None,
            ready=ready,
        )
        try:
            http_port = await sidecar.start()
        except OSError as error:
            raise StartError(_taken("RELAY_HTTP_LISTEN", settings.http_listen)) from error
        stack.push_async_callback(sidecar.stop)
        await server.start()
        stack.push_async_callback(stop_serving)
        housekeeping = asyncio.create_task(_housekeeping(db, verifier, tokens, recorder, health_servicer, services))
        stack.callback(housekeeping.cancel)
        yield App(
            listen=listen,
            http_listen=Address(host=settings.http_listen.host, port=http_port),
            db=db,
            metrics=metrics,
            limiter=limiter,
            recorder=recorder,
        )


def _layers(
    settings: Settings,
    tracer: Tracer,
    metrics: Metrics,
    recorder: Recorder,
    verifier: KeyVerifier,
    users: UserVerifier,
    limiter: Limiter | None,
) -> list[Layer]:
    """What every call goes through, outermost first."""
    limits = [] if limiter is None else [_rate_limit(settings, metrics, limiter)]
    return [
        tracing(tracer, metrics),  # sees every call, and how it ended
        status,  # so that everything inside may raise
        audit(recorder),  # outside authentication, so that refusals are recorded too
        authentication(verifier, users),
        *limits,  # before authorization, so that what it refuses is limited too, at the price of one call
        authorization,
        validation,  # last: whoever sends bad requests pays for looking at them
    ]


def _rate_limit(settings: Settings, metrics: Metrics, limiter: Limiter) -> Layer:
    return rate_limit(
        limiter,
        metrics,
        calls_per_minute=settings.calls_per_minute,
        executions_per_minute=settings.executions_per_minute,
        shadow=settings.rate_limit_shadow,
    )


async def _housekeeping(
    db: Database,
    verifier: KeyVerifier,
    tokens: TokenVerifier,
    recorder: Recorder,
    health_servicer: Health,
    services: list[str],
) -> None:
    """What is done now and then: issuers' keys are read, used keys and refusals noted, health follows the database."""
    while True:
        await asyncio.sleep(HOUSEKEEPING_SECONDS)
        try:
            tokens.refresh()
            serving = await db.answers()
            state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            for service in ("", *services):
                await health_servicer.set(service, state)
            await verifier.note_used()
            await recorder.flush()
        except errors.RelayError as error:
            log.warning("housekeeping: %s", error)
        except Exception:
            log.exception("housekeeping stumbled")


def _tracer_provider(settings: Settings) -> Any:
    if not settings.otel_enabled or not settings.otel_endpoint:
        return None
    return tracer_provider(
        settings.otel_endpoint, sample_ratio=settings.otel_sample_ratio, service_version=version("relay-grpc")
    )


def _limiter(settings: Settings, instances: Instances) -> Limiter | None:
    if not settings.rate_limit_enabled:
        return None
    local = LocalLimiter(lambda: instances.live)
    if settings.redis_url is None:
        return local
    try:
        return RedisLimiter(settings.redis_url.get_secret_value(), local)
    except ValueError as error:
        raise StartError(str(error)) from None


def _add_health(server: grpc.aio.Server) -> Health:
    servicer = Health()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


def _listen(server: grpc.aio.Server, settings: Settings) -> Address:
    try:
        if settings.tls_certificate and settings.tls_key:
            port = server.add_secure_port(
                str(settings.listen), _tls(settings, settings.tls_certificate, settings.tls_key)
            )
        else:
            port = server.add_insecure_port(str(settings.listen))
    except RuntimeError as error:
        tls = "; or RELAY_TLS_CERTIFICATE and RELAY_TLS_KEY are no pair of PEM files" if settings.tls_key else ""
        raise StartError(_taken("RELAY_LISTEN", settings.listen) + tls) from error
    return Address(host=settings.listen.host, port=port)


def _tls(settings: Settings, certificate: Path, key: Path) -> grpc.ServerCredentials:
    try:
        return grpc.ssl_server_credentials(
            [(key.read_bytes(), certificate.read_bytes())],
            root_certificates=settings.tls_client_ca.read_bytes() if settings.tls_client_ca else None,
            require_client_auth=settings.tls_client_ca is not None,
        )
    except OSError as error:
        raise StartError(f"RELAY_TLS_...: can't read {error.filename}: {error.strerror}") from error


def _taken(name: str, address: Address) -> str:
    return f"{name}: can't listen on {address}; another program has the port, or the address is not this machine's"
