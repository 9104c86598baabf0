"""Checkpoints outside the database, and what they are for: a log that lost its end, or an old backup, is noticed."""

import asyncio
import logging
import os
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_network
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest
from aiohttp import web

from relay_grpc.actions.destinations import EgressPolicy
from relay_grpc.actions.egress import Egress
from relay_grpc.app import serving
from relay_grpc.audit import checkpoint_places, publisher
from relay_grpc.audit.checkpoint_places import Folder, Receiver
from relay_grpc.audit.publisher import Publisher
from relay_grpc.audit.upkeep import Upkeep
from tests.actions.caller import eventually, held
from tests.audit.sequencing import Logs, logs_of
from tests.harness import Databases, Relay, settings_for
from tests.harness import Receiver as HttpServer

CUT = (  # what a log of 300 events was when it had 280
    "DELETE FROM audit_leaves WHERE workspace_id = '{0}' AND leaf_index >= 280",
    "DELETE FROM audit_checkpoints WHERE workspace_id = '{0}' AND tree_size > 280",
    "UPDATE audit_tiles SET hashes = substr(hashes, 1, 32 * 24) WHERE workspace_id = '{0}' AND level = 0 AND index = 1",
)


@pytest.fixture
async def logs(databases: Databases) -> AsyncIterator[Logs]:
    async with databases.new() as url, logs_of(url) as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outside" / "checkpoints"


def into(folder: Path, logs: Logs) -> Publisher:
    return Publisher(logs.db, logs.signer, Folder(folder), logs.metrics)


async def newest(logs: Logs, workspace_id: UUID) -> str:
    note: str = await logs.sql.fetchval(
        "SELECT note FROM audit_checkpoints WHERE workspace_id = $1 ORDER BY tree_size DESC LIMIT 1", workspace_id
    )
    return note


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.ERROR]


async def test_a_folder_has_the_newest_checkpoint_of_every_log(logs: Logs, folder: Path) -> None:
    ids = [await logs.new(count) for count in (1, 300, 5)]
    publishing = into(folder, logs)
    for _ in range(3):
        await publishing.publish()
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            str(id_): await newest(logs, id_) for id_ in ids
        }
        await logs.write(ids[1], 250)
        await logs.integrate()
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert logs.sample("relay_audit_contradicted_logs") == 0
    assert logs.sample("relay_audit_publish_failures_total") == 0


async def test_a_running_server_publishes_by_itself(relay: Relay) -> None:
    async with relay.connect(relay.tenant.admin) as client:
        await client.auth.create_api_key("another", "viewer")
    path = relay.settings.data_dir / "checkpoints" / str(relay.tenant.workspace_id)

    async def is_there() -> bool:
        rows = await relay.sql(
            "SELECT note FROM audit_checkpoints WHERE workspace_id = $1 ORDER BY tree_size DESC LIMIT 1",
            relay.tenant.workspace_id,
        )
        return path.exists() and path.read_text() == rows[0]["note"]

    await eventually(is_there)
    assert relay.app.metrics.registry.get_sample_value("relay_audit_unpublished_seconds") is not None


