"""Proofs as the server gives them, checked with relay.proofs and against what the database holds."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from relay import errors
from relay.proofs import EMPTY_ROOT, canonical, commitment, leaf_hash, verify_consistency, verify_inclusion

from relay_grpc.audit.event import leaf_of
from tests.actions.caller import eventually
from tests.audit.log import integrated
from tests.harness import Databases, Receiver, Relay, Tenant, running, settings_for


async def beyond_triggers(relay: Relay, change: str, *arguments: Any) -> None:
    """A change as a superuser could make it."""
    connection = await asyncpg.connect(relay.url)
    await connection.execute("SET session_replication_role = replica")
    await connection.execute(change, *arguments)
    await connection.close()


@dataclass
class Logged:
    """A workspace with some events that are in its log. sizes: of its checkpoints, rising; roots: theirs."""

    tenant: Tenant
    client: Any
    rows: list[Any]
    roots: dict[int, bytes]

    @property
    def sizes(self) -> list[int]:
        return sorted(self.roots)


@pytest.fixture(scope="module")
async def logged(relay: Relay) -> AsyncIterator[Logged]:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        for batch in range(4):
            for n in range(batch + 1):
                await client.connections.create_webhook(f"{batch}-{n}", "http://127.0.0.1:9/")
            await integrated(relay)
        rows = await relay.sql(
            "SELECT * FROM audit_events WHERE workspace_id = $1 ORDER BY leaf_index", tenant.workspace_id
        )
        checkpoints = await relay.sql(
            "SELECT tree_size, root_hash FROM audit_checkpoints WHERE workspace_id = $1", tenant.workspace_id
        )
        yield Logged(tenant, client, rows, dict(map(tuple, checkpoints)))


async def test_the_newest_checkpoint_is_told_with_the_keys_that_signed_it(logged: Logged) -> None:
    checkpoint = await logged.client.audit.get_checkpoint()
    origin, size, _ = checkpoint.note.split("\n")[:3]
    assert origin == f"relay/workspaces/{logged.tenant.workspace_id}"
    assert int(size) == checkpoint.tree_size == logged.sizes[-1]
    (key,) = checkpoint.verifier_keys
    assert f"\N{EM DASH} {key.split('+')[0]} " in checkpoint.note


async def test_every_event_is_proven_in_every_checkpoint_that_has_it(logged: Logged) -> None:
    for row in logged.rows:
        for size in [0, *(size for size in logged.sizes if size > row["leaf_index"])]:
            proof = await logged.client.audit.get_inclusion_proof(str(row["id"]), tree_size=size)
            assert proof.leaf == canonical(leaf_of(row))
            assert proof.checkpoint.tree_size == size or size == 0
            root = logged.roots[proof.checkpoint.tree_size]
            verify_inclusion(
                proof.leaf_index, proof.checkpoint.tree_size, leaf_hash(proof.leaf), list(proof.hashes), root
            )
        commitments = leaf_of(row)["commitments"]
        assert proof.salts.keys() == commitments.keys()
        for name, salt in proof.salts.items():
            value = row[{"parameters_hash": "params_hash", "parameters_prefix": "params_prefix"}.get(name, name)]
            assert commitment(bytes.fromhex(salt), value).hex() == commitments[name]


async def test_a_log_is_a_prefix_of_every_later_one(logged: Logged) -> None:
    for first in (0, *logged.sizes):
        for second in (0, *(size for size in logged.sizes if size >= first)):
            proof = await logged.client.audit.get_consistency_proof(first, second_tree_size=second)
            size, path = proof.checkpoint.tree_size, list(proof.hashes)
            root = logged.roots[first] if first else EMPTY_ROOT
            verify_consistency(first, size, root, logged.roots[size], path)


async def test_sizes_that_can_not_be_are_refused_by_their_field(logged: Logged) -> None:
    audit, newest = logged.client.audit, logged.sizes[-1]
    last = str(logged.rows[-1]["id"])
    unsigned = next(size for size in range(1, newest + 2) if size not in logged.roots)
    for calling, field in (
        (audit.get_inclusion_proof(last, tree_size=newest + 1), "tree_size"),
        (audit.get_inclusion_proof(last, tree_size=logged.sizes[0]), "tree_size"),
        (audit.get_inclusion_proof(str(logged.rows[0]["id"]), tree_size=unsigned), "tree_size"),
        (audit.get_consistency_proof(newest + 1), "first_tree_size"),
        (audit.get_consistency_proof(newest, second_tree_size=logged.sizes[0]), "first_tree_size"),
        (audit.get_consistency_proof(1, second_tree_size=newest + 1), "second_tree_size"),
    ):
        with pytest.raises(errors.InvalidRequest) as refusal:
            await calling
        assert [name for name, _ in refusal.value.violations] == [field]


async def test_what_is_not_there_is_not_found(relay: Relay, logged: Logged) -> None:
    stranger = await relay.new_tenant()
    async with relay.connect(stranger.admin) as other:
        for id_ in (str(uuid4()), str(logged.rows[0]["id"])):
            with pytest.raises(errors.NotFound):
                await other.audit.get_inclusion_proof(id_)
            with pytest.raises(errors.NotFound):
                await other.audit.get_event(id_)


async def test_a_get_tells_what_the_list_tells(logged: Logged) -> None:
    listed = [event async for event in logged.client.audit.list_events()]
    assert {event.leaf_index for event in listed if event.HasField("leaf_index")} >= set(range(logged.sizes[-1]))
    for event in listed[-3:]:
        assert await logged.client.audit.get_event(event.id) == event


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit_logs SET reason = 'another' WHERE workspace_id = $1",
        "UPDATE audit_tiles SET hashes = substr(hashes, 33) || sha256('') WHERE workspace_id = $1",
    ],
)
async def test_a_damaged_log_is_told(databases: Databases, tmp_path: Path, change: str) -> None:
    async with (
        databases.new() as url,
        running(url, settings_for(tmp_path)) as relay,
        relay.connect(relay.tenant.admin) as client,
    ):
        await integrated(relay)
        (*_, first) = [event async for event in client.audit.list_events()]
        assert (await client.audit.get_inclusion_proof(first.id)).leaf
        await beyond_triggers(relay, change, relay.tenant.workspace_id)
        with pytest.raises(errors.RelayError) as damage:
            await client.audit.get_inclusion_proof(first.id)
    assert damage.value.reason == "LOG_DAMAGED"


async def test_an_execution_tells_where_its_events_stand(relay: Relay, receiver: Receiver) -> None:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        await client.connections.create_webhook("target", receiver.url, default=True)
        preview = await client.actions.preview("webhook.send", {"payload": {}})
        executed = await client.actions.execute(preview)
        await client.actions.resend_execution(executed.id)
        assert not executed.events
        await integrated(relay)

        async def told() -> Any:
            execution = await client.actions.get_execution(executed.id)
            return execution if len(execution.events) >= 5 and execution.events[-1].HasField("leaf_index") else None

        execution = await eventually(told)
        listed = {event.id: event async for event in client.audit.list_events()}
    assert sorted(event.action for event in execution.events) == [
        "ActionsService.Execute",
        "ActionsService.Preview",
        "ActionsService.ResendExecution",
        "delivery.attempt",
        "delivery.attempt",
    ]
    assert [event.event_id for event in execution.events] == sorted(event.event_id for event in execution.events)
    for event in execution.events:
        assert (event.action, event.leaf_index) == (listed[event.event_id].action, listed[event.event_id].leaf_index)
        assert listed[event.event_id].target in (f"executions/{execution.id}", f"previews/{preview.id}")
