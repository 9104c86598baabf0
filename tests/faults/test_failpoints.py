"""kill -9 at each point between two effects that a crash must not tear apart: nothing is lost, nothing is made up."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import standardwebhooks

from relay_grpc import failpoints
from tests.actions.caller import eventually
from tests.faults.workload import LEASE, RETRYABLE, Workload, working
from tests.harness import Databases

ACTIONS = 40
APART = 0.01  # seconds between the clients' first calls: so that they come in more than one batch
TOGETHER = 2  # runs at one time
RECOVERY = 1.5  # seconds after a lease's end, or after the start of the last server, until its attempt is ended
# How often a server comes to each point, at least: it dies at one of these times.
REACHED = {
    "execute.uncommitted": 3,
    "execute.committed": 3,
    "attempt.claimed": ACTIONS,
    "attempt.connected": ACTIONS,
    "attempt.sent": ACTIONS,
    "attempt.answering": ACTIONS,
    "attempt.answered": ACTIONS,
    "attempt.recorded": ACTIONS,
    "retry.scheduling": ACTIONS // 5,
    "rescue.midway": 2,
    "audit.appending": ACTIONS,
    "audit.committed": ACTIONS,
    "secret.rotating": 3,
}


@dataclass(frozen=True)
class Kill:
    """A server that died. since, until: in between it, and no other, sent anything; seconds since the epoch."""

    point: str
    since: float
    until: float


def test_each_point_is_come_to_by_a_test() -> None:
    elsewhere = {"migration.midway", "erasure.midway"}  # test_migration.py here, and audit/test_erasure.py
    assert REACHED.keys() | elsewhere == set(failpoints.POINTS)


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_nothing_is_lost_wherever_a_server_dies(
    databases: Databases, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    seed = random.randrange(2**32)
    runs = [run for _ in range(5 if long else 1) for run in kills_of(random.Random(seed))]
    found = Counter[str]()
    together = asyncio.Semaphore(TOGETHER)

    async def one(number: int, points: Sequence[tuple[str, int]]) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        async with together, databases.new() as url, working(url, folder) as work:
            try:
                found.update(await run(work, points))
            except BaseException as error:
                error.add_note(f"seed {seed}, a server for each of {points}")
                raise

    async with asyncio.TaskGroup() as group:
        for number, points in enumerate(runs):
            group.create_task(one(number, points))
    figure(
        f"{sum(map(len, runs))} kills among {ACTIONS} actions each, seed {seed}: lost 0, unexpected 0; sent twice by "
        f"servers that died at {', '.join(f'{point}: {count}' for point, count in sorted(found.items())) or 'no point'}"
    )


def kills_of(chance: random.Random) -> list[list[tuple[str, int]]]:
    """Each point once, and the how-manieth time it kills at, in two runs."""
    kills = [(point, chance.randint(1, most)) for point, most in REACHED.items()]
    chance.shuffle(kills)
    # First in its run, so that no client comes to it with a key that is used already and commits nothing.
    kills.sort(key=lambda kill: kill[0] != "execute.committed")
    return [kills[::2], kills[1::2]]


async def run(work: Workload, points: Sequence[tuple[str, int]]) -> Counter[str]:
    """One server after the other, each of which dies at its point, and forty more actions for each.

    Every fifth action is refused once. Clients go from server to server until they hear what became of their action,
    and the last server is left to end everything. Returns the requests that were made for nothing, by point.
    """
    kills = []
    async with asyncio.TaskGroup() as group:
        clients: list[asyncio.Task[None]] = []
        for point, nth in points:
            names = [f"{point}/{number}" for number in range(ACTIONS)]
            work.refused.update(names[::5])
            clients += [group.create_task(act(work, name, number * APART)) for number, name in enumerate(names)]
            if point == "rescue.midway":
                kills.append(await killed(work, "no point", 0))
            if point == "secret.rotating":
                clients.append(group.create_task(rotate_on_and_on(work)))
            kills.append(await killed(work, point, nth))
        async with work.server():
            serving = time.time()
            await rotate(work, await work.client())
            await asyncio.wait(clients)
            await work.drained()
    await work.assert_nothing_lost()
    await assert_replayed(work, kills)
    await assert_leases_are_taken_over(work, serving)
    await assert_signed(work)
    return await wasted(work, kills)


async def killed(work: Workload, point: str, nth: int) -> Kill:
    """nth: 0 for a server that is killed when it has sent something, wherever it is."""
    since, sent = time.time(), len(work.deliveries)
    async with work.server(**{"RELAY_FAILPOINT": f"{point}:{nth}"} if nth else {}) as server:
        if not nth:
            await eventually(lambda: len(work.deliveries) > sent + ACTIONS / 4)
            server.kill()
        await asyncio.wait([asyncio.create_task(server.process.wait())], timeout=20)
        assert server.process.returncode == -signal.SIGKILL, f"{point}:{nth} was not come to"
    await asyncio.sleep(0.05)  # the receiver has yet to read the last of what was sent
    return Kill(point, since, time.time())


async def act(work: Workload, name: str, delay: float) -> None:
    await work.client()
    await asyncio.sleep(delay)
    await work.act(name)


async def rotate_on_and_on(work: Workload) -> None:
    """Until its server is gone."""
    client = await work.client()
    with suppress(*RETRYABLE):
        while True:
            await rotate(work, client)


async def rotate(work: Workload, client: Any) -> None:
    connection = await client.connections.rotate_secret(work.connections[0].id)
    work.secrets.append(connection.signing_secret)


async def assert_replayed(work: Workload, kills: Sequence[Kill]) -> None:
    """Where a server died between commit and answer, the answer that came in the end was marked as a replay."""
    for kill in kills:
        if kill.point == "execute.committed":
            (newest,) = await work.sql(
                """
                SELECT idempotency_key FROM action_executions
                 WHERE created_at < to_timestamp($1) ORDER BY created_at DESC LIMIT 1
                """,
                kill.until,
            )
            assert [answer.replayed for answer in work.answers[newest["idempotency_key"]]] == [True]


async def assert_leases_are_taken_over(work: Workload, serving: float) -> None:
    """Never before they end, and soon after. serving: since when the last server was."""
    for row in await work.attempts():
        if not row["answer"] and row["outcome"] != "timeout":  # a starved machine may take longer than an attempt may
            assert row["outcome"] == "interrupted"
            end = row["began"] + LEASE
            assert end <= row["ended"] <= max(end, serving) + RECOVERY


async def assert_signed(work: Workload) -> None:
    """Every request bears the signature of a secret that somebody was told of, and there are no other secrets."""
    hooks = [standardwebhooks.Webhook(secret) for secret in work.secrets]
    for headers, body in work.receiver.requests:
        assert any(verifies(hook, headers, body) for hook in hooks)
    assert (await work.sql("SELECT count(*) FROM connection_secrets"))[0]["count"] == len(work.secrets)


def verifies(hook: standardwebhooks.Webhook, headers: dict[str, str], body: bytes) -> bool:
    try:
        hook.verify(body, headers)
    except standardwebhooks.WebhookVerificationError:
        return False
    return True


async def wasted(work: Workload, kills: Sequence[Kill]) -> Counter[str]:
    """How many requests were made once more, by the point at which the server died that made them first.

    Whatever that point, other attempts are under way when a server dies, so it is every request that is looked at: one
    is made again only where Relay has no record of its answer, which is where its server died after attempt.sent and
    before the commit that precedes attempt.recorded, or where an attempt on record gave up waiting.
    """
    attempts = await work.attempts()
    told = {row["answer"] for row in attempts}
    found = Counter[str]()
    for delivery in work.deliveries:
        if delivery.answer in told:
            continue
        mine = [row for row in attempts if row["name"] == delivery.name]
        if any(row["outcome"] == "timeout" and row["began"] <= delivery.at for row in mine):
            found["a timeout"] += 1
            continue
        (kill,) = [kill for kill in kills if kill.since <= delivery.at < kill.until]
        assert any(
            row["outcome"] == "interrupted" and row["began"] <= delivery.at and kill.until <= row["ended"]
            for row in mine
        )
        found[kill.point] += 1
    return found
