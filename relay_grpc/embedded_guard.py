"""The parent process of the embedded PostgreSQL: a program of its own that embedded.py runs in the data folder.

usage: python -I -S embedded_guard.py LOCK_FD PROGRAMS SOCKETS durable|fast

Standard input is a pipe whose other end only the owner holds. It ends however the owner ends, kill -9 included, and the
server then gets SIGINT, PostgreSQL's fast shutdown. A pipe is the same on Linux and macOS; a parent-death signal is
Linux only, and fires when the thread that forked ends.

LOCK_FD is the locked server.lock. Every process from here on inherits it, so the lock lasts until all of them are gone.
Complaints go to standard error, which is server.log: embedded.py quotes the last one.
"""
# ruff: noqa: S603 # the programs are the wheel's

import ctypes
import os
import pwd
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator

# The caller's PG*, LD_* and locale variables stay out of PostgreSQL. On macOS it needs a valid LC_ALL to start.
ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}
FAST = ("--fsync=off", "--synchronous_commit=off", "--full_page_writes=off")
CLONE_NEWUSER = 0x10000000  # <linux/sched.h>; os.unshare came with Python 3.12


def main(lock: int, programs: str, sockets: str, mode: str) -> int:
    os.write(lock, b"%d\n" % os.getpid())
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # only the owner's end counts; PostgreSQL does not inherit a handler
    if os.geteuid() == 0:
        leave_root(programs, sockets)
    durability = () if mode == "durable" else FAST
    if not os.path.exists("data"):
        create_cluster(programs, durability)
    settings = (
        "--port=5432",
        "--listen_addresses=",
        f"--unix_socket_directories={sockets}",
        "--unix_socket_permissions=0700",
        "--log_min_messages=log",  # a statement's errors are its sender's, and quote data
        "--log_checkpoints=off",
        *durability,
    )
    command = [f"{programs}/postgres", "-D", os.path.abspath("data"), *settings]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=ENVIRONMENT, close_fds=False)
    threading.Thread(target=stop_with_owner, args=(server,), daemon=True).start()
    return server.wait()


def stop_with_owner(server: subprocess.Popen[bytes]) -> None:
    os.read(0, 1)
    server.send_signal(signal.SIGINT)


def create_cluster(programs: str, durability: tuple[str, ...]) -> None:
    """Makes the cluster under another name first: `data` is whole or not there, wherever a kill -9 hits.

    Whoever reaches the socket is trusted: its 0700 directory is the only way in.
    """
    locale = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
    sync = ("--no-sync",) if durability else ()
    run(f"{programs}/initdb", "-D", "data.new", "--username=relay", "--auth=trust", "--no-instructions", *locale, *sync)
    single = (f"{programs}/postgres", "--single", "-D", "data.new", "--exit_on_error=on", *durability, "postgres")
    run(*single, stdin="CREATE DATABASE relay STRATEGY file_copy")
    os.rename("data.new", "data")
    if not durability:
        folder = os.open(".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def run(*command: str, stdin: str = "") -> None:
    output = subprocess.DEVNULL
    subprocess.run(command, input=stdin, stdout=output, env=ENVIRONMENT, close_fds=False, check=True, text=True)


def leave_root(programs: str, sockets: str) -> None:
    """PostgreSQL refuses to run as root.

    In a user namespace root can carry the name nobody, and every file stays as it is. Where namespaces are blocked, as
    by Docker's seccomp profile, the data folder is given to nobody. A folder that is not root's is served as its owner.
    """
    owner = os.stat(".").st_uid
    account = pwd.getpwuid(owner) if owner else pwd.getpwnam("nobody")
    try:
        if owner == 0 and can_enter_namespace(account.pw_uid):
            enter_namespace(account.pw_uid)
        else:
            switch_to(account, (sockets,) if owner else (sockets, *everything()))
    except PermissionError:
        sys.exit(
            "error: PostgreSQL can't run as root, and neither a user namespace nor a switch to the user "
            f"{account.pw_name} is allowed here: run Relay as an ordinary user"
        )
    for path in (os.getcwd(), sockets, f"{programs}/postgres"):
        if not os.access(path, os.X_OK):
            sys.exit(
                f"error: PostgreSQL runs as the user {account.pw_name}, who can't reach {path}: "
                "move it to where that user can, or run Relay as an ordinary user"
            )


def everything() -> Iterator[str]:
    """The data folder's content and at last itself: until then the folder still counts as root's."""
    for folder, _, files in os.walk(".", topdown=False):
        yield from (os.path.join(folder, name) for name in files)
        yield folder


def switch_to(account: pwd.struct_passwd, paths: Iterable[str]) -> None:
    for path in paths:
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
    os.setgroups([])
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)


def can_enter_namespace(uid: int) -> bool:
    """Tries it in a child: a process whose mapping is refused can't leave the namespace again."""
    child = os.fork()
    if child == 0:
        try:
            enter_namespace(uid)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def enter_namespace(uid: int) -> None:
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER) != 0:
        raise PermissionError("user namespaces are blocked")
    with open("/proc/self/uid_map", "w") as uid_map:
        uid_map.write(f"{uid} 0 1")


if __name__ == "__main__":
    try:
        sys.exit(main(int(sys.argv[1]), *sys.argv[2:]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)  # it has said why
    except (OSError, KeyError) as error:
        sys.exit(f"error: {error}")
