"""The README's commands on a fresh machine: a new clone, an empty HOME, as root and as an ordinary user.

What is cloned is the last commit.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.stack, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parent.parent.parent
DELIVERED = "First action delivered and verified"
NOBODY = 65534
FIRST_RUN_SECONDS = 180.0  # the promise of the README, installation included


class Machine:
    """A folder with a space in its name that holds a clone and an empty home."""

    def __init__(self, folder: Path, *, ordinary_user: bool) -> None:
        self.clone, self.home = folder / "a clone", folder / "home"
        self.as_user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"] if ordinary_user else []
        self.python = "/usr/bin/python3" if ordinary_user else sys.executable
        self.home.mkdir()
        subprocess.run(["git", "clone", "--quiet", ROOT, self.clone], check=True)
        if ordinary_user:
            for path in (self.home, self.clone, *self.clone.rglob("*")):
                os.chown(path, NOBODY, NOBODY, follow_symlinks=False)

    def command(self, *words: str) -> "subprocess.Popen[str]":
        env = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": "/tmp"}
        env |= {"RELAY_LISTEN": "127.0.0.1:0", "RELAY_HTTP_LISTEN": "127.0.0.1:0", "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            [*self.as_user, *words, f"PYTHON={self.python}"],
            cwd=self.clone,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self) -> tuple[float, str]:
        """`make run` until the first action is delivered, then Ctrl-C. Returns the seconds it took and what it said."""
        started, said, took = time.monotonic(), "", 0.0
        process = self.command("make", "run")
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if DELIVERED in line:
                took = time.monotonic() - started
            if "Ctrl-C stops everything" in line:
                os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to make and to Relay
        process.wait(60)
        assert took, said
        assert "Traceback" not in said, said
        assert not self.postgres()
        return took, said

    def postgres(self) -> list[psutil.Process]:
        found = psutil.process_iter(["name", "cmdline"])
        return [one for one in found if one.info["name"] == "postgres" and str(self.home) in str(one.info["cmdline"])]


@pytest.fixture(params=["as root", "as an ordinary user"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    folder = Path(f"/tmp/relay fresh {os.getpid()} {request.param}")
    folder.mkdir(mode=0o755)
    try:
        yield Machine(folder, ordinary_user=request.param != "as root")
    finally:
        shutil.rmtree(folder)


def test_make_run_does_the_main_job_and_finds_its_data_again(machine: Machine) -> None:
    first, said = machine.run()
    print(f"first run, with installation: {first:.1f} s")
    assert first < FIRST_RUN_SECONDS
    assert "shown this once" in said
    key = next(line.split()[-1] for line in said.splitlines() if line.strip().startswith("developer "))
    second, said = machine.run()
    print(f"second run: {second:.1f} s")
    assert key not in said
    assert key in (machine.home / ".local/share/relay/credentials.env").read_text()
    assert second < first / 3  # it installs nothing, and makes no cluster
