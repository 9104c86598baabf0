"""What docs/audit.md shows works as it shows it."""

import asyncio
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from relay.proofs import ProofError

from relay_grpc.audit.checkpoint import Signer
from relay_grpc.cli import app
from tests.audit.log import integrated
from tests.harness import Relay

GUIDE = (Path(__file__).parents[2] / "docs/audit.md").read_text()
VERIFYING = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
    for line in block.splitlines()
]


async def test_an_export_is_verified_as_the_guide_does(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signer = Signer({key.id: key.key for key in relay.settings.audit_keys})
    (tmp_path / "keys.txt").write_text("\n".join(signer.verifier_keys) + "\n")
    async with relay.connect(relay.tenant.admin) as client:
        await integrated(relay)
        (tmp_path / "kept-elsewhere.txt").write_text((await client.audit.get_checkpoint()).note)
        await client.auth.create_api_key("afterwards", "viewer")
        await integrated(relay)
        exported = b"".join([part.chunk async for part in client.audit.export_events()])
    (tmp_path / "log.jsonl").write_bytes(exported)
    monkeypatch.chdir(tmp_path)
    (snippet,) = VERIFYING
    await asyncio.to_thread(exec, snippet, {})
    said = capsys.readouterr().out
    assert f"{exported.count(b'leaf_index')} events, from number 0" in said
    assert "It continues what it was" in said
    (tmp_path / "log.jsonl").write_bytes(exported.replace(b"AuthService.CreateApiKey", b"AuthService.RevokeApiKey", 1))
    with pytest.raises(ProofError, match=r"line \d+"):
        await asyncio.to_thread(exec, snippet, {})


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_there_with_the_options_that_it_shows(words: list[str]) -> None:
    assert words[0] == "relay"
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[1]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
