"""However an audited call ends, one event tells of it, with the right outcome, and what was done is what is told.

Made from the descriptors: a new audited RPC has all of these tests, and fails them until tests/rpc/resources.py says
what its requests name.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from relay.v1 import auth_pb2

from relay_grpc.audit.event import SYSTEM_WORKSPACE
from relay_grpc.auth import keys
from relay_grpc.auth.scopes import ROLES
from relay_grpc.call import Method
from tests.actions.caller import eventually
from tests.audit.every_outcome import (
    AUDITED,
    CHANGES,
    ENDLESS,
    IN_EVERY_RUN,
    defective,
    events,
    held_up,
    nobodys_names,
    slow_commits,
    state,
    successful,
    unleashed,
)
from tests.audit.lossy import Lossy, lossy
from tests.auth.issuer import AUDIENCE
from tests.harness import Databases
from tests.processes import started
from tests.rpc.resources import Neighbours, neighbours, request
from tests.rpc.wire import METHODS, Wire

# Callers give up after PATIENCE seconds, while commits take LONGER.
PATIENCE, LONGER = 0.4, 0.6
LEASE = {"RELAY_ATTEMPT_TIMEOUT": "0.5", "RELAY_LEASE": "1.5"}
CREATE_KEY = METHODS["AuthService.CreateApiKey"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "method" in metafunc.fixturenames:
        names = AUDITED if metafunc.config.getoption("--long") else IN_EVERY_RUN
        metafunc.parametrize("method", [AUDITED[name] for name in names], ids=names)


@pytest.fixture(scope="module")
async def way(databases: Databases) -> AsyncIterator[Lossy]:
    async with databases.new() as url, lossy(url) as way:
        yield way


@pytest.fixture(scope="module")
async def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
async def two(way: Lossy, folder: Path) -> AsyncIterator[Neighbours]:
    async with neighbours(way.url, folder, **LEASE) as two:
        yield two


async def is_built(two: Neighbours, method: Method) -> bool:
    """Whether it does anything yet. Of the answer that it does not, one event tells too."""
    ended = await unleashed(two, method, request(method, nobodys_names(method)))
    assert ended.told.outcome != "denied"
    return ended.answer.code != "UNIMPLEMENTED"


async def new_key(two: Neighbours, **fields: Any) -> auth_pb2.ApiKey:
    message = auth_pb2.CreateApiKeyRequest(**{"name": uuid4().hex, "role": "admin"} | fields)
    return (await two.wire.call(CREATE_KEY, message, two.ours.tenant.admin)).reply


@pytest.mark.long
async def test_a_success_is_told_with_its_parameters(two: Neighbours, method: Method) -> None:
    if not await is_built(two, method):
        return
    ended = await unleashed(two, method, await successful(two, method))
    assert ended.answer.code == ("DEADLINE_EXCEEDED" if method.name in ENDLESS else "OK")
    assert ended.changed == (method.name in CHANGES)
    told = ended.told
    assert (told.workspace_id, told.actor_type, told.outcome) == (two.ours.tenant.workspace_id, "api_key", "success")
    assert len(told.params_hash) == 64
    assert told.params_prefix.startswith("{")


@pytest.mark.long
async def test_callers_without_a_good_credential_are_counted_by_who_they_are(two: Neighbours, method: Method) -> None:
    content = request(method, nobodys_names(method))
    own, system = two.ours.tenant.workspace_id, SYSTEM_WORKSPACE
    revoked = await new_key(two)
    await two.wire.call("AuthService.RevokeApiKey", auth_pb2.RevokeApiKeyRequest(id=revoked.id), two.ours.tenant.admin)
    user = two.issuer.token(two.issuer.claims(sub=(name := uuid4().hex)))
    for credential, expected in {
        "": (system, "unknown", "", "CREDENTIALS_INVALID"),
        keys.generate(live=False).text: (system, "unknown", "", "CREDENTIALS_INVALID"),
        user: (system, "user", f"{two.issuer.url}#{name}", "ROLE_MISSING"),
        revoked.secret: (own, "api_key", revoked.id, "CREDENTIALS_INVALID"),
    }.items():
        ended = await unleashed(two, method, content, credential)
        assert ended.answer.reason == expected[-1]
        told = ended.told
        assert (told.workspace_id, told.actor_type, told.actor_id, told.reason) == expected
        assert (told.outcome, told.params_hash, told.params_prefix, ended.changed) == ("denied", "", "", False)


@pytest.mark.long
async def test_a_caller_without_the_scope_is_told_with_what_it_asked_for(two: Neighbours, method: Method) -> None:
    role = next(role for role, scopes in ROLES.items() if scopes - method.scopes)
    key = await new_key(two, role=role, scopes=sorted(ROLES[role] - method.scopes)[:1])
    ended = await unleashed(two, method, request(method, nobodys_names(method)), key.secret)
    assert ended.answer.reason == "SCOPE_MISSING"
    told = ended.told
    assert (told.workspace_id, told.actor_id, told.outcome, told.reason) == (
        two.ours.tenant.workspace_id,
        key.id,
        "denied",
        "SCOPE_MISSING",
    )
    assert told.params_hash
    assert told.params_prefix
    assert not ended.changed


@pytest.mark.long
async def test_a_caller_beyond_its_limit_is_counted_in_its_own_workspace(two: Neighbours, method: Method) -> None:
    key = await new_key(two, limits={"calls_per_minute": 1, "executions_per_minute": 1})
    reasons = []
    for _ in range(4):  # the first is within the limit, and a minute may end
        ended = await unleashed(two, method, b"\xff", key.secret)
        reasons.append(ended.answer.reason)
        told = ended.told
        assert (told.actor_id, told.reason) == (key.id, ended.answer.reason)
        assert told.outcome == ("denied" if told.reason == "RATE_LIMITED" else "failed")
    assert {"INVALID_REQUEST", "RATE_LIMITED"} == set(reasons)


@pytest.mark.long
async def test_a_request_that_is_none_and_one_for_what_is_not_there_are_failures(
    two: Neighbours, method: Method
) -> None:
    ended = await unleashed(two, method, b"\xff")
    assert (ended.told.outcome, ended.told.reason, ended.told.params_prefix) == ("failed", "INVALID_REQUEST", "*")
    assert len(ended.told.params_hash) == 64
    if names := nobodys_names(method):
        ended = await unleashed(two, method, request(method, names))
        if ended.answer.code != "OK":  # of a filter
            assert (ended.told.outcome, ended.told.reason) == ("failed", ended.answer.reason)
        assert len(ended.events) == 1
        assert not ended.changed


@pytest.mark.long
async def test_a_defect_is_a_failure(two: Neighbours, method: Method) -> None:
    if not await is_built(two, method):
        return
    content = await successful(two, method)
    await two.ours.settled()
    async with defective(two):
        ended = await unleashed(two, method, content)
    assert ended.answer.code == "INTERNAL"
    assert (ended.told.outcome, ended.told.reason) == ("failed", "INTERNAL")
    assert not ended.changed


@pytest.mark.long
async def test_a_caller_that_gives_up_before_the_change_leaves_what_is_told(two: Neighbours, method: Method) -> None:
    if not await is_built(two, method):
        return
    content, request_id = await successful(two, method), uuid4().hex
    before = await state(two)
    async with held_up(two):
        answer = await two.wire.call(method, content, two.ours.tenant.admin, timeout=PATIENCE, x_request_id=request_id)
    assert answer.code == "DEADLINE_EXCEEDED"
    (told,) = await eventually(lambda: events(two, request_id))
    changed = await state(two) != before
    # An Execute that is on its way is done all the same, and told as what it is.
    assert (told.outcome, told.reason) == (("success", "") if changed else ("failed", "CANCELLED"))
    assert not changed or method.name == "ActionsService.Execute"


@pytest.mark.long
async def test_a_caller_that_gives_up_during_the_commit_leaves_the_change_and_its_success(
    two: Neighbours, method: Method
) -> None:
    if not await is_built(two, method):
        return
    content, request_id = await successful(two, method), f"slow-{uuid4().hex}"
    before = await state(two)
    async with slow_commits(two.postgres, "slow-", LONGER):
        answer = await two.wire.call(method, content, two.ours.tenant.admin, timeout=PATIENCE, x_request_id=request_id)
        assert answer.code == "DEADLINE_EXCEEDED"
        (told,) = await eventually(lambda: events(two, request_id))
    assert told.outcome == "success"
    assert (await state(two) != before) == (method.name in CHANGES)


@pytest.mark.parametrize("patient", [True, False], ids=["committed", "being committed"])
@pytest.mark.parametrize("name", ["AuthService.CreateApiKey", "ActionsService.Preview", "ActionsService.Execute"])
async def test_a_commit_whose_answer_is_lost_is_told_once(
    two: Neighbours, way: Lossy, name: str, patient: bool
) -> None:
    """Relay can't know what became of it and tells of a failure: Postgres keeps that or the change, never both."""
    method = METHODS[name]
    content, request_id = await successful(two, method), f"lost-{uuid4().hex}"
    before = await state(two)
    async with slow_commits(two.postgres, "lost-", 0.3):
        way.lose(request_id, end="" if name == "ActionsService.Execute" else "COMMIT", patient=patient)
        answer = await two.wire.call(method, content, two.ours.tenant.admin, x_request_id=request_id)
        assert way.lost == 1
        assert answer.code in ("UNAVAILABLE", "OK")  # it looks an Execute up again
        (told,) = await eventually(lambda: events(two, request_id))
    changed = await state(two) != before
    assert told.outcome == ("success" if changed else "failed")
    assert changed or not patient


