"""The main job, done once where the user can see it."""

import asyncio
import hmac
import shlex
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from aiohttp import web
from relay import aio
from relay.errors import RelayError
from relay.v1 import actions_pb2, audit_pb2
from rich.console import Console
from rich.markup import escape

from relay_grpc import datafolder
from relay_grpc.actions import signing
from relay_grpc.app import App
from relay_grpc.cli.running import Ready
from relay_grpc.transport import StartError

TOLERANCE_SECONDS = 300  # Standard Webhooks: how old a signature may be
PAYLOAD = {"order": "4711", "amount": 42, "currency": "EUR"}
console = Console(soft_wrap=True, highlight=False)


def main_job(*, once: bool) -> Callable[[Ready, App], Awaitable[None]]:
    """The demo, for `run`. once: it ends when the webhook is verified; else it keeps its receiver for more."""

    async def job(ready: Ready, app: App) -> None:
        async with _receiver() as receiver:
            await _main_job(ready, app, receiver)
            if not once:
                _show_commands(ready, app)
                await asyncio.Event().wait()

    return job


class _Receiver:
    """The other side: it verifies what it gets as Standard Webhooks says."""

    def __init__(self) -> None:
        self.url = ""
        self.secret = b""
        self.verdict = "nothing came"

    async def take(self, request: web.Request) -> web.Response:
        body = await request.read()
        headers = request.headers
        fresh = abs(time.time() - int(headers["webhook-timestamp"])) <= TOLERANCE_SECONDS
        key = signing.Key(signing.Scheme.HMAC, self.secret)
        expected = signing.sign(key, headers["webhook-id"], int(headers["webhook-timestamp"]), body)
        genuine = any(hmac.compare_digest(given, expected) for given in headers["webhook-signature"].split())
        self.verdict = "verified" if fresh and genuine else "the signature is wrong"
        return web.json_response({"verified": fresh and genuine}, status=200 if fresh and genuine else 401)


@asynccontextmanager
async def _receiver() -> AsyncIterator[_Receiver]:
    receiver = _Receiver()
    application = web.Application()
    application.router.add_post("/webhooks", receiver.take)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/webhooks"
    try:
        yield receiver
    finally:
        await runner.cleanup()


async def _main_job(ready: Ready, app: App, receiver: _Receiver) -> None:
    """Raises StartError where anything goes otherwise than it should."""
    keys = datafolder.read(ready.settings.data_dir / datafolder.CREDENTIALS)
    if not keys or ready.settings.database_url:
        raise StartError("the demo runs on the embedded database alone: unset DATABASE_URL")
    started = time.monotonic()
    console.print(f"[bold]Relay[/] serves gRPC on {app.listen} and HTTP on {app.http_listen}\n")
    try:
        async with aio.connect(str(app.listen), api_key=keys["RELAY_ADMIN_KEY"]) as admin:
            connection = await admin.connections.create_webhook(
                f"demo {datetime.now().astimezone():%Y-%m-%d %H:%M:%S.%f}",
                receiver.url,
                default=not ready.settings.webhook_url,
            )
            receiver.secret = signing.decode_secret(connection.signing_secret)
        async with aio.connect(str(app.listen), api_key=keys["RELAY_DEVELOPER_KEY"]) as developer:
            preview = await developer.actions.preview("webhook.send", {"payload": PAYLOAD}, connection_id=connection.id)
            _step("preview", preview.summary)
            _step("", f"bound to the digest {preview.digest[:16]}..., until {_clock(preview.expire_time)}")
            execution = await developer.actions.execute(preview)
            state = actions_pb2.ExecutionState.Name(execution.state).removeprefix("EXECUTION_STATE_").lower()
            _step("execute", f"{state} after {execution.attempt_count} attempt, execution {execution.id}")
            _step("receiver", f"{receiver.verdict}: POST {receiver.url}, webhook-id {execution.id}")
        async with aio.connect(str(app.listen), api_key=keys["RELAY_ADMIN_KEY"]) as admin:
            async for event in admin.audit.list_events():
                if execution.id in event.target or preview.id in event.target:
                    outcome = audit_pb2.EventOutcome.Name(event.outcome).removeprefix("EVENT_OUTCOME_").lower()
                    actor = event.actor.name or "relay"
                    _step("audit", f"{_clock(event.event_time)}  {event.action:<24} {outcome:<8} by {actor}")
    except RelayError as error:
        raise StartError(f"the demo failed: {error}") from error
    if execution.state != actions_pb2.EXECUTION_STATE_SUCCESS or receiver.verdict != "verified":
        raise StartError(f"the demo's delivery failed: {execution.last_attempt.error or receiver.verdict}")
    console.print(f"\n[green]First action delivered and verified[/] in {time.monotonic() - started:.2f} s.")


def _step(name: str, text: str) -> None:
    console.print(f"[cyan]{name:>9}[/]  {escape(text)}")


def _clock(timestamp: Any) -> str:
    return f"{datetime.fromtimestamp(timestamp.seconds).astimezone():%H:%M:%S}"


def _show_commands(ready: Ready, app: App) -> None:
    credentials = ready.settings.data_dir / datafolder.CREDENTIALS
    console.print(f"\nData: {escape(str(ready.settings.data_dir))}")
    if ready.new_keys:
        console.print("Your keys, shown this once and kept in the file below, which only you can read:")
        for role, key in ready.new_keys.items():
            console.print(f"  {role:<10} {key}")
    header = '-H "authorization: Bearer $RELAY_DEVELOPER_KEY"'
    body = """-d '{"action": "webhook.send", "parameters": {"payload": {"hello": "world"}}}'"""
    python = f"""
import os
from relay.client import connect
with connect("{app.listen}", api_key=os.environ["RELAY_DEVELOPER_KEY"]) as relay:
    preview = relay.actions.preview("webhook.send", {{"payload": {{"hello": "world"}}}})
    print(preview.summary)
    print(relay.actions.execute(preview))"""
    console.print("\nTry it from another terminal, in this folder:\n")
    for command in (
        f"set -a; . {shlex.quote(str(credentials))}; set +a",
        f"{_tool('grpcurl')} -plaintext {header} \\\n  {app.listen} relay.v1.AuthService/WhoAmI",
        f"{_tool('buf')} curl --protocol grpc --http2-prior-knowledge {header} \\\n"
        f"  {body} \\\n  http://{app.listen}/relay.v1.ActionsService/Preview",
        f"{shlex.quote(_relative(sys.executable))} - <<'PY'{python}\nPY",
        f"RELAY_API_KEY=$RELAY_ADMIN_KEY {_tool('relay')} --address {app.listen} executions list",
        f"curl -s http://{app.http_listen}/readyz",
    ):
        console.print(command, markup=False)
        console.print()
    console.print("Ctrl-C stops everything.")


def _tool(name: str) -> str:
    """How to call the tool: by its path where this environment has it; a note where nobody does."""
    beside = Path(sys.executable).with_name(name)
    if beside.exists():
        return shlex.quote(_relative(str(beside)))
    return name if shutil.which(name) else f"# where you have {name}:\n{name}"


def _relative(path: str) -> str:
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
