"""What may be personal data can be erased, and is gone; every proof still verifies, and the log says what was done."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from relay.proofs import canonical

from relay_grpc.audit import erasure
from relay_grpc.audit.erasure import Request
from relay_grpc.audit.event import ERASABLE, SYSTEM_WORKSPACE, ActorType, Event, erased, leaf_of, salts_of
from relay_grpc.db import DatabaseUnusable
from relay_grpc.owner import UnknownWorkspace
from tests.actions.caller import eventually
from tests.audit.log import (
    assert_proven,
    event_at,
    export_of,
    held_of,
    integrated,
    log_events,
    newest,
    verified,
)
from tests.harness import Databases, Relay, running, settings_for
from tests.processes import ROOT

PERSON = "https://issuer.example#jane.doe.4711"
NAME, PEER, WORDS = "Jane Doe 4711", "198.51.100.77", "jane said so 4711"
MARKS = ("jane", "Jane", PEER)  # whatever holds one of these holds something of the person
BY = {"actor_id", "actor_name", "peer", "note"}
ABOUT = {"target", "note", "idempotency_key_hash", "parameters_hash", "parameters_prefix"}


def nothing(_: int) -> None:
    pass


@pytest.fixture
async def relay(databases: Databases, data_dir: Path) -> AsyncIterator[Relay]:
    async with databases.new() as url, running(url, settings_for(data_dir)) as server:
        yield server


@pytest.fixture
async def connection(relay: Relay) -> AsyncIterator[Any]:
    made = await asyncpg.connect(relay.url)
    yield made
    await made.close()


def by_person(workspace_id: UUID, at: datetime) -> Event:
    return event_at(
        at,
        workspace_id,
        actor_type=ActorType.USER,
        actor_id=PERSON,
        actor_name=NAME,
        peer=PEER,
        note=WORDS,
        target="connections/kept",
        params_hash="kept",
    )


def about_person(workspace_id: UUID, at: datetime) -> Event:
    return event_at(
        at,
        workspace_id,
        action="AuthService.AssignRole",
        actor_id="another",
        target=f"roleAssignments/{PERSON}",
        note=WORDS,
        params_hash="of jane",
        params_prefix='{"user_id":"jane"}',
        idempotency_key_hash="of jane",
    )


async def logged(relay: Relay, workspace_id: UUID, count: int) -> list[Event]:
    """Events of this month, of earlier ones in DEFAULT, and of one that has no partition; half about the person."""
    now = datetime.now(UTC)
    times = [now - timedelta(days=40 * (n % 3), seconds=n) for n in range(count)]
    events = [make(workspace_id, at) for at in times for make in (by_person, about_person)]
    events += [event_at(at, workspace_id, actor_id="another", note="kept", peer="192.0.2.1") for at in times]
    await log_events(relay.url, events)
    await integrated(relay)
    return events


async def found_in(connection: Any) -> list[str]:
    """Where rows or statistics of the audit log still have something of the person."""
    places = []
    for table in ("audit_logs", "audit_values", "audit_leaves", "audit_pending", "audit_checkpoints", "pg_stats"):
        for mark in MARKS:
            if await connection.fetchval(f"SELECT EXISTS (SELECT FROM {table} t WHERE t::text LIKE $1)", f"%{mark}%"):
                places.append(f"{table}: {mark}")
    return places


async def test_what_somebody_did_and_what_was_done_to_them_is_erased_and_all_is_proven(
    relay: Relay, connection: Any
) -> None:
    workspace_id = relay.tenant.workspace_id
    await logged(relay, workspace_id, 12)
    other = await relay.new_tenant()
    await logged(relay, other.workspace_id, 1)
    await connection.execute("ANALYZE audit_values")
    assert await connection.fetchval("SELECT count(*) FROM pg_stats WHERE most_common_vals::text LIKE '%jane%'")
    before = await assert_proven(connection, workspace_id)
    held = await newest(connection, workspace_id)

    looked = await erasure.look(relay.url, Request("default", PERSON))
    assert looked.counts == {"ACTOR": 12, "ABOUT_ACTOR": 12}
    assert await newest(connection, workspace_id) == held, "to look changes nothing"
    assert await erasure.erase(relay.url, Request("default", PERSON), "case 1", nothing) == looked.counts
    await integrated(relay)

    after = await assert_proven(connection, workspace_id)
    for id_, row in before.items():
        now = after[id_]
        assert canonical(leaf_of(now)) == canonical(leaf_of(row))
        assert now["leaf_index"] == row["leaf_index"]
        expected = BY if row["actor_id"] == PERSON else ABOUT if PERSON in row["target"] else set()
        assert set(erased(now)) == expected
        assert set(salts_of(now)) == set(salts_of(row)) - expected, "and no salt to try guesses with"
        left = [name for name in ERASABLE if now[name] is not None]
        assert [now[name] for name in left] == [row[name] for name in left]
    events = [row for row in after.values() if row["action"] == "operator.EraseValues"]
    assert [(row["reason"], row["count"], row["note"]) for row in events] == [
        ("ACTOR", 12, "case 1"),
        ("ABOUT_ACTOR", 12, "case 1"),
    ]
    assert not [mark for row in events for mark in MARKS if mark in str(dict(row))]
    assert await erasure.erase(relay.url, Request("default", PERSON), "case 1", nothing) == {}

    assert await connection.fetchval("SELECT count(*) FROM audit_values WHERE actor_id = $1", PERSON) == 1
    third = f"tenant of {other.workspace_id}"
    await connection.execute("UPDATE workspaces SET name = $1 WHERE id = $2", third, other.workspace_id)
    await erasure.erase(relay.url, Request(third, PERSON), "", nothing)
    assert await found_in(connection) == []


async def test_a_run_that_broke_off_before_postgres_made_room_is_ended_by_the_next(
    relay: Relay, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await logged(relay, relay.tenant.workspace_id, 12)
    await connection.execute("ANALYZE audit_values")

    async def killed(_url: str, _table: str) -> None:
        raise DatabaseUnusable("killed")

    monkeypatch.setattr(erasure, "vacuum", killed)
    with pytest.raises(DatabaseUnusable):
        await erasure.erase(relay.url, Request("default", PERSON), "", nothing)
    assert set(await found_in(connection)) == {"pg_stats: jane", "pg_stats: Jane", f"pg_stats: {PEER}"}
    process = await command(relay, "--workspace", "default", "--actor", PERSON, "--yes")
    out, err = await process.communicate()
    assert (process.returncode, out.decode()) == (0, "There is nothing of it to erase, or it was erased before.\n"), err
    assert await found_in(connection) == []


async def test_runs_beside_each_other_count_an_event_once(
    relay: Relay, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "BATCH", 50)
    workspace_id = relay.tenant.workspace_id
    now = datetime.now(UTC)
    late = by_person(workspace_id, now - timedelta(days=1))
    await log_events(relay.url, [by_person(workspace_id, now - timedelta(seconds=n)) for n in range(400)])
    told: list[int] = []

    def tell(count: int) -> None:
        told.append(count)

    async def commit_late() -> None:
        await eventually(lambda: told)
        await log_events(relay.url, [late])

    runs = [erasure.erase(relay.url, Request("default", PERSON), "", tell) for _ in range(3)]
    *done, _ = await asyncio.gather(*runs, commit_late())
    assert sum(counts.get("ACTOR", 0) for counts in done) == 401
    counted = "SELECT sum(count)::int FROM audit_logs WHERE action = 'operator.EraseValues'"
    assert await connection.fetchval(counted) == 401
    assert await connection.fetchval("SELECT count(*) FROM audit_values WHERE actor_id = $1", PERSON) == 0


async def test_events_are_erased_by_id_and_only_where_they_are(relay: Relay, connection: Any) -> None:
    workspace_id = relay.tenant.workspace_id
    other = await relay.new_tenant()
    mine, theirs = await logged(relay, workspace_id, 1), await logged(relay, other.workspace_id, 1)
    unknown = Event(workspace_id=SYSTEM_WORKSPACE, action="test.Refused", peer=PEER)
    await log_events(relay.url, [unknown])
    asked = Request("default", events=[mine[0].id, theirs[0].id, unknown.id])
    assert await erasure.erase(relay.url, asked, "", nothing) == {"EVENTS": 1}
    assert await erasure.erase(relay.url, asked, "", nothing) == {}
    assert await erasure.erase(relay.url, Request("system", events=[unknown.id]), "", nothing) == {"EVENTS": 1}
    await integrated(relay)
    rows = await assert_proven(connection, workspace_id)
    assert set(erased(rows[mine[0].id])) == BY | {"target", "parameters_hash"}
    (told,) = [row for row in rows.values() if row["action"] == "operator.EraseValues"]
    assert (told["target"], told["count"], told["reason"]) == (f"events/{mine[0].id}", 1, "EVENTS")
    assert not erased((await assert_proven(connection, other.workspace_id))[theirs[0].id])
    with pytest.raises(UnknownWorkspace):
        await erasure.look(relay.url, Request("nobody's", PERSON))


async def test_the_api_shows_what_is_erased(relay: Relay, connection: Any) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        key = await client.auth.create_api_key("Jane's 4711", "admin")
        async with relay.connect(key.secret) as jane:
            await jane.connections.create_webhook("hers", "http://127.0.0.1:9/")
        done = await erasure.erase(relay.url, Request("default", key.id), "", nothing)
        assert done["ACTOR"] >= 1
        (event,) = [
            event async for event in client.audit.list_events() if event.action == "ConnectionsService.CreateConnection"
        ]
        assert (event.actor.id, event.actor.name, event.peer) == ("", "", "")
        assert set(event.erased_fields) == {"actor_id", "actor_name", "peer"}
        assert event.target.startswith("connections/")


async def test_exports_from_before_and_after_are_both_proven(relay: Relay) -> None:
    tenant = relay.tenant
    await logged(relay, tenant.workspace_id, 5)
    held, before = await held_of(relay, tenant), await export_of(relay, tenant)
    assert any(PEER.encode() in line for line in before)
    await erasure.erase(relay.url, Request("default", PERSON), "", nothing)
    await integrated(relay)
    after = await export_of(relay, tenant)
    assert not [line for line in after for mark in MARKS if mark.encode() in line]
    assert verified(relay, before, held).erased_values == 0
    report = verified(relay, after, held)
    assert (report.erased_events, report.erasures, report.unexplained) == (10, 10, 0)
    assert (report.first, report.end) == (0, report.checkpoint.size)


async def command(relay: Relay, *arguments: str, **environ: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "relay_grpc", "audit", "erase", "--data-dir", str(relay.settings.data_dir), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "DATABASE_URL": relay.url, "COLUMNS": "200", **environ},
        cwd=ROOT,
    )


async def test_a_run_that_is_killed_has_recorded_what_it_did_and_the_next_does_the_rest(
    relay: Relay, connection: Any
) -> None:
    workspace_id = relay.tenant.workspace_id
    count = erasure.BATCH * 3 + 17
    now = datetime.now(UTC)
    await log_events(relay.url, [by_person(workspace_id, now - timedelta(seconds=n)) for n in range(count)])
    arguments = ("--workspace", "default", "--actor", PERSON, "--yes", "--json")
    killed = await command(relay, *arguments, RELAY_FAILPOINT="erasure.midway:2")
    _, err = await killed.communicate()
    assert killed.returncode == -signal.SIGKILL, err
    query = "SELECT count(*) FROM audit_values WHERE actor_id = $1"
    assert await connection.fetchval(query, PERSON) == count - erasure.BATCH
    continued = await command(relay, *arguments)
    out, err = await continued.communicate()
    assert continued.returncode == 0, err
    assert json.loads(out)["erased"] == {"ACTOR": count - erasure.BATCH}
    assert await connection.fetchval(query, PERSON) == 0
    told = await connection.fetch("SELECT count FROM audit_logs WHERE action = 'operator.EraseValues' ORDER BY id")
    assert [row["count"] for row in told] == [erasure.BATCH] * 3 + [17]
    dead = "SELECT sum(n_dead_tup)::int FROM pg_stat_user_tables WHERE relname LIKE 'audit\\_values%'"
    await connection.execute("SELECT pg_stat_force_next_flush()")
    assert await connection.fetchval(dead) < count / 10, "Postgres was told to make room"


async def test_the_command_says_what_and_who_has_copies(relay: Relay, connection: Any) -> None:
    workspace_id = relay.tenant.workspace_id
    events = await logged(relay, workspace_id, 2)
    await log_events(
        relay.url,
        [
            Event(workspace_id=workspace_id, action="AuditService.ExportEvents", actor_id="the auditor"),
            event_at(datetime(2020, 1, 1, tzinfo=UTC), workspace_id, action="AuditService.ExportEvents", actor_id="x"),
        ],
    )
    person = ("--workspace", "default", "--actor", PERSON)
    wrongs = (
        ((*person, "--event", str(events[0].id), "--yes"), 2, "give --actor, or one --event"),
        (("--workspace", "default", "--yes"), 2, "give --actor, or one --event"),
        (person, 2, "give --yes"),
        (("--workspace", "x", "--actor", PERSON, "--yes"), 4, "no workspace is named 'x'"),
        (("--workspace", "default", "--event", "y", "--yes"), 2, "should be a valid UUID"),
    )
    processes = await asyncio.gather(*(command(relay, *wrong) for wrong, _, _ in wrongs))
    for process, (_, code, said) in zip(processes, wrongs, strict=True):
        _, err = await process.communicate()
        assert (process.returncode, said in " ".join(err.decode().split())) == (code, True), err
    process = await command(relay, *person, "--yes", "--reason", "case 12")
    out, err = (stream.decode() for stream in await process.communicate())
    assert process.returncode == 0, err
    assert re.search(r"^2 events: of what they did", err, re.MULTILINE)
    assert re.search(r"AuditService.ExportEvents +the auditor", err)
    assert " x\n" not in err, "who exported before there was anything of them"
    assert out.startswith("Erased from 4 events.")
    process = await command(relay, *person, "--yes", "--json")
    assert json.loads((await process.communicate())[0]) == {"erased": {}, "copies": []}
