"""The oldest PostgreSQL that Relay supports, Debian's 15, by URL and over TCP with a password."""

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
from relay.v1 import actions_pb2

from relay_grpc.schema import migrate
from tests.harness import receiving, running, settings_for

pytestmark = pytest.mark.stack
PROGRAMS = Path("/usr/lib/postgresql/15/bin")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("postgres15")
    for parent in (folder, *folder.parents):
        if (
            parent.stat().st_uid == os.getuid()
            and not parent.stat().st_mode & 0o001
            and str(parent).startswith("/tmp/")
        ):
            parent.chmod(0o711)
    as_user: list[str] = []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        as_user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        os.chown(folder, 65534, 65534)
    password = folder / "password"
    password.write_text("s3cret")
    password.chmod(0o644)
    data, port = folder / "data", 15432 + os.getpid() % 10000
    initdb = [*as_user, PROGRAMS / "initdb", "-D", data, "-U", "root", "-A", "scram-sha-256", f"--pwfile={password}"]
    subprocess.run([*initdb, "--no-sync"], check=True, capture_output=True, cwd=folder)
    options = ["-c", f"port={port}", "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*as_user, PROGRAMS / "postgres", "-D", data, *options], stderr=log, cwd=folder)
    try:
        yield f"postgresql://root:s3cret@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait(30)


async def wait_until_ready(url: str) -> None:
    for _ in range(200):
        try:
            connection = await asyncpg.connect(url)
        except (OSError, asyncpg.PostgresError):
            await asyncio.sleep(0.1)
            continue
        await connection.close()
        return
    raise TimeoutError(url)


async def test_the_main_job(url: str, tmp_path: Path) -> None:
    await wait_until_ready(url)
    await asyncio.to_thread(migrate, url)
    async with (
        running(url, settings_for(tmp_path / "data")) as relay,
        receiving() as receiver,
        relay.connect(relay.tenant.admin) as client,
    ):
        connection = await client.connections.create_webhook("out", receiver.url, default=True)
        for number in range(5):
            preview = await client.actions.preview("webhook.send", {"payload": {"number": number}})
            execution = await client.actions.execute(preview)
            assert execution.state == actions_pb2.EXECUTION_STATE_SUCCESS
        receiver.verify(connection.signing_secret)
        assert len([event async for event in client.audit.list_events(action="delivery.attempt")]) == 5
