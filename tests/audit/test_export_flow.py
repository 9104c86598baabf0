"""Exports as their readers take them: slowly, not to the end, and by the million."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from relay import aio
from relay.v1 import audit_pb2, audit_pb2_grpc

from tests.audit.log import integrated
from tests.audit.past import fill
from tests.harness import Databases, Relay, Tenant, running, settings_for
from tests.processes import started

ENDED = "SELECT FROM audit_logs WHERE workspace_id = $1 AND action = 'AuditService.ExportEvents'"


@asynccontextmanager
async def exporting(relay: Relay, tenant: Tenant) -> AsyncIterator[Callable[[], Any]]:
    """Begins exports of which the server is not far ahead of their readers. They are answers, to be iterated over."""
    window = [("grpc.http2.bdp_probe", 0)]  # 64 KiB, which do not grow
    async with grpc.aio.insecure_channel(str(relay.app.listen), window) as channel:
        send = audit_pb2_grpc.AuditServiceStub(channel).ExportEvents
        request = audit_pb2.ExportEventsRequest(format=audit_pb2.EXPORT_FORMAT_JSONL)
        yield lambda: aiter(send(request, metadata=(("authorization", f"Bearer {tenant.admin}"),)))


async def test_a_caller_who_goes_away_ends_the_export(relay: Relay) -> None:
    await fill(relay.url, relay.tenant.workspace_id, 3000)
    await integrated(relay)
    async with relay.connect(relay.tenant.admin) as client:
        pieces = client.audit.export_events()
        assert len((await anext(pieces)).chunk) < 128 * 1024
        await pieces.aclose()
        async with asyncio.timeout(10):
            while not (told := await relay.sql(f"{ENDED} AND reason = 'CANCELLED'", relay.tenant.workspace_id)):
                await asyncio.sleep(0.05)
    assert len(told) == 1


async def test_a_slow_reader_holds_no_connection(databases: Databases, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, RELAY_DATABASE_CONNECTIONS="2")
    async with (
        databases.new() as url,
        running(url, settings) as relay,
        exporting(relay, relay.tenant) as export,
        relay.connect(relay.tenant.admin) as client,
    ):
        await fill(url, relay.tenant.workspace_id, 2000)
        await integrated(relay)
        exports = [export() for _ in range(4)]
        for pieces in exports:
            await anext(pieces)
        quiet = 0
        async with asyncio.timeout(20):
            while quiet < 5:  # until each is as far as its flow control lets it
                quiet = 0 if await transactions(relay) else quiet + 1
                await asyncio.sleep(0.1)
        assert not await relay.sql(ENDED, relay.tenant.workspace_id)
        assert await client.auth.who_am_i()
        sizes = [sum([len(piece.chunk) async for piece in pieces]) for pieces in exports]
        assert len(set(sizes)) == 1
        assert len(await relay.sql(ENDED, relay.tenant.workspace_id)) == 4


async def transactions(relay: Relay) -> int:
    """How many the server has open in callers' workspaces."""
    rows = await relay.sql(
        """
        SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'relay relay_app'
                                       AND (state LIKE '%transaction%' OR state = 'active')
        """
    )
    return len(rows)


@pytest.mark.long
async def test_memory_stays_flat_however_much_is_exported(
    databases: Databases, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    """A server process, of which an export takes at most 64 MiB more for a million events."""
    count, most = (1_000_000, 64 * 1024**2) if long else (20_000, 24 * 1024**2)
    async with databases.new() as url:
        async with running(url, settings_for(tmp_path)) as relay:
            key, workspace_id = relay.tenant.admin, relay.tenant.workspace_id
            await fill(url, workspace_id, count)
            begun = datetime.now(UTC)
            await integrated_all(relay, count)
            figure(f"{count} events integrated in {(datetime.now(UTC) - begun).total_seconds():.1f} s")
        async with started(url, tmp_path) as server, aio.connect(server.listen, api_key=key) as client:
            process = psutil.Process(server.process.pid)
            hour_ago = datetime.now(UTC) - timedelta(hours=1)
            assert (await anext(client.audit.export_events(start_time=hour_ago))).chunk  # what a first one loads
            before = peak = process.memory_info().rss
            begun, lines, size, last = datetime.now(UTC), 0, 0, b""
            async for piece in client.audit.export_events(timeout=600):
                lines += piece.chunk.count(b"\n")
                size += len(piece.chunk)
                peak = max(peak, process.memory_info().rss)
                last = piece.chunk
            assert lines > count
            assert json.loads(last.splitlines()[-1])["end"] == lines - 1
            seconds = (datetime.now(UTC) - begun).total_seconds()
            figure(f"{lines} lines, {size / 2**20:.0f} MiB in {seconds:.1f} s, +{(peak - before) / 2**20:.1f} MiB")
            assert peak - before <= most


async def integrated_all(relay: Relay, count: int) -> None:
    """As integrated(), with as much time as so many events take."""
    async with asyncio.timeout(60 + count / 1000):
        while True:
            try:
                return await integrated(relay)
            except TimeoutError:
                continue
