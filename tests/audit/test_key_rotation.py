"""Keys that sign checkpoints are changed while logs go on, those where nothing happens among them."""

import asyncio
import base64
from pathlib import Path
from typing import Any

from relay.proofs import VerifierKey, open_checkpoint

from relay_grpc.audit import tree_store, upkeep
from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.upkeep import Upkeep
from tests.actions.caller import eventually
from tests.audit.sequencing import KEYS, assert_sound, logs_of
from tests.harness import Databases, Relay, running, settings_for

OLD, NEW = b"o" * 32, b"n" * 32


def written(**keys: bytes) -> str:
    return ",".join(f"{name}:{base64.b64encode(key).decode()}" for name, key in keys.items())


async def newest_notes(relay: Relay) -> dict[str, str]:
    rows = await relay.sql(
        "SELECT DISTINCT ON (workspace_id) workspace_id, note FROM audit_checkpoints "
        "ORDER BY workspace_id, tree_size DESC"
    )
    return {str(row["workspace_id"]): row["note"] for row in rows}


async def test_an_old_key_can_go_once_every_log_was_signed_by_the_new_one(databases: Databases, tmp_path: Path) -> None:
    old, new = (VerifierKey.parse(Signer({name: key}).verifier_keys[0]) for name, key in (("old", OLD), ("new", NEW)))
    async with databases.new() as url:

        async def changes(relay: Relay) -> int:
            rows = await relay.sql("SELECT FROM audit_logs WHERE action = 'audit.keys_changed'")
            return len(rows)

        async with running(url, settings_for(tmp_path, RELAY_AUDIT_KEYS=written(old=OLD))) as relay:
            quiet = str((await relay.new_tenant()).workspace_id)

            async def begun() -> bool:
                return quiet in await newest_notes(relay)

            await eventually(begun)
            assert not await changes(relay)
        async with running(url, settings_for(tmp_path, RELAY_AUDIT_KEYS=written(new=NEW, old=OLD))) as relay:

            async def signed_by_both() -> bool:
                return all("— new " in note and "— old " in note for note in (await newest_notes(relay)).values())

            await eventually(signed_by_both)
            for workspace_id, note in (await newest_notes(relay)).items():
                for key in (old, new):
                    assert open_checkpoint(note, [key]).origin == f"relay/workspaces/{workspace_id}"
            assert 1 <= await changes(relay) <= len(await newest_notes(relay))
        async with running(url, settings_for(tmp_path, RELAY_AUDIT_KEYS=written(new=NEW))) as relay:
            before = await newest_notes(relay)
            await relay.sql(
                "INSERT INTO audit_logs SELECT (relay_first_uuid7(now())), workspace_id, now(), actor_type, action, "
                "action_type, provider, status, reason, scopes, request_id, trace_id, duration, count, commitments "
                "FROM audit_logs WHERE workspace_id = $1 LIMIT 1",
                quiet,
            )

            async def grown() -> bool:
                return (await newest_notes(relay))[quiet] != before[quiet]

            await eventually(grown)
            assert not relay.app.metrics.registry.get_sample_value("relay_audit_damaged_logs")


async def test_a_key_that_is_changed_under_its_name_is_another(databases: Databases) -> None:
    async with databases.new() as url, logs_of(url) as logs:
        for _ in range(3):
            await logs.new(1)
        [name] = KEYS
        lost = [VerifierKey.parse(key) for key in logs.signer.verifier_keys]
        logs.signer = Signer({name: NEW}, lost)
        logs.sequencer = logs.another()
        for expected in (3, 3):
            await Upkeep(logs.db, logs.signer, None, logs.metrics).change_keys()
            assert await logs.sql.fetchval("SELECT count(*) FROM audit_pending") == expected
        await logs.integrate()
        await Upkeep(logs.db, logs.signer, None, logs.metrics).change_keys()
        assert await assert_sound(logs.sql) == 6
        assert logs.signer.all_stand_on(
            await logs.sql.fetchval("SELECT note FROM audit_checkpoints WHERE tree_size = 2")
        )


async def test_the_change_waits_for_a_sequencer_that_is_at_work(databases: Databases, monkeypatch: Any) -> None:
    monkeypatch.setattr(upkeep, "BATCH", 2)
    async with databases.new() as url, logs_of(url) as logs:
        for _ in range(5):
            await logs.new(1)
        transaction = logs.sql.transaction()
        await transaction.start()
        assert await tree_store.become_sequencer(logs.sql)
        changing = asyncio.create_task(Upkeep(logs.db, Signer({"new": NEW}), None, logs.metrics).change_keys())
        await asyncio.sleep(0.2)
        await transaction.rollback()
        await changing
        assert await logs.sql.fetchval("SELECT count(DISTINCT workspace_id) FROM audit_pending") == 5


async def test_a_log_goes_on_after_its_key_was_lost_where_the_public_half_is_known(
    databases: Databases, tmp_path: Path
) -> None:
    public = Signer({"old": OLD}).verifier_keys[0]
    async with databases.new() as url:
        async with running(url, settings_for(tmp_path, RELAY_AUDIT_KEYS=written(old=OLD))) as relay:

            async def begun() -> bool:
                return bool(await newest_notes(relay))

            await eventually(begun)
        before = await newest_notes(relay)

        async def grown() -> bool:
            return all("— new " in note for note in (await newest_notes(relay)).values())

        async with running(url, settings_for(tmp_path, RELAY_AUDIT_KEYS=written(new=NEW))) as relay:

            async def refused() -> bool:
                return bool(relay.app.metrics.registry.get_sample_value("relay_audit_damaged_logs"))

            await eventually(refused)
            assert await newest_notes(relay) == before
        known = {"RELAY_AUDIT_KEYS": written(new=NEW), "RELAY_AUDIT_OLD_KEYS": public}
        async with running(url, settings_for(tmp_path, **known)) as relay:
            await eventually(grown)
