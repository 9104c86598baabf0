"""`relay audit` as an auditor meets it: what is exported is verified, here and where nothing of the server is."""

import asyncio
import base64
import csv
import json
import shutil
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cryptography
import pytest
from relay import proofs
from relay.proofs import VerifierKey, open_checkpoint, verify_event

from tests.audit.exports import SIGNER, Log, changed
from tests.audit.log import integrated
from tests.harness import Relay, Tenant
from tests.ops.test_cli import Ended, Shell


@pytest.fixture
async def tenant(relay: Relay) -> Tenant:
    """One whose log has some events."""
    made = await relay.new_tenant()
    async with relay.connect(made.admin) as client:
        for number in range(6):
            await client.auth.create_api_key(f"key {number}", "viewer")
    await integrated(relay)
    return made


@pytest.fixture
def shell(relay: Relay, tenant: Tenant, tmp_path: Path) -> Shell:
    return Shell(tmp_path, str(relay.app.listen), tenant.admin)


@pytest.fixture
async def key(relay: Relay, shell: Shell) -> str:
    """The public key, as the operator gives it to auditors."""
    return (await shell("audit", "keys", "--data-dir", str(relay.settings.data_dir))).out


async def alone(folder: Path, *arguments: str, packages: bool = True) -> Ended:
    """`python -m relay.proofs` with that module, cryptography where it is asked for, and the standard library alone."""
    shutil.copytree(Path(proofs.__file__).parent, folder / "alone" / "relay" / "proofs", dirs_exist_ok=True)
    if packages:
        site = Path(cryptography.__file__).parent.parent
        for found in (*site.glob("cryptography*"), *site.glob("cffi*"), *site.glob("_cffi*"), *site.glob("pycparser*")):
            if not (there := folder / "alone" / found.name).exists():
                there.symlink_to(found)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-S", "-P", "-m", "relay.proofs", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env={"PYTHONPATH": str(folder / "alone")},
    )
    out, err = (stream.decode() for stream in await process.communicate())
    assert process.returncode is not None
    return Ended(process.returncode, out, err)


async def test_an_export_is_proven_from_the_beginning_to_a_kept_checkpoint(
    relay: Relay, tenant: Tenant, shell: Shell, key: str, tmp_path: Path
) -> None:
    kept, exported = tmp_path / "kept", tmp_path / "export.jsonl"
    kept.write_text((await shell("audit", "checkpoint")).out)
    size = int(kept.read_text().split("\n")[1])
    async with relay.connect(tenant.admin) as client:
        await client.auth.create_api_key("one more", "viewer")
    await integrated(relay)
    ended = await shell("audit", "export", "--output", str(exported))
    assert (ended.code, ended.out) == (0, "")
    assert exported.stat().st_mode & 0o777 == 0o600
    verified = await shell("audit", "verify", str(exported), "--key", key, "--checkpoint", str(kept), key="")
    assert (verified.code, verified.err) == (0, "")
    assert f"relay/workspaces/{tenant.workspace_id}" in verified.out
    assert f"It continues what it was with {size} events." in verified.out
    assert "Not proven" not in verified.out
    document = (await shell("audit", "verify", str(exported), "--key", key, "--json")).json
    assert document["first"] == 0
    assert document["end"] == document["treeSize"] > size
    assert document["notProven"] == [
        "Without a checkpoint kept from earlier, the log could be another one than it was."
    ]


async def test_it_is_proven_where_nothing_of_relay_is_installed(shell: Shell, key: str, tmp_path: Path) -> None:
    exported, kept = tmp_path / "export.jsonl", tmp_path / "kept"
    kept.write_text((await shell("audit", "checkpoint")).out)
    exported.write_text((await shell("audit", "export")).out)
    verified = await alone(tmp_path, str(exported), "--key", key, "--checkpoint", str(kept))
    assert (verified.code, verified.err) == (0, "")
    assert verified.out.startswith("Proven:\n")
    assert "Not proven" not in verified.out
    exported.write_bytes(b"".join(changed(exported.read_bytes().splitlines(True), 1, event__reason="other")))
    refused = await alone(tmp_path, str(exported), "--key", key)
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.startswith("NOT PROVEN: line ")
    assert (await alone(tmp_path, str(exported))).code == 2
    missing = await alone(tmp_path, "none", "--key", key)
    assert (missing.code, missing.err) == (2, "can't read none: No such file or directory\n")


