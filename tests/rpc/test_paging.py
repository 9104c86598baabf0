"""Listings: every row once, in order, whatever is added meanwhile; tokens that fit the listing they came from alone."""

import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import pytest

from relay_grpc.ids import uuid7
from tests.harness import Receiver, Relay, Tenant, receiving
from tests.rpc.wire import METHODS, Wire, wired

PAGED = {
    method.name: method for method in METHODS.values() if "page_token" in method.input_type.DESCRIPTOR.fields_by_name
}
ROWS = 5
UNBUILT = {
    "ActionsService.ListApprovalPolicies",
    "ActionsService.ListPendingApprovals",
}
LISTINGS = [name for name in PAGED if name not in UNBUILT]
# What their rows are ordered by; the others' is the id, which rises with time, newest first.
ORDERS = {
    "AuthService.ListRoles": lambda row: (row.parent != "", row.name),
    "AuthService.ListRoleAssignments": lambda row: -UUID(row.user_id).int,  # the row's id, as they are made here
    "ActionsService.ListActions": lambda row: row.name,
    "ActionsService.ListAttempts": lambda row: row.number,
}
# Whoever guesses a name guesses a cursor.
BY_NAME = ("ActionsService.ListActions", "AuthService.ListRoles")


@dataclass
class Full:
    """A tenant with at least ROWS rows in every listing, and its latest execution, which has ROWS attempts."""

    tenant: Tenant
    wire: Wire
    execution_id: str

    def request(self, name: str, **fields: Any) -> Any:
        if name.endswith("ListAttempts"):
            fields.setdefault("execution_id", self.execution_id)
        return PAGED[name].input_type(**fields)

    async def page(self, name: str, **fields: Any) -> tuple[list[Any], str]:
        reply = (await self.wire.call(name, self.request(name, **fields))).reply
        (rows,) = (getattr(reply, field.name) for field in reply.DESCRIPTOR.fields if field.is_repeated)
        return list(rows), reply.next_page_token


@pytest.fixture(scope="module")
async def full(relay: Relay) -> AsyncIterator[Full]:
    tenant = await relay.new_tenant()
    async with receiving() as receiver, relay.connect(tenant.admin) as client, wired(relay, tenant.admin) as wire:
        execution = await _executions(client, receiver)
        await relay.sql(
            """
            INSERT INTO execution_attempts
              (execution_id, number, workspace_id, started_at, outcome, status_code, response_excerpt, error)
            SELECT execution_id, n, workspace_id, started_at, 'refused', 500, '', '' FROM execution_attempts,
                   generate_series(2, $2) n WHERE execution_id = $1
            """,
            execution.id,
            ROWS,
        )
        await relay.sql(
            """
            INSERT INTO api_keys (id, workspace_id, public_id, lineage_id, key_hash, name, role, scopes, created_by)
            SELECT id, $1, id, id, '', 'one of many', 'viewer', '{}', '' FROM unnest($2::uuid[]) id
            """,
            tenant.workspace_id,
            [uuid7() for _ in range(ROWS)],
        )
        for number in range(ROWS):
            await client.auth.create_role(f"role-{number}", "viewer", ["actions:read"])
        await relay.sql(
            """
            INSERT INTO user_roles (id, workspace_id, issuer, user_id, role, created_by)
            SELECT id, $1, '', id, 'viewer', '' FROM unnest($2::uuid[]) id
            """,
            tenant.workspace_id,
            [uuid7() for _ in range(ROWS)],
        )
        yield Full(tenant, wire, execution.id)


async def _executions(client: Any, receiver: Receiver) -> Any:
    """Makes ROWS connections with an execution each; the last execution."""
    for i in range(ROWS):
        connection = await client.connections.create_webhook(f"connection {i}", receiver.url)
        preview = await client.actions.preview("webhook.send", {"payload": {}}, connection_id=connection.id)
        execution = await client.actions.execute(preview)
    return execution


async def test_what_is_not_built_is_known(full: Full) -> None:
    answers = {name: (await full.wire.call(name, full.request(name))).code for name in PAGED}
    assert {name for name, code in answers.items() if code == "UNIMPLEMENTED"} == UNBUILT
    assert set(answers.values()) == {"OK", "UNIMPLEMENTED"}