async def test_a_cut_of_the_end_is_noticed_though_the_database_agrees_with_itself(
    logs: Logs, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cut, other = await logs.new(280), await logs.new(1)
    await logs.write(cut, 20)
    await logs.integrate()
    publishing = into(folder, logs)
    await publishing.publish()
    published = (folder / str(cut)).read_text()
    await logs.tamper(*(statement.format(cut) for statement in CUT))
    for added in (0, 5, 40):  # it goes on behind the cut, beyond what it was
        await logs.write(cut, added)
        await logs.write(other)
        await logs.integrate()
        for each in (publishing, into(folder, logs)):  # and one that starts now
            await each.publish()
        assert (folder / str(cut)).read_text() == published
        assert (folder / str(other)).read_text() == await newest(logs, other)
        assert logs.sample("relay_audit_contradicted_logs") == 1
    assert await logs.size(cut) == 325
    said = errors_in(caplog)
    assert all(str(cut) in text and "does not continue the checkpoint" in text for text in said)
    assert ["it had 300 events, and has fewer" in text for text in said[:2]] == [True, True]
    assert len(said) <= 5, "not again each time"


async def test_a_restored_backup_is_noticed(
    logs: Logs, folder: Path, databases: Databases, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [await logs.new(3) for _ in range(2)]
    backup = f"backup_{ids[0].hex}"
    async with databases.new() as elsewhere:
        admin = await asyncpg.connect(elsewhere)
        database = await logs.sql.fetchval("SELECT current_database()")
        await logs.sql.close()
        await logs.db.close()
        await admin.execute(f"CREATE DATABASE {backup} TEMPLATE {database}")
        try:
            async with logs_of(logs.url) as later:
                for id_ in ids:
                    await later.write(id_, 2)
                await later.integrate()
                await into(folder, later).publish()
                published = {path.name: path.read_text() for path in folder.iterdir()}
                logs.sql, logs.db = await asyncpg.connect(logs.url), later.db
            async with logs_of(logs.url.replace(database, backup)) as restored:
                publishing = into(folder, restored)
                for _ in range(2):
                    await publishing.publish()
                    assert restored.sample("relay_audit_contradicted_logs") == 2
                    for id_ in ids:
                        await restored.write(id_, 10)
                    await restored.integrate()
            assert {path.name: path.read_text() for path in folder.iterdir()} == published
            async with logs_of(logs.url) as right:
                await into(folder, right).publish()
                assert right.sample("relay_audit_contradicted_logs") == 0
        finally:
            await admin.execute(f"DROP DATABASE {backup} WITH (FORCE)")
            await admin.close()
    assert len(errors_in(caplog)) == 4


async def test_a_log_that_is_empty_again_or_written_anew_is_noticed(
    logs: Logs, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    emptied, anew, unsigned = [await logs.new(4) for _ in range(3)]
    publishing = into(folder, logs)
    await publishing.publish()
    published = {path.name: path.read_text() for path in folder.iterdir()}
    for table in ("audit_leaves", "audit_checkpoints", "audit_tiles"):
        await logs.tamper(f"DELETE FROM {table} WHERE workspace_id IN ('{emptied}', '{anew}')")
    await logs.write(anew, 4)
    await logs.integrate()
    await logs.tamper(f"UPDATE audit_checkpoints SET tree_size = 5 WHERE workspace_id = '{unsigned}'")
    for each in (publishing, into(folder, logs)):
        await each.publish()
    assert {path.name: path.read_text() for path in folder.iterdir()} == published
    assert logs.sample("relay_audit_contradicted_logs") == 3
    said = errors_in(caplog)
    for id_ in (emptied, anew, unsigned):
        assert [text for text in said if str(id_) in text]


async def test_what_nobody_here_signed_is_not_published(logs: Logs, folder: Path) -> None:
    forged = await logs.new(2)
    await logs.tamper(
        f"UPDATE audit_checkpoints SET note = replace(note, 'test', 'tset') WHERE workspace_id = '{forged}'"
    )
    await into(folder, logs).publish()
    assert not folder.exists()
    assert logs.sample("relay_audit_contradicted_logs") == 1


async def test_a_damaged_file_is_left_and_told_until_somebody_moves_it(
    logs: Logs, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damaged, other = await logs.new(1), await logs.new(1)
    publishing = into(folder, logs)
    await publishing.publish()
    (folder / str(damaged)).write_bytes(b"\xff garbage")
    (folder / "README").write_text("ours")
    for _ in range(2):
        for id_ in (damaged, other):
            await logs.write(id_)
        await logs.integrate()
        await publishing.publish()
        assert (folder / str(damaged)).read_bytes() == b"\xff garbage"
        assert (folder / str(other)).read_text() == await newest(logs, other)
    [said] = errors_in(caplog)
    assert f"{folder / str(damaged)} is damaged" in said
    assert logs.sample("relay_audit_publish_failures_total") == 2
    (folder / str(damaged)).rename(folder / "damaged")
    await publishing.publish()
    assert (folder / str(damaged)).read_text() == await newest(logs, damaged)
    assert logs.sample("relay_audit_unpublished_seconds") < 5


@contextmanager
def a_full_disk() -> Iterator[None]:
    """No file of this process can become larger than ten bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_leaves_the_older_checkpoint_as_it_was(
    logs: Logs, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    id_ = await logs.new(1)
    publishing = into(folder, logs)
    await publishing.publish()
    before = await newest(logs, id_)
    await logs.write(id_)
    await logs.integrate()
    with a_full_disk():
        for _ in range(2):
            await publishing.publish()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {str(id_): before}
    assert [f"can't use {folder}: File too large" in text for text in errors_in(caplog)] == [True]
    await publishing.publish()
    assert (folder / str(id_)).read_text() == await newest(logs, id_)


async def test_a_folder_that_cant_be_one_is_told_once(
    logs: Logs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for number, place in enumerate((tmp_path / "file", tmp_path / "file" / "below"), 1):
        await logs.new(1)
        publishing = into(place, logs)
        for _ in range(3):
            await publishing.publish()
        said = errors_in(caplog)
        assert f"can't use {place}: Not a directory" in said[-1]
        assert len(said) <= 2 * number


@pytest.fixture
async def egress() -> AsyncIterator[Egress]:
    made = Egress(EgressPolicy(True, https_only=False, allow=(ip_network("127.0.0.0/8"),)))
    yield made
    await made.close()


async def test_a_server_takes_them_by_post_and_again_what_failed(
    logs: Logs, receiver: HttpServer, egress: Egress, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [await logs.new(2) for _ in range(10)]
    publishing = Publisher(logs.db, logs.signer, Receiver(f"{receiver.url}?token=hidden", egress), logs.metrics)

    async def refuse(_request: web.Request) -> web.Response:
        return web.Response(status=503)

    receiver.answer = refuse
    await publishing.publish()
    assert logs.sample("relay_audit_publish_failures_total") == len(receiver.requests) == publisher.TOGETHER
    receiver.requests.clear()
    receiver.answer = None
    for _ in range(2):
        await publishing.publish()
    assert sorted(body.decode() for _, body in receiver.requests) == sorted([await newest(logs, id_) for id_ in ids])
    assert {headers["content-type"] for headers, _ in receiver.requests} == {"text/plain; charset=utf-8"}
    receiver.requests.clear()
    await logs.write(ids[3])
    await logs.integrate()
    await publishing.publish()
    assert [body.decode() for _, body in receiver.requests] == [await newest(logs, ids[3])]
    said = errors_in(caplog)
    assert all("RELAY_AUDIT_CHECKPOINTS answered 503" in text for text in said)
    assert "hidden" not in caplog.text


async def test_logs_in_trouble_keep_no_other_from_its_turn(logs: Logs, receiver: HttpServer, egress: Egress) -> None:
    """A receiver refuses for ever what does not continue what it has, of more logs than are published at one time."""
    refused = {await logs.new(1) for _ in range(2 * publisher.TOGETHER)}
    publishing = Publisher(logs.db, logs.signer, Receiver(receiver.url, egress), logs.metrics)

    async def refuse(request: web.Request) -> web.Response:
        body = await request.text()
        return web.Response(status=409 if any(f"/{id_}\n" in body for id_ in refused) else 200)

    receiver.answer = refuse
    await publishing.publish()
    healthy = [await logs.new(1) for _ in range(5)]
    receiver.requests.clear()
    for _ in range(3):
        await publishing.publish()
    bodies = [body.decode() for _, body in receiver.requests]
    assert [bodies.count(await newest(logs, id_)) for id_ in healthy] == [1] * 5
    recovered = refused.pop()
    for _ in range(3):  # whichever it is, its turn comes
        await publishing.publish()
    receiver.requests.clear()
    refused.add(recovered)
    for _ in range(3):
        await publishing.publish()
    assert await newest(logs, recovered) not in [body.decode() for _, body in receiver.requests]


async def test_a_folder_that_hangs_holds_nothing_else_up(logs: Logs, folder: Path) -> None:
    """As one on another machine does whose network is gone: more of its files than this process has threads."""
    folder.mkdir(parents=True)
    paths = [folder / str(await logs.new(1)) for _ in range(publisher.TOGETHER)]
    for path in paths:
        os.mkfifo(path)
    hanging = asyncio.create_task(into(folder, logs).publish())
    try:
        await asyncio.sleep(0.3)
        async with asyncio.timeout(5):
            await logs.new(3)
            await asyncio.to_thread(time.sleep, 0)
        assert not hanging.done()
    finally:
        while not hanging.done():
            for path in paths:
                with suppress(OSError):  # nobody reads it
                    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            await asyncio.sleep(0.01)
    assert logs.sample("relay_audit_publish_failures_total") == publisher.TOGETHER


async def test_a_server_that_hangs_or_is_gone_holds_nothing_up(
    logs: Logs, receiver: HttpServer, egress: Egress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_places, "PUSH_SECONDS", 0.3)
    ids = [await logs.new(1) for _ in range(30)]
    release = held(receiver)
    publishing = Publisher(logs.db, logs.signer, Receiver(receiver.url, egress), logs.metrics)
    async with asyncio.timeout(5):
        pushed = asyncio.create_task(publishing.publish())
        await eventually(lambda: len(receiver.requests) == publisher.TOGETHER)
        await logs.write(ids[0])
        await logs.integrate()  # meanwhile
        await pushed
    release.set()
    gone = Publisher(logs.db, logs.signer, Receiver("http://127.0.0.1:9/", egress), logs.metrics)
    async with asyncio.timeout(5):
        await gone.publish()
    assert logs.sample("relay_audit_publish_failures_total") == 2 * publisher.TOGETHER
    await publishing.publish()
    assert logs.sample("relay_audit_contradicted_logs") == 0


async def test_what_a_server_was_sent_has_to_be_continued(logs: Logs, receiver: HttpServer, egress: Egress) -> None:
    cut = await logs.new(280)
    await logs.write(cut, 20)
    await logs.integrate()
    publishing = Publisher(logs.db, logs.signer, Receiver(receiver.url, egress), logs.metrics)
    await publishing.publish()
    await logs.tamper(*(statement.format(cut) for statement in CUT))
    await publishing.publish()
    assert len(receiver.requests) == 1
    assert logs.sample("relay_audit_contradicted_logs") == 1


async def test_a_start_without_a_place_says_what_is_missing(
    databases: Databases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_for(tmp_path).model_copy(update={"audit_checkpoints": None})
    async with databases.new() as url, serving(settings, url):
        pass
    assert "RELAY_AUDIT_CHECKPOINTS is not set" in caplog.text


async def test_missing_months_are_made_and_what_default_took_is_moved(logs: Logs) -> None:
    tables = "SELECT count(*) FROM pg_class WHERE relname ~ '^audit_(logs|values|leaves)_20\\d\\d_\\d\\d$'"
    before = await logs.sql.fetchval(tables)
    month = await logs.sql.fetchval("SELECT to_char(now() AT TIME ZONE 'UTC', '_YYYY_MM')")
    for table in ("audit_logs", "audit_values", "audit_leaves"):
        await logs.sql.execute(f"DROP TABLE {table}{month}")
    id_ = await logs.new(20)
    assert await logs.sql.fetchval("SELECT count(*) FROM audit_logs_default") == 20
    await Upkeep(logs.db, logs.signer, None, logs.metrics).make_partitions()
    assert await logs.sql.fetchval(tables) == before
    assert await logs.sql.fetchval(f"SELECT count(*) FROM audit_logs{month}") == 20
    assert logs.sample("relay_audit_default_events") == 0
    await logs.write(id_)
    await logs.integrate()
    assert await logs.size(id_) == 21


async def test_months_that_cant_be_made_are_a_warning(logs: Logs, caplog: pytest.LogCaptureFixture) -> None:
    month = await logs.sql.fetchval("SELECT to_char(now() AT TIME ZONE 'UTC' + interval '2 months', '_YYYY_MM')")
    await logs.sql.execute(f"DROP TABLE audit_values{month}")
    other = await asyncpg.connect(logs.url)
    async with other.transaction():
        await other.execute("LOCK TABLE audit_values IN ACCESS EXCLUSIVE MODE")
        async with asyncio.timeout(5):
            await Upkeep(logs.db, logs.signer, None, logs.metrics).make_partitions()
    await other.close()
    assert logs.sample("relay_audit_partition_failures_total") == 1
    assert "can't be made" in caplog.text
    await Upkeep(logs.db, logs.signer, None, logs.metrics).make_partitions()
    assert logs.sample("relay_audit_partition_failures_total") == 1
    assert await logs.sql.fetchval("SELECT to_regclass($1) IS NOT NULL", f"audit_values{month}")