async def test_without_cryptography_it_says_what_to_install(tmp_path: Path) -> None:
    log = Log()
    log.add(2)
    (tmp_path / "export").write_bytes(b"".join(log.export()))
    ended = await alone(tmp_path, str(tmp_path / "export"), "--key", SIGNER.verifier_keys[0], packages=False)
    assert ended.code == 1
    assert "pip install 'relay-client[verify]'" in ended.err


async def test_a_later_range_takes_a_consistency_proof(
    relay: Relay, tenant: Tenant, shell: Shell, key: str, tmp_path: Path
) -> None:
    kept, exported, proof = (str(tmp_path / name) for name in ("kept", "export", "proof"))
    Path(kept).write_text((await shell("audit", "checkpoint")).out)
    size = Path(kept).read_text().split("\n")[1]
    async with relay.connect(tenant.admin) as client:
        for number in range(int(size) & -int(size)):  # so that no subtree before the range ends at this size
            await client.auth.create_api_key(f"one more {number}", "viewer")
        await integrated(relay)
        since = datetime.now(UTC).isoformat()
        await client.auth.create_api_key("another", "viewer")
    await integrated(relay)
    await shell("audit", "export", "--since", since, "--output", exported)
    verify = ("audit", "verify", exported, "--key", key, "--checkpoint", kept)
    refused = await shell(*verify)
    assert refused.code == 1
    first, second = refused.err.split("consistency proof from ")[1].split(",")[0].split(" to ")
    assert first == size
    Path(proof).write_text((await shell("audit", "consistency", first, second)).out)
    proven = await shell(*verify, "--consistency", proof)
    assert proven.code == 0
    assert f"only those logged from {since} on" in proven.out
    for nonsense in ("{}", "[" * 100_000):
        Path(proof).write_text(nonsense)
        assert "as JSON" in (await shell(*verify, "--consistency", proof)).err


async def test_a_file_that_proves_nothing_ends_with_1_and_says_why(shell: Shell, key: str, tmp_path: Path) -> None:
    exported = tmp_path / "export"
    lines = (await shell("audit", "export")).out.splitlines(True)
    exported.write_text("".join([*lines[:2], *lines[3:]]))
    ended = await shell("audit", "verify", str(exported), "--key", key)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err == "error: not proven: line 3: this is event 3 where event 2 should be\n"
    assert (await shell("audit", "verify", str(exported), "--key", "nonsense")).code == 1
    missing = await shell("audit", "verify", str(tmp_path / "none"), "--key", key)
    assert (missing.code, "No such file" in missing.err) == (2, True)
    piped = await shell("audit", "verify", "-", "--key", key, stdin="".join(lines))
    assert piped.code == 0


async def test_a_file_is_replaced_only_if_that_is_meant_and_only_by_a_whole_one(
    relay: Relay, shell: Shell, tmp_path: Path
) -> None:
    there = tmp_path / "there.csv"
    there.write_text("before")
    refused = await shell("audit", "export", "--format", "csv", "--output", str(there))
    assert (refused.code, there.read_text()) == (5, "before")
    future = await shell("audit", "export", "--until", "2100-01-01", "--output", str(there), "--force")
    assert (future.code, there.read_text()) == (2, "before")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".there")]
    assert (await shell("audit", "export", "--format", "csv", "--output", str(there), "--force")).code == 0
    assert [row["action"] for row in csv.DictReader(there.read_text().splitlines())].count(
        "AuthService.CreateApiKey"
    ) == 7
    nowhere = await shell("audit", "export", "--output", str(tmp_path / "no" / "where"))
    assert (nowhere.code, "can't write to" in nowhere.err) == (2, True)


