"""Exports: what stands in the log, whole, in the log's order, in three formats; and not what was tampered with."""

import asyncio
import base64
import csv
import io
import json
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import jsonschema_rs
import pytest
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema
from relay import errors
from relay.proofs import RootOf, canonical, commitment, leaf_hash, subtrees
from relay.v1 import audit_pb2

from relay_grpc.audit import export
from relay_grpc.audit.event import ERASABLE, Outcome, public_name
from relay_grpc.interceptors.policy import methods
from tests.audit.log import event_at, integrated, log_events
from tests.harness import Databases, Relay, Tenant, running, settings_for

JSONL, CSV, OCSF = audit_pb2.EXPORT_FORMAT_JSONL, audit_pb2.EXPORT_FORMAT_CSV, audit_pb2.EXPORT_FORMAT_OCSF
FORMULA = '=HYPERLINK("http://evil.example")'
HARD = 'a "quoted", line\r\nand \N{SNOWMAN}'


async def exported(client: Any, export_format: int = JSONL, **asked: Any) -> bytes:
    return b"".join([piece.chunk async for piece in client.audit.export_events(export_format, **asked)])


def lines_of(content: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    *events, last = [json.loads(line) for line in content.decode().splitlines()]
    return events, last


def assert_proven(events: list[dict[str, Any]], last: dict[str, Any]) -> None:
    """The lines and the hashes beside them make the root that the checkpoint states."""
    assert [line["leaf_index"] for line in events] == list(range(last["first"], last["end"]))
    _, size, root, *_ = last["checkpoint"].split("\n")
    folded = RootOf()
    for (height, _), hashed in zip(subtrees(0, last["first"]), last["left"], strict=True):
        folded.add(bytes.fromhex(hashed), height)
    for line in events:
        folded.add(leaf_hash(canonical(line["event"])))
        assert line["values"].keys() == line["salts"].keys() <= line["event"]["commitments"].keys()
        for name, value in line["values"].items():
            committed = commitment(bytes.fromhex(line["salts"][name]), value)
            assert committed.hex() == line["event"]["commitments"][name]
    for (height, _), hashed in zip(subtrees(last["end"], int(size)), last["right"], strict=True):
        folded.add(bytes.fromhex(hashed), height)
    assert base64.b64encode(folded.root()).decode() == root


@pytest.fixture(scope="module")
async def tenant(relay: Relay) -> Tenant:
    """Whose log has events with texts that are hard to write."""
    tenant = await relay.new_tenant()
    made = [
        event_at(
            datetime.now(UTC),
            tenant.workspace_id,
            status=status,
            actor_name=name,
            actor_id="somebody",
            target=target,
            note=note,
            peer=peer,
            scopes=("actions:read", "audit:read"),
            reason="" if status == Outcome.SUCCESS else "SCOPE_MISSING",
            duration=0.25,
            params_prefix='{"payload":*}',
        )
        for status, name, target, note, peer in (
            (Outcome.SUCCESS, FORMULA, "", HARD, "10.0.0.1"),
            (Outcome.DENIED, "-1", "executions/1", "@SUM(A1)", "::1"),
            (Outcome.FAILED, "+1", "\t=1", "", ""),
        )
    ]
    await log_events(relay.url, made)
    await integrated(relay)
    return tenant


@pytest.fixture
async def client(relay: Relay, tenant: Tenant) -> AsyncIterator[Any]:
    async with relay.connect(tenant.admin) as client:
        yield client


async def test_jsonl_proves_what_it_holds(relay: Relay, tenant: Tenant, client: Any) -> None:
    events, last = lines_of(await exported(client))
    assert_proven(events, last)
    assert (last["first"], last["start_time"], last["end_time"], last["dropped"]) == (0, None, None, None)
    assert last["values"] == export.VALUES_STAY
    rows = await relay.sql(
        "SELECT * FROM audit_events WHERE workspace_id = $1 AND leaf_index IS NOT NULL ORDER BY leaf_index",
        tenant.workspace_id,
    )
    for row, line in zip(rows, events, strict=False):
        assert line["values"] == {public_name(name): row[name] for name in ERASABLE if row[name]}
    assert {HARD, FORMULA, "@SUM(A1)"} <= {value for line in events for value in line["values"].values()}


async def test_csv_is_read_back_and_runs_nothing(client: Any) -> None:
    content = (await exported(client, CSV)).decode()
    assert content.startswith("leaf_index,id,event_time,")
    rows = list(csv.DictReader(io.StringIO(content, newline=""), strict=True))
    events, _ = lines_of(await exported(client))
    for row, line in zip(rows, events, strict=False):
        event, values = line["event"], line["values"]
        assert (row["leaf_index"], row["id"]) == (str(line["leaf_index"]), event["id"])
        assert (row["event_time"], row["outcome"], row["scopes"].split()) == (
            event["event_time"],
            event["outcome"],
            event["scopes"],
        )
        for name in ("actor_id", "actor_name", "target", "note", "peer"):
            assert row[name].removeprefix("'") == values.get(name, "")
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for cell in row.values())
    assert f"'{FORMULA}" in {row["actor_name"] for row in rows}
    assert HARD in {row["note"] for row in rows}