POINTS = ("audit.appending", "audit.committed")
OF_EXECUTE = ("execute.uncommitted", "execute.committed")
KILLS = [
    (name, point) for name in sorted(CHANGES) for point in (OF_EXECUTE if name == "ActionsService.Execute" else POINTS)
]
KILLS_IN_EVERY_RUN = [
    ("AuthService.RotateApiKey", "audit.committed"),
    ("ConnectionsService.CreateConnection", "audit.appending"),
]


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_a_server_that_is_killed_leaves_a_change_and_its_event_or_neither(
    two: Neighbours, way: Lossy, folder: Path, long: bool, figure: Callable[[str], None]
) -> None:
    """And the call that is made once more leaves one more event. Another server is there all the time."""
    kills = [(METHODS[name], point) for name, point in (KILLS if long else KILLS_IN_EVERY_RUN)]
    built = [(method, point) for method, point in kills if await is_built(two, method)]
    for method, point in built:
        try:
            await dies(two, way.url, folder, method, point)
        except BaseException as error:
            error.add_note(f"{method.name} at {point}")
            raise
    figure(f"{len(built)} kills: a change and its event, or neither, each time")


async def dies(two: Neighbours, url: str, folder: Path, method: Method, point: str) -> None:
    content = await successful(two, method)
    before, request_id = await state(two), uuid4().hex
    await killed(two, url, folder, method, content, point, request_id)
    told = await events(two, request_id)
    is_done = point.endswith(".committed")
    assert [(one.outcome, one.reason) for one in told] == ([("success", told[0].reason)] if is_done else [])
    assert (await state(two) != before) == is_done
    again = await unleashed(two, method, content, x_request_id=request_id)
    assert len(again.events) == len(told) + 1
    assert is_done or (again.answer.code, again.changed) == ("OK", True)


async def killed(
    two: Neighbours, url: str, folder: Path, method: Method, content: Any, point: str, request_id: str
) -> None:
    """The call is made to a server of its own that dies at this point."""
    environ = LEASE | {"RELAY_FAILPOINT": f"{point}:1", "RELAY_OIDC_ISSUERS": f"{two.issuer.url} {AUDIENCE}"}
    async with started(url, folder, **environ) as server:
        async with grpc.aio.insecure_channel(server.listen) as channel:
            wire = Wire(channel, two.ours.tenant.admin)
            answer = await wire.call(method, content, x_request_id=request_id)
        await asyncio.wait_for(server.process.wait(), 20)
    assert answer.code == "UNAVAILABLE"