async def test_a_terminal_is_asked_where_to_and_standard_output_takes_every_format(shell: Shell) -> None:
    asked = await shell.on_terminal("audit", "export")
    assert asked.code == 2
    assert "give --output FILE" in asked.out
    events = [json.loads(line) for line in (await shell("audit", "export", "--format", "ocsf")).out.splitlines()]
    assert {event["class_uid"] for event in events} == {6003}


async def test_one_event_is_proven_alone(relay: Relay, tenant: Tenant, shell: Shell, key: str) -> None:
    async with relay.connect(tenant.admin) as client:
        (event,) = [one async for one in client.audit.list_events(action="operator.CreateWorkspace")]
    proof = (await shell("audit", "inclusion", event.id)).json
    checkpoint = open_checkpoint(proof["checkpoint"]["note"], [VerifierKey.parse(one) for one in key.split()])
    path = [base64.b64decode(hashed) for hashed in proof["hashes"]]
    proven = verify_event(base64.b64decode(proof["leaf"]), int(proof["leafIndex"]), path, checkpoint)
    assert (proven["id"], proven["action"]) == (event.id, event.action)


async def test_a_tail_shows_what_is_logged_and_ends_with_how_to_go_on(
    relay: Relay, tenant: Tenant, shell: Shell
) -> None:
    async def seen(tail: Any, target: str) -> list[dict[str, Any]]:
        """What it shows up to the event with this target."""
        shown: list[dict[str, Any]] = []
        async with asyncio.timeout(10):
            while not shown or shown[-1]["target"] != target:
                shown.append(json.loads(await tail.stdout.readline())["event"])
        return shown

    async def ended(tail: Any) -> str:
        """Ctrl-C is pressed. Returns the cursor to go on from."""
        tail.send_signal(signal.SIGINT)
        _, err = await tail.communicate()
        assert tail.returncode == 0
        return str(err.decode().split("--cursor ")[1].strip())

    async with relay.connect(tenant.admin) as client:
        tail = await shell.start("audit", "tail", "--json")
        shown = [json.loads(await asyncio.wait_for(tail.stdout.readline(), 10))["event"]]
        assert shown[0]["action"] == "AuditService.TailEvents"
        first = await client.auth.create_api_key("seen", "viewer")
        shown += await seen(tail, f"apiKeys/{first.id}")
        cursor = await ended(tail)
        made = await client.auth.create_api_key("while nobody looked", "viewer")
        again = await shell.start("audit", "tail", "--json", "--cursor", cursor)
        shown += await seen(again, f"apiKeys/{made.id}")
        await ended(again)
        places = {int(event["leafIndex"]) for event in shown}  # the newest may come twice
        assert places == set(range(min(places), min(places) + len(places)))
        assert len(shown) <= len(places) + 1
        told = await shell.start("audit", "tail", "--cursor", cursor)
        assert "AuthService.CreateApiKey by" in (await asyncio.wait_for(told.stdout.readline(), 10)).decode()
        await ended(told)
    wrong = await shell("audit", "tail", "--cursor", "nonsense")
    assert (wrong.code, "--cursor" in wrong.err) == (2, False)


MEASURED = """
import runpy
try:
    runpy.run_module("relay.proofs", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 0
print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


async def memory_to_verify(path: Path) -> int:
    """KiB at the most."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", MEASURED, str(path), "--key", SIGNER.verifier_keys[0]), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return int(out.split()[-1])


@pytest.mark.long
async def test_a_large_export_is_verified_in_constant_memory(
    tmp_path: Path, long: bool, figure: Callable[[str], None]
) -> None:
    count, few = 100_000 if long else 20_000, 1000
    sizes = {}
    for events in (few, count):
        log = Log()
        log.add(events)
        path = tmp_path / str(events)
        path.write_bytes(b"".join(log.export()))
        sizes[events] = await memory_to_verify(path)
    grown = (sizes[count] - sizes[few]) / 2**10
    figure(f"{count} events: {path.stat().st_size / 2**20:.0f} MiB verified with {grown:+.1f} MiB more than {few} take")
    assert grown < 8
