"""Many tenants on few connections, some calls cut off midway: nobody gets what is another's, and nothing is lost."""

import asyncio
import random
import re
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from relay_grpc.call import Method
from tests.harness import Databases, Relay, receiving, running, settings_for
from tests.rpc.holes import connections_keep_their_workspace, no_query_names_its_workspace
from tests.rpc.resources import NAMES, Estate, Kind, request
from tests.rpc.wire import METHODS, Answer, Wire, wired

TENANTS = 20
CONNECTIONS = 5
AT_ONE_TIME = 50
CUT_OFF = 0.4  # of the callers go away: a tenth of the calls is then cut off while the server is at it
SEED = 4711
PAGE = 5  # rows of a listing
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
MARK = re.compile(r"tenant-\d\d")
# What a method names that takes part: things that are cheap to make and that calls don't use up.
KINDS = {Kind.CONNECTION, Kind.PREVIEW, Kind.EXECUTION, Kind.EVENT, Kind.REQUEST, Kind.NEW_CONNECTION, Kind.PAGE_TOKEN}
# What answers otherwise the second time: the connection is gone, has all the secrets it can, the execution goes on.
ONCE = {"ConnectionsService.DeleteConnection", "ConnectionsService.RotateSecret", "ActionsService.ResendExecution"}


@dataclass
class Crowd:
    """Tenants on one server, and what came of their calls.

    told: by tenant, the ids and marks that it was told. expected: by tenant and method, whether an answer shows
    something of the tenant's own. missing: answers that did not. took: seconds that the latest calls took.
    """

    relay: Relay
    wire: Wire
    estates: list[Estate]
    methods: list[Method]
    told: dict[str, set[str]] = field(default_factory=dict)
    missing: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    expected: dict[tuple[str, str], bool] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=count)
    took: deque[float] = field(default_factory=lambda: deque(maxlen=AT_ONE_TIME))

    async def ask(self, estate: Estate, method: Method) -> Answer:
        names = {name: kind for name, kind in NAMES[method.name].items() if kind is not Kind.PAGE_TOKEN}
        new = {
            name: f"{estate.mark}-new-{next(self.numbers)}"
            for name, kind in names.items()
            if kind is Kind.NEW_CONNECTION
        }
        values = {name: estate.standing[kind] for name, kind in names.items() if kind is not Kind.NEW_CONNECTION}
        message: Any = request(method, values | new)
        if "page_size" in message.DESCRIPTOR.fields_by_name:
            message.page_size = PAGE
        return await self.wire.call(method, message, estate.tenant.admin)

    async def call(self, estate: Estate, method: Method, cut_off_at: float | None = None) -> None:
        """cut_off_at: the part of a usual call's time after which the caller goes away."""
        started = time.monotonic()
        asking = asyncio.create_task(self.ask(estate, method))
        if cut_off_at is not None:
            await asyncio.wait([asking], timeout=cut_off_at * sum(self.took) / len(self.took))
            if asking.cancel():
                await asyncio.gather(asking, return_exceptions=True)
                self.ended["cut off"] += 1
                return
        answer = await asking
        self.took.append(time.monotonic() - started)
        self.ended[answer.code] += 1
        text = "".join(reply.SerializeToString().decode("utf-8", "replace") for reply in answer.replies) + answer.text
        found = {*UUID.findall(text), *MARK.findall(text)}
        self.told.setdefault(estate.mark, set()).update(found)
        own = any(value in text for value in (estate.mark, *estate.standing.values(), str(estate.tenant.workspace_id)))
        if self.expected.setdefault((estate.mark, method.name), own) != own or answer.code != "OK":
            self.missing[f"{method.name}: {answer.code} {answer.text}"] += 1

    async def run(self, calls: int) -> None:
        """A first call of each kind, one after the other, and then so many at once."""
        for estate in self.estates:
            for method in self.methods:
                await self.call(estate, method)
        moments = random.Random(SEED)
        together = asyncio.Semaphore(AT_ONE_TIME)

        async def one() -> None:
            estate, method = moments.choice(self.estates), moments.choice(self.methods)
            cut_off_at = moments.random() if moments.random() < CUT_OFF else None
            async with together:
                await self.call(estate, method, cut_off_at)

        await asyncio.gather(*(one() for _ in range(calls)))

    def cancelled(self) -> float:
        """How many calls the server was in the middle of when their callers went."""
        families = self.relay.app.metrics.registry.collect()
        samples = [sample for family in families for sample in family.samples if sample.name == "relay_rpc_total"]
        return sum(sample.value for sample in samples if sample.labels["code"] == "CANCELLED")

    async def foreign(self) -> set[tuple[str, str]]:
        """Who was told what is another's: tenant, and the text."""
        owners = {estate.mark: estate.mark for estate in self.estates}
        for estate in self.estates:
            owners |= {text: estate.mark for text in await estate.marks() if UUID.fullmatch(text)}
        return {(mark, text) for mark, texts in self.told.items() for text in texts if owners.get(text, mark) != mark}