async def test_ocsf_is_what_its_published_schema_says(client: Any) -> None:
    schema = OcsfJsonSchemaEmbedded(get_ocsf_schema(version=export.OCSF_VERSION)).get_class_schema("api_activity")
    validator = jsonschema_rs.validator_for(schema)
    events = [json.loads(line) for line in (await exported(client, OCSF)).splitlines()]
    assert len(events) > 5
    for event in events:
        assert not [(error.message, list(error.instance_path)) for error in validator.iter_errors(event)]
        assert event["type_uid"] == 600300 + event["activity_id"]
        assert abs(event["time"] / 1000 - datetime.now(UTC).timestamp()) < 600
    assert {event["status_id"] for event in events} == {1, 2}
    assert [event["unmapped"]["leaf_index"] for event in events] == list(range(len(events)))
    created = [event for event in events if event["api"]["operation"] == "CreateApiKey"]
    assert {event["activity_id"] for event in created} == {1}
    with pytest.raises(jsonschema_rs.ValidationError):  # the validator refuses something
        validator.validate({name: value for name, value in events[0].items() if name != "actor"})


async def test_ranges_that_follow_on_one_another_miss_none_and_repeat_none(relay: Relay, long: bool) -> None:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        begun = datetime.now(UTC)
        for n in range(12):
            await client.connections.create_webhook(f"{n}", "http://127.0.0.1:9/")
            await asyncio.sleep(random.uniform(0, 0.2))
        await integrated(relay)
        span = datetime.now(UTC) - begun
        cuts = sorted(begun + span * random.random() for _ in range(20 if not long else 200))
        ends = [datetime.fromtimestamp(0, UTC), *cuts, datetime.now(UTC)]
        found: list[int] = []
        for start, end in pairwise(ends):
            events, last = lines_of(await exported(client, start_time=start, end_time=end))
            assert_proven(events, last)
            assert last["start_time"] == start.isoformat()
            found += [line["leaf_index"] for line in events]
    assert found == list(range(len(found)))
    assert len(found) >= 13


async def test_an_empty_range_is_an_export_and_one_that_can_not_be_is_refused(client: Any) -> None:
    now, hour = datetime.now(UTC), timedelta(hours=1)
    events, last = lines_of(await exported(client, start_time=now - 2 * hour, end_time=now - hour))
    assert (events, last["first"], last["end"]) == ([], 0, 0)
    assert_proven(events, last)
    for start, end, field in (
        (now, now - hour, "end_time"),
        (now, now, "end_time"),
        (now + hour, None, "start_time"),
        (None, now + hour, "end_time"),
    ):
        with pytest.raises(errors.InvalidRequest) as refusal:
            await exported(client, start_time=start, end_time=end)
        assert [name for name, _ in refusal.value.violations] == [field]


async def beyond_triggers(url: str, change: str, *arguments: Any) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute(change, *arguments)
    await connection.close()


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM audit_logs WHERE workspace_id = $1 AND action LIKE '%CreateConnection'",
        "DELETE FROM audit_values WHERE workspace_id = $1",
        "DELETE FROM audit_leaves WHERE workspace_id = $1 AND leaf_index = 2",
        "DELETE FROM audit_leaves WHERE workspace_id = $1 AND leaf_index > 3",
        "DELETE FROM audit_tiles WHERE workspace_id = $1",
        "INSERT INTO audit_logs SELECT relay_first_uuid7(created_at + interval '1 ms'), workspace_id, created_at,"
        " actor_type, action, action_type, provider, status, reason, scopes, request_id, trace_id, duration, count,"
        " commitments FROM audit_events WHERE workspace_id = $1 AND leaf_index = 2",
    ],
)
async def test_an_export_of_a_damaged_log_ends_with_an_error(databases: Databases, tmp_path: Path, change: str) -> None:
    async with (
        databases.new() as url,
        running(url, settings_for(tmp_path)) as relay,
        relay.connect(relay.tenant.admin) as client,
    ):
        for n in range(4):
            await client.connections.create_webhook(f"{n}", "http://127.0.0.1:9/")
        await integrated(relay)
        start = datetime.now(UTC)
        await asyncio.sleep(0.01)
        assert await exported(client)
        await beyond_triggers(url, change, relay.tenant.workspace_id)
        with pytest.raises(errors.RelayError) as damage:
            await exported(client, start_time=start if "tiles" in change else None)
        assert damage.value.reason == "LOG_DAMAGED"


async def test_an_erased_value_is_absent_and_the_rest_is_proven(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    await integrated(relay)
    erase = "UPDATE audit_values SET actor_name = NULL, salts = overlay(salts PLACING $2::bytea FROM 17)"
    await beyond_triggers(relay.url, f"{erase} WHERE workspace_id = $1", tenant.workspace_id, bytes(16))
    async with relay.connect(tenant.admin) as client:
        events, last = lines_of(await exported(client))
        assert_proven(events, last)
        gone = [line for line in events if "actor_name" in line["event"]["commitments"]]
        assert gone
        assert all("actor_name" not in {*line["values"], *line["salts"]} for line in gone[:2])
        assert "erased_fields" in (await exported(client, CSV)).decode().splitlines()[0]
        assert b"actor_name" in await exported(client, OCSF)


def test_every_action_has_its_activity() -> None:
    unknown = {method.name for method in methods().values() if export._activity(method.name) == export._OTHER}
    assert unknown == set()
    assert export._activity("delivery.attempt") == export._OTHER
