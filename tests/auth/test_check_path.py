"""The way of a presented key with very many keys in the table: what the first check costs, and who pays for guesses."""

import asyncio
import math
import re
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from relay.v1 import auth_pb2

from relay_grpc.auth import keys
from relay_grpc.auth.proofs import HASHER, Peppers
from relay_grpc.bootstrap import bootstrap
from relay_grpc.db import Database
from relay_grpc.ids import uuid7
from relay_grpc.settings import Settings
from tests.actions.caller import eventually
from tests.auth.forgery import forged, mistyped
from tests.auth.instance import an_instance
from tests.harness import Databases, OnDatabase, settings_for
from tests.processes import served

pytestmark = pytest.mark.long
Figure = Callable[[str], None]
LOOK_UP = "SELECT * FROM relay_find_api_keys($1)"
NOISE = 0.01  # seconds: what a tail below it says is about the machine
GUESSERS, TENANT = ("198.51.100.7", "198.51.100.8", "198.51.100.9"), "192.0.2.1"


@dataclass
class Crowded(OnDatabase):
    """A database with very many keys. usable: the texts of those that were told."""

    url: str
    settings: Settings
    folder: Path
    usable: Sequence[str]


@pytest.fixture(scope="module")
async def crowded(databases: Databases, tmp_path_factory: pytest.TempPathFactory, long: bool) -> AsyncIterator[Crowded]:
    """Keys that nobody has, and others whose hashes are of another text: what proves them is their MAC alone."""
    folder = tmp_path_factory.mktemp("data")
    settings = settings_for(folder)
    peppers, nobody = Peppers(settings.key_peppers), HASHER.hash("nobody")
    usable = [keys.generate(live=False) for _ in range(1000 if long else 200)]
    async with databases.new() as url:
        workspace_id = (await bootstrap(url, settings)).workspace_id
        crowd = Crowded(url, settings, folder, [key.text for key in usable])
        await crowd.sql(
            """
            INSERT INTO api_keys (id, workspace_id, lineage_id, public_id, key_hash, name, role, scopes, created_by)
            SELECT gen_random_uuid(), $1, gen_random_uuid(), lpad(n::text, 12, '0'), $2, 'crowd', 'viewer', '{}', 'test'
              FROM generate_series(1, $3::int) AS n
            """,
            workspace_id,
            nobody,
            100_000 if long else 20_000,
        )
        await crowd.sql(
            """
            INSERT INTO api_keys
              (id, workspace_id, lineage_id, public_id, key_hash, key_mac, pepper_id, name, role, scopes, created_by)
            SELECT id, $1, id, public_id, $2, mac, $3, 'usable', 'viewer', '{}', 'test'
              FROM unnest($4::uuid[], $5::text[], $6::bytea[]) AS made(id, public_id, mac)
            """,
            workspace_id,
            nobody,
            settings.key_peppers[0].id,
            [uuid7() for _ in usable],
            [key.public_id for key in usable],
            [peppers.mac(key.text).mac for key in usable],
        )
        await crowd.sql("ANALYZE api_keys")
        yield crowd


@dataclass
class Scans:
    """Of the table of keys, while the block lasted. by_public_id: of the index."""

    sequential: int = 0
    indexed: int = 0
    by_public_id: int = 0


@asynccontextmanager
async def scanning(crowded: Crowded) -> AsyncIterator[Scans]:
    async def counted() -> list[int]:
        (row,) = await crowded.sql(
            """
            SELECT t.seq_scan, t.idx_scan, i.idx_scan
              FROM pg_stat_user_tables t JOIN pg_stat_user_indexes i USING (relid)
             WHERE t.relname = 'api_keys' AND i.indexrelname = 'api_keys_public_id_key'
            """
        )
        return [int(count) for count in row]

    before, scans = await counted(), Scans()

    async def told() -> bool:
        """A server process tells its counts when it ends at the latest."""
        now = await counted()
        scans.sequential, scans.indexed, scans.by_public_id = (a - b for a, b in zip(now, before, strict=True))
        return scans.by_public_id > 0

    yield scans
    await eventually(told)


async def test_a_good_keys_first_check_is_one_indexed_query(crowded: Crowded) -> None:
    statements: list[str] = []
    async with scanning(crowded) as scans, an_instance(crowded.url, crowded.settings.key_peppers) as instance:
        await watch(instance.db, statements)
        assert (await instance.verify(crowded.usable[0])).role == "viewer"
        assert statements == [LOOK_UP]
        assert instance.hashes == 0
        await instance.verify(crowded.usable[0])
        assert statements == [LOOK_UP]
    assert scans == Scans(sequential=0, indexed=1, by_public_id=1)


async def test_keys_that_come_at_one_time_are_looked_up_together(crowded: Crowded, figure: Figure) -> None:
    statements: list[str] = []
    async with scanning(crowded) as scans, an_instance(crowded.url, crowded.settings.key_peppers) as instance:
        await watch(instance.db, statements)
        await asyncio.gather(*(instance.verify(key) for key in crowded.usable))
        assert set(statements) == {LOOK_UP}
        assert len(statements) <= math.ceil(len(crowded.usable) / 256) + 1  # the first goes out alone
        assert instance.hashes == 0
    assert scans.sequential == 0
    figure(f"{len(crowded.usable)} keys in {len(statements)} queries")


