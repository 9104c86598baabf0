"""A whole Relay for tests: the app's own composition root on a database of its own, and a receiver that checks."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import standardwebhooks
from aiohttp import web
from relay import aio

from relay_grpc.app import App, serving
from relay_grpc.bootstrap import bootstrap
from relay_grpc.datafolder import with_key_material
from relay_grpc.embedded import EmbeddedPostgres
from relay_grpc.settings import Settings

TEMPLATE = "relay_template"


@dataclass
class Tenant:
    """A workspace and a key of each role."""

    workspace_id: UUID
    admin: str
    developer: str
    viewer: str = ""


class OnDatabase:
    """What has a database. url: as its superuser."""

    url: str

    async def sql(self, query: str, *arguments: Any) -> list[asyncpg.Record]:
        """Rows of a query as superuser: what is really there, past every wall."""
        connection = await asyncpg.connect(self.url)
        try:
            rows: list[asyncpg.Record] = await connection.fetch(query, *arguments)
            return rows
        finally:
            await connection.close()


@dataclass
class Relay(OnDatabase):
    """A running server and its first tenant. url: of the database, as its superuser."""

    app: App
    settings: Settings
    url: str
    tenant: Tenant

    def connect(self, api_key: str) -> Any:
        """A client of relay.aio, to be entered."""
        return aio.connect(str(self.app.listen), api_key=api_key)

    async def new_tenant(self) -> Tenant:
        made = await bootstrap(self.url, self.settings, workspace=f"tenant {uuid4()}")
        return await self._with_viewer(Tenant(made.workspace_id, made.keys["admin"], made.keys["developer"]))

    async def _with_viewer(self, tenant: Tenant) -> Tenant:
        async with self.connect(tenant.admin) as relay:
            tenant.viewer = (await relay.auth.create_api_key("viewer", "viewer")).secret
        return tenant


class Databases:
    """Databases at the current schema, cloned from one template."""

    def __init__(self, postgres: EmbeddedPostgres) -> None:
        self._postgres = postgres

    @asynccontextmanager
    async def new(self) -> AsyncIterator[str]:
        """The URL of a fresh database, dropped afterwards."""
        name = f"test_{uuid4().hex}"
        admin = await asyncpg.connect(self._postgres.url())
        try:
            await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
            yield self._postgres.url(name)
        finally:
            await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            await admin.close()


def settings_for(folder: Path, **environ: str) -> Settings:
    """Development settings on free ports, with limits that no test meets by accident."""
    defaults = {
        "RELAY_DATA_DIR": str(folder),
        "RELAY_LISTEN": "127.0.0.1:0",
        "RELAY_HTTP_LISTEN": "127.0.0.1:0",
        "RELAY_SWEEP_INTERVAL": "0.05",
        "RELAY_SHUTDOWN_GRACE": "1",
        "RATE_LIMIT_EXEC_PER_MIN": "1000000",
        "RELAY_RATE_LIMIT_CALLS_PER_MIN": "1000000",
    }
    return with_key_material(Settings.load(defaults | environ))


@asynccontextmanager
async def running(url: str, settings: Settings) -> AsyncIterator[Relay]:
    """A server on this database, bootstrapped if it was not."""
    made = await bootstrap(url, settings, new_keys=True)
    async with serving(settings, url) as app:
        relay = Relay(app, settings, url, Tenant(made.workspace_id, made.keys["admin"], made.keys["developer"]))
        await relay._with_viewer(relay.tenant)
        yield relay


@dataclass
class Receiver:
    """An HTTP server that takes webhooks, and remembers them. answer: what it does with a request; 200 by default."""

    url: str
    requests: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    answer: Callable[[web.Request], Any] | None = None

    def ids(self) -> list[str]:
        return [headers["webhook-id"] for headers, _ in self.requests]

    def verify(self, secret: str) -> None:
        """Every request is signed as Standard Webhooks says, in the eyes of its reference library."""
        for headers, body in self.requests:
            standardwebhooks.Webhook(secret).verify(body, headers)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver("")

    async def take(request: web.Request) -> web.StreamResponse:
        receiver.requests.append(({k.lower(): v for k, v in request.headers.items()}, await request.read()))
        if receiver.answer is not None:
            answer: web.StreamResponse = await receiver.answer(request)
            return answer
        return web.json_response({"received": True})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", take)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    try:
        yield receiver
    finally:
        await runner.cleanup()
