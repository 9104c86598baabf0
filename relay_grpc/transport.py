"""The gRPC server: its options, where and how it listens, its health and reflection."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from relay_grpc.call import Method
from relay_grpc.interceptors.base import Layer, Servicer, register
from relay_grpc.setting_types import Address
from relay_grpc.settings import Settings

MAX_MESSAGE_BYTES = 1024 * 1024

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


class Health(health.aio.HealthServicer):
    """The standard health service, with the List method that grpcio-health-checking does not implement yet."""

    async def List(self, _request: Any, _context: Any) -> Any:  # noqa: N802  # named by grpc.health.v1
        return health_pb2.HealthListResponse(  # type: ignore[attr-defined]  # newer than its types
            statuses={
                service: health_pb2.HealthCheckResponse(status=status)
                for service, status in self._server_status.items()  # type: ignore[attr-defined]
            }
        )


class Transport:
    """Serves the methods, standard health and, where the settings say so, reflection.

    listen: the address that it has bound; calls are answered from `start` on. Raises StartError.
    """

    def __init__(
        self,
        settings: Settings,
        methods: Mapping[str, Method],
        servicers: Mapping[str, Sequence[Servicer]],
        layers: Sequence[Layer],
    ) -> None:
        self._server = grpc.aio.server(options=CHANNEL_OPTIONS)
        register(self._server, methods, servicers, layers, proxies=settings.trusted_proxies)
        self._services = sorted({method.path.split("/")[1] for method in methods.values()})
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if settings.reflection_is_on:
            shown = [*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(shown, self._server)
        self.listen = _listen(self._server, settings)

    async def start(self) -> None:
        await self.tell_health(serving=True)
        await self._server.start()

    async def tell_health(self, *, serving: bool) -> None:
        """Answers so from now on to whoever checks or watches, for each service and for all of them."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, state)

    async def stop(self, grace: float) -> None:
        """Tells that it stops, takes no more calls, and leaves those under way `grace` seconds."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


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
        raise StartError(taken("RELAY_LISTEN", settings.listen) + tls) from error
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


def taken(name: str, address: Address) -> str:
    """What to tell of an address that can't be had. name: of its setting."""
    return f"{name}: can't listen on {address}; another program has the port, or the address is not this machine's"
