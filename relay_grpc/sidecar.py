"""The HTTP side of a Relay process: health for orchestrators and metrics for Prometheus. Nothing here needs a key."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest

from relay_grpc.telemetry import Metrics

READY_SECONDS = 2.0
STOP_SECONDS = 1.0
KEEPALIVE_SECONDS = 75.0  # longer than the interval of any probe or scrape

# What OWASP's Secure Headers Project proposes (its ci/headers_add.json), with the Content-Security-Policy of an API
# that answers no documents, and every browser feature off.
SECURITY_HEADERS = {
    "Cache-Control": "no-store, max-age=0",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": (
        "accelerometer=(), autoplay=(), camera=(), cross-origin-isolated=(), display-capture=(), "
        "encrypted-media=(), fullscreen=(), geolocation=(), gyroscope=(), keyboard-map=(), magnetometer=(), "
        "microphone=(), midi=(), payment=(), picture-in-picture=(), publickey-credentials-get=(), "
        "screen-wake-lock=(), sync-xhr=(), usb=(), web-share=(), xr-spatial-tracking=(), clipboard-read=(), "
        "clipboard-write=(), gamepad=(), hid=(), idle-detection=(), interest-cohort=(), serial=(), unload=()"
    ),
    "Referrer-Policy": "no-referrer",
    "Strict-Transport-Security": "max-age=63072000; includeSubDomains",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "deny",
    "X-Permitted-Cross-Domain-Policies": "none",
}
_ERRORS = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}

logger = logging.getLogger(__name__)


class Sidecar:
    """Serves /metrics, /livez, /readyz and /_stcore/health.

    port: 0 lets the system choose. metrics: None where /metrics is to answer 404.
    ready: the checks that this process needs to serve, by name; the process is ready when there are some and all hold.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        metrics: Metrics | None,
        ready: Callable[[], Coroutine[Any, Any, Mapping[str, bool]]],
    ) -> None:
        self._host, self._port = host, port
        self._ready = ready
        self._check: asyncio.Task[Mapping[str, bool]] | None = None
        self._scrape = asyncio.Lock()
        self._runner: web.ServerRunner | None = None
        self._routes: dict[str, Callable[[], Awaitable[web.Response]]] = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/_stcore/health": self._health,
        }
        if metrics:
            self._routes["/metrics"] = partial(self._exposition, metrics.registry)

    async def start(self) -> int:
        """Listens, and returns the port. Raises OSError where it is taken."""
        request = partial(_Request, loop=asyncio.get_running_loop())
        server = _Server(self._answer, request_factory=request, access_log=None, keepalive_timeout=KEEPALIVE_SECONDS)
        self._runner = web.ServerRunner(server, shutdown_timeout=STOP_SECONDS)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Stops listening; requests under way have STOP_SECONDS."""
        if self._check:
            self._check.cancel()
        if self._runner:
            await self._runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        route = self._routes.get(request.path)
        if route is None:
            return _error(404)
        if request.method not in ("GET", "HEAD"):
            return _error(405, {"Allow": "GET, HEAD"})
        return await route()

    async def _livez(self) -> web.Response:
        return web.Response(text="ok")

    async def _health(self) -> web.Response:
        return web.json_response({"ok": True})

    async def _readyz(self) -> web.Response:
        checks = await self._checks()
        ready = bool(checks) and all(checks.values())
        return web.json_response({"ready": ready, "checks": dict(checks)}, status=200 if ready else 503)

    async def _checks(self) -> Mapping[str, bool]:
        """The checks, or none of them where they fail as a whole or take longer than READY_SECONDS.

        Probes that come while checks run share them, so probes can't pile up behind a dependency that hangs. `wait`
        rather than `timeout`: it does not wait for a check that is slow to be cancelled.
        """
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._run_checks())
        check = self._check
        done, _ = await asyncio.wait({check}, timeout=READY_SECONDS)
        if not done and not check.cancelling():
            check.cancel()
            logger.warning("not ready: the checks took longer than %s s", READY_SECONDS)
        return {} if not done or check.cancelled() else check.result()

    async def _run_checks(self) -> Mapping[str, bool]:
        try:
            return await self._ready()
        except Exception:
            logger.warning("not ready: the checks failed", exc_info=True)
            return {}

    async def _exposition(self, registry: CollectorRegistry) -> web.Response:
        async with self._scrape:  # it takes milliseconds: on a thread, and on no more than one
            body = await asyncio.to_thread(generate_latest, registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


class _Request(web.BaseRequest):
    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        """Called by aiohttp with every response, its own for malformed requests included, before the headers go."""
        response.headers.update(SECURITY_HEADERS)
        response.headers.popall("Server", None)


class _Connection(web.RequestHandler):
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers for a request that could not be parsed (400) or whose handler raised (500), and closes."""
        if status == 400:
            logger.debug("malformed HTTP request: %s", type(exc).__name__)  # its message quotes what was sent
        else:
            logger.error("%s %s failed", request.method, request.path, exc_info=exc)
        response = _error(status)
        response.force_close()
        return response


class _Server(web.Server):
    def __call__(self) -> _Connection:
        return _Connection(self, loop=self._loop, **self._kwargs)


def _error(status: int, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.json_response({"error": _ERRORS.get(status, "internal")}, status=status, headers=headers)