@pytest.mark.parametrize("name", LISTINGS)
async def test_pages_hold_every_row_once_and_in_order(full: Full, name: str) -> None:
    # Listing events is an event itself.
    filters = {"action": "ActionsService.Execute"} if name == "AuditService.ListEvents" else {}
    everything, token = await full.page(name, page_size=200, **filters)
    assert token == ""
    if name != "ActionsService.ListActions":  # the catalogue is as long as it is
        assert len(everything) >= ROWS
    keys = [ORDERS.get(name, lambda row: -UUID(row.id).int)(row) for row in everything]
    assert keys == sorted(set(keys))

    rows, token = await full.page(name, page_size=2, **filters)
    pages = [rows]
    while token:
        rows, token = await full.page(name, page_size=2, page_token=token, **filters)
        pages.append(rows)
    assert [row for page in pages for row in page] == everything
    assert [len(page) for page in pages] == [2] * (len(everything) // 2) + [1] * (len(everything) % 2)


async def test_rows_that_are_added_meanwhile_shift_no_page(relay: Relay, full: Full) -> None:
    first, token = await full.page("ConnectionsService.ListConnections", page_size=2)
    async with relay.connect(full.tenant.admin) as client:
        added = await client.connections.create_webhook("in between", "http://127.0.0.1:9/")
    second, _ = await full.page("ConnectionsService.ListConnections", page_size=2, page_token=token)
    assert [row.name for row in first + second] == [f"connection {i}" for i in (4, 3, 2, 1)]
    newest, _ = await full.page("ConnectionsService.ListConnections", page_size=1)
    assert [row.id for row in newest] == [added.id]


async def test_a_page_has_50_rows_unless_asked_and_200_at_most(relay: Relay) -> None:
    tenant = await relay.new_tenant()
    await relay.sql(
        "INSERT INTO connections (id, workspace_id, name, provider, configuration) "
        """SELECT id, $1, id, 'independent', '{"url": "", "body_signature": false}' FROM unnest($2::uuid[]) id""",
        tenant.workspace_id,
        [uuid7() for _ in range(201)],
    )
    async with wired(relay, tenant.admin) as wire:
        full = Full(tenant, wire, "")
        for asked, given in ((0, 50), (1, 1), (200, 200), (201, 200), (2**31 - 1, 200)):
            rows, token = await full.page("ConnectionsService.ListConnections", page_size=asked)
            assert len(rows) == given
            assert token
        rows, token = await full.page("ConnectionsService.ListConnections", page_size=200, page_token=token)
        assert (len(rows), token) == (1, "")
        request = full.request("ConnectionsService.ListConnections", page_size=-1)
        assert set((await wire.call("ConnectionsService.ListConnections", request)).violations) == {"page_size"}


@pytest.mark.parametrize("name", LISTINGS)
async def test_a_token_fits_its_own_listing_alone(relay: Relay, full: Full, name: str) -> None:
    _, token = await full.page(name, page_size=1)

    async def assert_refused(request: Any, key: str | None = None, listing: str = name) -> None:
        answer = await full.wire.call(listing, request, key)
        assert (answer.code, set(answer.violations)) == ("INVALID_ARGUMENT", {"page_token"})
        assert token not in answer.text

    other = next(one for one in LISTINGS if one != name)
    await assert_refused(full.request(other, page_token=token), listing=other)
    await assert_refused(full.request(name, page_token=token), relay.tenant.admin)
    for field in PAGED[name].input_type.DESCRIPTOR.fields:
        if field.name in ("action", "provider", "actor_id", "request_id"):
            await assert_refused(full.request(name, page_token=token, **{field.name: "other"}))
        elif field.name in ("connection_id", "execution_id"):
            await assert_refused(full.request(name, page_token=token, **{field.name: str(uuid7())}))
        elif field.enum_type:
            await assert_refused(full.request(name, page_token=token, **{field.name: [1] if field.is_repeated else 1}))
    # The size may change from page to page.
    assert (await full.wire.call(name, full.request(name, page_token=token, page_size=3))).code == "OK"


@pytest.mark.parametrize("name", [name for name in LISTINGS if name not in BY_NAME])
async def test_tokens_that_nobody_gave_are_bad_requests(full: Full, name: str) -> None:
    _, token = await full.page(name, page_size=1)
    seal = base64.urlsafe_b64decode(token)[:8]
    forged = [
        base64.urlsafe_b64encode(seal + cursor).decode() for cursor in (b"", b"x", b"-1", b"9" * 30, b"\xff", b"'")
    ]
    for bad in (*forged, token[:-4], token[4:], "x", "====", "é", "\n"):
        answer = await full.wire.call(name, full.request(name, page_token=bad))
        assert (answer.code, set(answer.violations)) == ("INVALID_ARGUMENT", {"page_token"}), bad
