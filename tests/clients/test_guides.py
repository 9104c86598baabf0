"""What the guides show works as they show it."""

import ast
import asyncio
import inspect
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import standardwebhooks

from relay_grpc.actions.execution import TRANSITIONS, State
from tests.harness import Receiver, Relay

ROOT = Path(__file__).parents[2]
CALLING, VERIFYING = re.findall(r"```python\n(.*?)```", (ROOT / "docs/delivery.md").read_text(), re.DOTALL)
README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
STATES = re.findall(r"^    (\S+) --> (\w+): (.+)$", (ROOT / "docs/delivery.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("snippet", [*README, CALLING])
async def test_a_call_does_what_its_guide_says(
    relay: Relay, receiver: Receiver, snippet: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tenant = await relay.new_tenant()
    async with relay.connect(tenant.admin) as client:
        await client.connections.create_webhook("default", receiver.url, default=True)
    source = snippet.replace("localhost:50051", str(relay.app.listen)).replace("rk_...", tenant.developer)
    code = compile(source, "a guide", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        await eval(code, {})
    else:
        await asyncio.to_thread(exec, code, {})
    assert len(receiver.requests) == 1
    assert capsys.readouterr().out.splitlines()[-1] in ("1 200", "EXECUTION_STATE_SUCCESS 1")


def test_the_guide_verifies_as_the_reference_does() -> None:
    guide: dict[str, Any] = {}
    exec(VERIFYING, guide)
    secret, other = ("whsec_" + word * 8 for word in ("c2Vj", "b3Ro"))
    now, body = int(time.time()), b'{"order":"4711"}'

    def headers(signing: str, at: int) -> dict[str, str]:
        webhook, id_ = standardwebhooks.Webhook(signing), str(uuid4())
        signature = webhook.sign(id_, datetime.fromtimestamp(at, UTC), body.decode())
        return {"webhook-id": id_, "webhook-timestamp": str(at), "webhook-signature": signature}

    good = headers(secret, now)
    assert guide["is_genuine"](secret, good, body)
    rotated = good | {"webhook-signature": f"v1,b2xk {good['webhook-signature']} v1a,bmV3"}
    assert guide["is_genuine"](secret, rotated, body)
    for forged in (headers(other, now), headers(secret, now - 301), headers(secret, now + 302)):
        assert not guide["is_genuine"](secret, forged, body)
    assert not guide["is_genuine"](secret, good, body + b" ")
    assert not guide["is_genuine"](secret, good | {"webhook-id": str(uuid4())}, body)


def test_the_diagram_of_states_is_the_state_machine() -> None:
    drawn = {(State(old), State(new)) for old, new, _ in STATES if old != "[*]"}
    assert drawn == {(old, new) for old, following in TRANSITIONS.items() for new in following}
    assert {new for old, new, _ in STATES if old == "[*]"} == {State.EXECUTING, State.PENDING}