async def test_a_bad_key_costs_one_hash_at_most(crowded: Crowded) -> None:
    statements: list[str] = []
    async with scanning(crowded) as scans, an_instance(crowded.url, crowded.settings.key_peppers) as instance:
        await watch(instance.db, statements)
        for hashes, key in (
            (0, mistyped(crowded.usable[0])),
            (1, forged("0" * 11 + "7")),  # of the crowd, which has no MACs
            (2, forged(keys.public_id_of(crowded.usable[0]) or "")),
            (3, forged()),
        ):
            assert await instance.refuses(key)
            assert instance.hashes == hashes
            assert len(statements) == hashes
    assert scans.sequential == 0


async def watch(db: Database, statements: list[str]) -> None:
    """Notes what is asked on the connection for calls, of which there is one."""
    async with db.anyone() as connection:
        connection.add_query_logger(lambda record: statements.append(record.query))


@dataclass
class Caller:
    """Calls WhoAmI of one server with all kinds of keys. seconds: what the answers took, by status."""

    channels: Sequence[grpc.aio.Channel]
    seconds: dict[str, list[float]] = field(default_factory=dict)

    async def call(self, number: int, key: str, peer: str) -> None:
        who_am_i = self.channels[number % len(self.channels)].unary_unary("/relay.v1.AuthService/WhoAmI")
        started, code = time.monotonic(), "OK"
        try:
            metadata = (("x-api-key", key), ("x-forwarded-for", peer))
            await who_am_i(auth_pb2.WhoAmIRequest().SerializeToString(), metadata=metadata, timeout=30)
        except grpc.aio.AioRpcError as error:
            code = error.code().name
        self.seconds.setdefault(code, []).append(time.monotonic() - started)

    async def paced(self, calls: Sequence[str], per_second: float, peer: str) -> None:
        """One call with each of these keys, at a rate that does not wait for answers."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number, key in enumerate(calls):
                await asyncio.sleep(began + number / per_second - time.monotonic())
                group.create_task(self.call(number, key, peer))


@asynccontextmanager
async def a_server(crowded: Crowded, connections: int) -> AsyncIterator[tuple[Sequence[grpc.aio.Channel], Any]]:
    """A new process behind a proxy, connections to it, and how many hashes it has made."""
    async with (
        served(crowded.url, crowded.folder, RELAY_TRUSTED_PROXIES="127.0.0.0/8") as (listen, http_listen),
        aiohttp.ClientSession() as session,
    ):

        async def hashes() -> int:
            async with session.get(f"http://{http_listen}/metrics") as response:
                found = re.search(r"^relay_key_hashes_total (\S+)$", await response.text(), re.MULTILINE)
                assert found
                return int(float(found[1]))

        channels = [
            grpc.aio.insecure_channel(listen, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(connections)
        ]
        try:
            for channel in channels:
                await channel.channel_ready()
            yield channels, hashes
        finally:
            for channel in channels:
                await channel.close()


async def test_all_keys_come_back_in_the_first_second_after_a_restart(crowded: Crowded, figure: Figure) -> None:
    async with a_server(crowded, 8) as (channels, hashes):
        caller = Caller(channels)
        await caller.paced(crowded.usable, len(crowded.usable), TENANT)
        assert set(caller.seconds) == {"OK"}
        assert len(caller.seconds["OK"]) == len(crowded.usable)
        slowest = max(caller.seconds["OK"])
        assert slowest < 5
        assert await hashes() == 0
    tail = p99(caller.seconds["OK"])
    figure(f"{len(crowded.usable)} keys: 0 refused, 0 hashes, p99 {tail:.3f} s, slowest {slowest:.3f} s")


async def test_guesses_from_one_peer_cost_ten_hashes_a_minute_and_others_nothing(
    crowded: Crowded, long: bool, figure: Figure
) -> None:
    guesses, rounds, rate = (5000, 10, 250.0) if long else (450, 3, 200.0)
    calls = [crowded.usable[0]] * int(guesses / rounds / rate * 100)
    async with a_server(crowded, 2) as (channels, hashes):
        await Caller(channels).paced([*crowded.usable[:1], forged()] * 20, 100, TENANT)  # warm
        for guesser in GUESSERS:  # the machine may have a bad moment, and not three
            guessing, quiet, disturbed = Caller(channels[:1]), Caller(channels[1:]), Caller(channels[1:])
            before, began = await hashes(), time.monotonic()
            for _ in range(rounds):
                await quiet.paced(calls, 100, TENANT)
                await asyncio.gather(
                    disturbed.paced(calls, 100, TENANT),
                    guessing.paced([forged() for _ in range(guesses // rounds)], rate, guesser),
                )
            minutes, hashed = math.floor((time.monotonic() - began) / 60) + 1, await hashes() - before
            assert set(quiet.seconds) == set(disturbed.seconds) == {"OK"}
            assert {code: len(answers) for code, answers in guessing.seconds.items()} == {
                "UNAUTHENTICATED": hashed,
                "RESOURCE_EXHAUSTED": guesses - hashed,
            }
            assert 10 <= hashed <= 10 * minutes
            tails = [statistics.median(p99(part) for part in parts(one, rounds)) for one in (disturbed, quiet)]
            figure(
                f"{guesses} guesses: {hashed} hashes in {minutes} min; another tenant's p99 {tails[0] * 1000:.1f} ms, "
                f"without them {tails[1] * 1000:.1f} ms (median of {rounds} rounds)"
            )
            if tails[0] <= 2 * max(tails[1], NOISE):
                break
        else:
            pytest.fail("guesses of one peer slow another tenant down")


def parts(caller: Caller, count: int) -> list[list[float]]:
    """What its answers took, round by round."""
    seconds = caller.seconds["OK"]
    return [seconds[len(seconds) * i // count : len(seconds) * (i + 1) // count] for i in range(count)]


def p99(seconds: Sequence[float]) -> float:
    return sorted(seconds)[math.ceil(len(seconds) * 0.99) - 1]
