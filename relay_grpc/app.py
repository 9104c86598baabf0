"""The composition root: the only place that constructs the parts of a server, and takes them down in reverse."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from relay_grpc.actions.attempts import Attempts
from relay_grpc.actions.catalogue import CATALOGUE
from relay_grpc.actions.destinations import EgressPolicy
from relay_grpc.actions.dispatcher import Dispatcher
from relay_grpc.actions.egress import Egress
from relay_grpc.actions.executions import Executions
from relay_grpc.actions.health import Health
from relay_grpc.actions.providers import Provider
from relay_grpc.actions.providers.webhook import WebhookProvider
from relay_grpc.actions.recoveries import Recoveries
from relay_grpc.actions.service import ActionsService
from relay_grpc.actions.sweeper import Sweeper
from relay_grpc.actions.upkeep import Upkeep
from relay_grpc.actions.watching import Watching
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.checkpoint_places import Folder, Place, Receiver
from relay_grpc.audit.exporting import Exporting
from relay_grpc.audit.growth import Growth
from relay_grpc.audit.proving import Proving
from relay_grpc.audit.recorder import Recorder
from relay_grpc.audit.service import AuditService
from relay_grpc.audit.tailing import Tailing
from relay_grpc.audit.upkeep import Upkeep as AuditUpkeep
from relay_grpc.auth.changes import Changes
from relay_grpc.auth.oidc import TokenVerifier
from relay_grpc.auth.roles import Roles
from relay_grpc.auth.service import AuthService
from relay_grpc.auth.users import UserVerifier
from relay_grpc.auth.verifier import KeyVerifier
from relay_grpc.call import Method
from relay_grpc.connections.rotation import Rotation
from relay_grpc.connections.secrets import Vault
from relay_grpc.connections.service import ConnectionsService
from relay_grpc.db import Database
from relay_grpc.housekeeping import housekeeping
from relay_grpc.instances import Instances
from relay_grpc.interceptors.audit import audit
from relay_grpc.interceptors.authentication import authentication
from relay_grpc.interceptors.authorization import authorization
from relay_grpc.interceptors.base import Layer, Servicer
from relay_grpc.interceptors.policy import methods
from relay_grpc.interceptors.rate_limit import rate_limit
from relay_grpc.interceptors.status import status
from relay_grpc.interceptors.tracing import tracing
from relay_grpc.interceptors.validation import validation
from relay_grpc.ratelimit.limiter import Limiter, LocalLimiter, RedisLimiter
from relay_grpc.setting_types import Address
from relay_grpc.settings import Settings
from relay_grpc.sidecar import Sidecar
from relay_grpc.telemetry import Metrics, Tracer, tracer_provider
from relay_grpc.transport import StartError, Transport, taken

EXECUTE = "/relay.v1.ActionsService/Execute"
ANYWHERE = (ip_network("0.0.0.0/0"), ip_network("::/0"))


@dataclass(frozen=True, slots=True)
class App:
    """A running server: where it listens, and what tests look at."""

    listen: Address
    http_listen: Address
    db: Database
    metrics: Metrics
    limiter: Limiter | None
    recorder: Recorder


@asynccontextmanager
async def serving(settings: Settings, database_url: str) -> AsyncIterator[App]:
    """Runs a server until the block ends. settings: with key material. Raises StartError and DatabaseUnusable."""
    hash_key = settings.hash_key.get_secret_value().encode() if settings.hash_key else b""
    async with AsyncExitStack() as stack:
        metrics = Metrics()
        tracer = Tracer(_tracer_provider(settings))
        stack.push_async_callback(tracer.shutdown)
        db = await Database.open(
            database_url, production=not settings.is_development, connections=settings.database_connections
        )
        stack.push_async_callback(db.close)
        limiter = await _limiter(stack, settings, db, metrics)
        recorder = Recorder(db, hash_key, metrics)
        stack.push_async_callback(recorder.close)
        callers = _callers(stack, settings, db, metrics)
        vault = Vault({key.id: key.key for key in settings.encryption_keys})
        deliveries = _deliveries(stack, settings, db, vault, metrics, tracer)

        layers = _layers(settings, tracer, metrics, recorder, callers, limiter)
        rpcs = methods()
        signer = Signer({key.id: key.key for key in settings.audit_keys}, settings.audit_old_keys)
        growth = Growth(db)
        stack.push_async_callback(growth.stop)
        servicers = _servicers(settings, db, recorder, callers, vault, deliveries, growth, signer, rpcs)
        transport = Transport(settings, rpcs, servicers, layers)
        stopping = asyncio.Event()

        async def ready() -> Mapping[str, bool]:
            return {"serving": not stopping.is_set(), "postgres": await db.answers()}

        async def stop_serving() -> None:
            """Calls and attempts under way share one grace: what the calls leave of it is the attempts'."""
            stopping.set()
            started = time.monotonic()
            await deliveries.sweeper.stop()
            await deliveries.dispatcher.watching.stop()
            await growth.stop()
            await transport.stop(settings.shutdown_grace)
            await deliveries.dispatcher.stop(max(0.0, settings.shutdown_grace - (time.monotonic() - started)))

        http_port = await _sidecar(stack, settings, metrics, ready)
        await transport.start()
        stack.push_async_callback(stop_serving)
        upkeep = Upkeep(db, metrics, retention=timedelta(hours=settings.execution_retention))
        upkeep.start()
        stack.push_async_callback(upkeep.stop)
        audit_upkeep = AuditUpkeep(db, signer, _checkpoint_place(stack, settings), metrics)
        audit_upkeep.start()
        stack.push_async_callback(audit_upkeep.stop)
        keeping = asyncio.create_task(housekeeping(db, callers.tokens, callers.keys, recorder, transport))
        stack.callback(keeping.cancel)
        yield App(
            listen=transport.listen,
            http_listen=Address(host=settings.http_listen.host, port=http_port),
            db=db,
            metrics=metrics,
            limiter=limiter,
            recorder=recorder,
        )


