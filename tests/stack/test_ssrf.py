"""Nothing makes Relay reach an address that it must not, in a network where it could."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.actions.spellings import ADDRESSES, spellings
from tests.harness import Databases
from tests.processes import ROOT

pytestmark = [pytest.mark.stack, pytest.mark.long, pytest.mark.timeout(600)]
REFUSAL = "the destination is not one this server may reach"


async def test_no_spelling_no_name_and_no_redirect_reaches_a_sentinel(
    databases: Databases, tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    addresses, rounds = (len(ADDRESSES), 1336) if long else (6, 48)
    async with databases.new() as url:
        found = findings("tests.stack.ssrf", url, tmp_path, addresses, rounds)
    spelled = [len(spellings(address)) for address in ADDRESSES[:addresses]]
    assert min(spelled) >= 30
    assert found["tried"]["create"] == found["tried"]["update"] == sum(spelled)
    assert found["tried"]["send"] == sum(spelled) - addresses  # one of each has a NUL, which no database holds
    assert found["tried"]["rebinding"] + found["delivered"] == rounds
    assert found["delivered"] == rounds / 4  # the names that stay where they may
    assert found["refused"] == found["tried"]
    assert found["reached"] == 0
    assert found["reachable"] == 12  # the sentinels were there
    assert REFUSAL in found["words"]
    figure(
        f"{addresses} addresses in {min(spelled)} to {max(spelled)} spellings, at create, update and send:"
        f" {found['tried']['send'] + 2 * sum(spelled)} tries; {found['tried']['rebinding']} rebinding rounds,"
        f" {found['tried']['redirect']} redirects: sentinels accepted {found['reached']} connections"
    )


async def test_a_relay_without_its_guard_is_found_out(databases: Databases, tmp_path: Path) -> None:
    async with databases.new() as url:
        found = findings("tests.stack.unguarded", url, tmp_path, addresses=3, rounds=8)
    assert found["reached"] > 0
    assert all(found["refused"].get(what, 0) < tried for what, tried in found["tried"].items() if what != "redirect")


def findings(module: str, url: str, folder: Path, addresses: int, rounds: int) -> dict[str, Any]:
    """What the module prints, in namespaces of its own."""
    command = ["unshare", "--net", "--mount", sys.executable, "-m", module, url, folder, str(addresses), str(rounds)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found