@asynccontextmanager
async def crowd(url: str, folder: Path, tenants: int = TENANTS) -> AsyncIterator[Crowd]:
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(
            running(url, settings_for(folder, RELAY_DATABASE_CONNECTIONS=str(CONNECTIONS)))
        )
        wire = await stack.enter_async_context(wired(relay))
        receiver = await stack.enter_async_context(receiving())
        postgres = await asyncpg.connect(url)
        stack.push_async_callback(postgres.close)
        estates = [
            Estate(tenant, f"tenant-{number:02}", wire, postgres)
            for number, tenant in enumerate(await asyncio.gather(*(relay.new_tenant() for _ in range(tenants))))
        ]
        for estate in estates:
            await estate.settle(receiver.url, KINDS)
        candidates = [
            method for name, method in METHODS.items() if set(NAMES[name].values()) <= KINDS and name not in ONCE
        ]
        made = Crowd(relay, wire, estates, [])
        made.methods = [method for method in candidates if (await made.ask(estates[0], method)).code != "UNIMPLEMENTED"]
        yield made


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_tenants_on_shared_connections_get_their_own(
    databases: Databases, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    async with databases.new() as url, crowd(url, tmp_path) as many:
        assert len(many.methods) > 8
        calls = 10_000 if long else 1_000
        await many.run(calls)
        assert await many.foreign() == set()
        assert many.missing == {}
        assert many.cancelled() > calls / 50
        await assert_whole(many)
        figure(
            f"{sum(many.ended.values())} calls of {TENANTS} tenants: {dict(many.ended)}, {many.cancelled():.0f} midway"
        )


async def assert_whole(many: Crowd) -> None:
    """Every connection is back, at rest and nobody's, and the server answers everybody."""
    pool = many.relay.app.db._app
    assert pool.get_idle_size() == pool.get_size() <= CONNECTIONS
    async with asyncio.timeout(10), AsyncExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection = await stack.enter_async_context(many.relay.app.db.anyone())
            assert not connection.is_in_transaction()
            assert not await connection.fetchval("SELECT current_setting('relay.workspace_id', true)")
    sessions = await many.relay.sql("SELECT state FROM pg_stat_activity WHERE application_name = 'relay relay_app'")
    assert {row["state"] for row in sessions} == {"idle"}
    for estate in many.estates:
        for method in many.methods:
            assert (await many.ask(estate, method)).code == "OK"


async def test_walls_that_are_down_are_found_out(
    databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with databases.new() as url, crowd(url, tmp_path, tenants=3) as many:
        with monkeypatch.context() as hole:
            no_query_names_its_workspace(hole)
            await many.run(100)
            assert await many.foreign() == set()  # row level security holds alone
        many.missing.clear()
        connections_keep_their_workspace(monkeypatch)
        await many.run(100)
        assert many.missing
        assert await many.foreign() == set()
        no_query_names_its_workspace(monkeypatch)
        await many.run(100)
        assert await many.foreign()