@dataclass(frozen=True, slots=True)
class _Callers:
    """What finds out who calls."""

    changes: Changes
    keys: KeyVerifier
    tokens: TokenVerifier
    users: UserVerifier


def _callers(stack: AsyncExitStack, settings: Settings, db: Database, metrics: Metrics) -> _Callers:
    changes = Changes(db, metrics)
    stack.push_async_callback(changes.close)
    keys = KeyVerifier(db, metrics, changes, settings.key_peppers)
    stack.push_async_callback(keys.close)
    stack.push_async_callback(keys.note_used)
    # It is the operator who names issuers, so they may be on the operator's own network.
    tokens = TokenVerifier(settings.oidc_issuers, _egress(stack, settings, ANYWHERE), metrics)
    stack.callback(tokens.close)
    users = UserVerifier(db, tokens, changes)
    stack.push_async_callback(users.close)
    return _Callers(changes, keys, tokens, users)


@dataclass(frozen=True, slots=True)
class _Deliveries:
    """What makes attempts."""

    webhooks: WebhookProvider
    providers: tuple[Provider, ...]
    dispatcher: Dispatcher
    sweeper: Sweeper


def _deliveries(
    stack: AsyncExitStack, settings: Settings, db: Database, vault: Vault, metrics: Metrics, tracer: Tracer
) -> _Deliveries:
    webhooks = WebhookProvider(_egress(stack, settings, settings.egress_allow), settings.attempt_timeout)
    providers = (webhooks,)
    health = Health(db, metrics, pause=settings.breaker_pause)
    stack.push_async_callback(health.close)
    watching = Watching(db)
    stack.push_async_callback(watching.stop)
    dispatcher = Dispatcher(
        db,
        Attempts(vault, providers, tracer),
        health,
        watching,
        [action for action in CATALOGUE if action.provider in {provider.name for provider in providers}],
        metrics,
        lease=settings.lease,
        concurrency=settings.connection_concurrency,
        floor=settings.retry_floor,
    )
    stack.push_async_callback(dispatcher.stop, 0)
    sweeper = Sweeper(dispatcher, settings.sweep_interval)
    stack.push_async_callback(sweeper.stop)
    return _Deliveries(webhooks, providers, dispatcher, sweeper)


def _checkpoint_place(stack: AsyncExitStack, settings: Settings) -> Place | None:
    if settings.audit_checkpoints is None:
        return None
    place = settings.audit_checkpoints.get_secret_value()  # the operator's own, as issuers are
    return Receiver(place, _egress(stack, settings, ANYWHERE)) if "://" in place else Folder(Path(place))


def _servicers(
    settings: Settings,
    db: Database,
    recorder: Recorder,
    callers: _Callers,
    vault: Vault,
    deliveries: _Deliveries,
    growth: Growth,
    signer: Signer,
    rpcs: Mapping[str, Method],
) -> Mapping[str, Sequence[Servicer]]:
    """What answers, by service."""
    roles = Roles(db, recorder, callers.changes, callers.users.issuer)
    runs = deliveries.providers if settings.actions_are_enabled else ()
    return {
        "AuthService": (
            AuthService(db, recorder, callers.keys, callers.changes, live=not settings.is_development),
            roles,
        ),
        "ConnectionsService": (ConnectionsService(db, recorder, vault, deliveries.webhooks), Rotation(recorder, vault)),
        "ActionsService": (
            ActionsService(db, recorder, deliveries.dispatcher, runs, quota_cost=rpcs[EXECUTE].executions),
            Executions(db, recorder, deliveries.dispatcher, frozenset(provider.name for provider in runs)),
            Recoveries(db, recorder, enabled=settings.actions_are_enabled),
        ),
        "AuditService": (AuditService(db), Exporting(db), Tailing(db, recorder, growth), Proving(db, signer)),
    }


def _egress(stack: AsyncExitStack, settings: Settings, allow: tuple[IPv4Network | IPv6Network, ...]) -> Egress:
    egress = Egress(EgressPolicy(settings.is_development, https_only=not settings.is_development, allow=allow))
    stack.push_async_callback(egress.close)
    return egress


def _layers(
    settings: Settings,
    tracer: Tracer,
    metrics: Metrics,
    recorder: Recorder,
    callers: _Callers,
    limiter: Limiter | None,
) -> list[Layer]:
    """What every call goes through, outermost first."""
    limits = [] if limiter is None else [_rate_limit(settings, metrics, limiter)]
    return [
        tracing(tracer, metrics),  # sees every call, and how it ended
        status,  # so that everything inside may raise
        audit(recorder),  # outside authentication, so that refusals are recorded too
        authentication(callers.keys, callers.users),
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


async def _sidecar(
    stack: AsyncExitStack,
    settings: Settings,
    metrics: Metrics,
    ready: Callable[[], Coroutine[Any, Any, Mapping[str, bool]]],
) -> int:
    """Starts it; returns its port."""
    shown = metrics if settings.telemetry_enabled else None
    sidecar = Sidecar(settings.http_listen.host, settings.http_listen.port, metrics=shown, ready=ready)
    try:
        port = await sidecar.start()
    except OSError as error:
        raise StartError(taken("RELAY_HTTP_LISTEN", settings.http_listen)) from error
    stack.push_async_callback(sidecar.stop)
    return port


def _tracer_provider(settings: Settings) -> Any:
    if not settings.otel_enabled or not settings.otel_endpoint:
        return None
    return tracer_provider(
        settings.otel_endpoint, sample_ratio=settings.otel_sample_ratio, service_version=version("relay-grpc")
    )


async def _limiter(stack: AsyncExitStack, settings: Settings, db: Database, metrics: Metrics) -> Limiter | None:
    """None: limits are switched off. This instance is counted among the others all the same."""
    instances = Instances(db)
    await instances.start()
    stack.push_async_callback(instances.stop)
    metrics.instances.set_function(lambda: instances.live)
    if not settings.rate_limit_enabled:
        return None
    local = LocalLimiter(lambda: instances.live)
    limiter: Limiter = local
    if settings.redis_url is not None:
        try:
            limiter = RedisLimiter(settings.redis_url.get_secret_value(), local, settings.redis_timeout)
        except ValueError as error:
            raise StartError(str(error)) from None
    stack.push_async_callback(limiter.close)
    metrics.rate_limiter_degraded.set_function(lambda: limiter.degraded)
    return limiter
