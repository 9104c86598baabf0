"""Nobody gives more than they hold: the rule by itself, and every way to break it over the wire."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from relay.v1 import auth_pb2

from relay_grpc import errors
from relay_grpc.auth import ceiling, scopes
from relay_grpc.principal import NO_LIMITS, Limits, Principal, PrincipalType
from tests.harness import Databases, running, settings_for
from tests.rpc.wire import METHODS, Wire, wired

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
SUBSETS = st.frozensets(st.sampled_from(sorted(scopes.SCOPES)))
ENDS = st.none() | st.integers(-2, 2).map(lambda hours: NOON + timedelta(hours=hours))
BUDGETS = st.none() | st.integers(1, 4)
LIMITS = st.builds(Limits, BUDGETS, BUDGETS)


def principal(held: frozenset[str], ends: datetime | None, limits: Limits, kind: PrincipalType) -> Principal:
    return Principal(kind, "id", "caller", "name", UUID(int=1), "role", held, ends, limits)


def may_make(maker: Principal, *key: Any) -> bool:
    try:
        ceiling.check_key(maker, *key)
    except errors.PermissionDenied as refusal:
        if refusal.reason == "CEILING_EXCEEDED":
            return False
        raise
    return True


def within(one: float | None, most: float | None) -> bool:
    """None: endless."""
    return most is None or (one is not None and one <= most)


def hours(moment: datetime | None) -> float | None:
    return moment and (moment - NOON).total_seconds()


@given(SUBSETS, ENDS, LIMITS, st.sampled_from(PrincipalType), SUBSETS, ENDS, LIMITS)
def test_a_key_is_made_exactly_where_it_is_within_its_maker(
    held: frozenset[str],
    ends: datetime | None,
    limits: Limits,
    kind: PrincipalType,
    given_scopes: frozenset[str],
    given_end: datetime | None,
    given_limits: Limits,
) -> None:
    maker = principal(held, ends, limits, kind)
    assert may_make(maker, given_scopes, given_end, given_limits) == (
        given_scopes <= held
        and (kind is PrincipalType.USER or within(hours(given_end), hours(ends)))
        and within(given_limits.calls, limits.calls)
        and within(given_limits.executions, limits.executions)
    )


@given(SUBSETS, SUBSETS)
def test_a_refusal_names_exactly_what_is_missing(held: frozenset[str], given_scopes: frozenset[str]) -> None:
    giver = principal(held, None, NO_LIMITS, PrincipalType.USER)
    missing = sorted(given_scopes - held)
    if not missing:
        ceiling.check_scopes(giver, given_scopes)
        return
    with pytest.raises(errors.PermissionDenied) as refusal:
        ceiling.check_scopes(giver, given_scopes)
    assert refusal.value.metadata == {"missing_scopes": " ".join(missing)}
    assert all(scope in refusal.value.message for scope in missing)


@given(st.lists(st.tuples(SUBSETS, ENDS, LIMITS), min_size=2, max_size=5))
def test_no_chain_of_keys_leads_up(chain: list[tuple[frozenset[str], datetime | None, Limits]]) -> None:
    made = [principal(*chain[0], PrincipalType.API_KEY)]
    for key in chain[1:]:
        if may_make(made[-1], *key):
            made.append(principal(*key, PrincipalType.API_KEY))
    assert all(may_make(made[0], one.scopes, one.expires_at, one.limits) for one in made)


# Over the wire. The rule is told again here in the words of its contract, and the answers are compared with it.

GIVES = {"AuthService.CreateApiKey", "AuthService.RotateApiKey", "AuthService.CreateRole", "AuthService.AssignRole"}
TAKES = {"AuthService.RevokeApiKey", "AuthService.DeleteRole", "AuthService.RemoveRole"}
ISSUER = "http://127.0.0.1:9/issuer"
SOON, LATER = (datetime.now(UTC).replace(microsecond=0) + timedelta(days=days) for days in (10, 20))
CUSTOM_ROLES = {
    "key-clerk": ("keys:read", "keys:write", "actions:read"),
    "role-clerk": ("roles:read", "roles:write", "connections:read"),
    "steward": ("keys:read", "keys:write", "roles:read", "roles:write", "actions:read", "actions:preview"),
}


def test_these_methods_are_all_that_give_rights() -> None:
    written = {method.name for method in METHODS.values() if method.scopes & {"keys:write", "roles:write"}}
    assert written == GIVES | TAKES


@dataclass(frozen=True)
class Holder:
    """A key, and what it holds as the server tells it."""

    key: Any
    scopes: frozenset[str]

    @property
    def secret(self) -> str:
        return str(self.key.secret)

    def holds(self, given_scopes: Any, described: Any = None) -> bool:
        """Whether it holds these scopes, and lives as long and may spend as much as a key, made or asked for."""
        described = described or self.key
        return (
            frozenset(given_scopes) <= self.scopes
            and within(end(described), end(self.key))
            and all(within(one, most) for one, most in zip(budgets(described), budgets(self.key), strict=True))
        )


def end(described: Any) -> float | None:
    return described.expire_time.seconds if described.HasField("expire_time") else None


def budgets(described: Any) -> tuple[int | None, int | None]:
    return described.limits.calls_per_minute or None, described.limits.executions_per_minute or None


@dataclass
class World:
    """A tenant with keys of varied power, by what they are, and their like. roles: what each role allows."""

    wire: Wire
    holders: dict[str, Holder]
    victims: dict[str, Holder]
    roles: dict[str, frozenset[str]]

    async def gives(self, method: str, request: Any, maker: Holder, allowed: bool) -> Any:
        """What the maker obtained; None where it was refused, as it has to be unless it is `allowed`."""
        answer = await self.wire.call(method, request, maker.secret)
        if METHODS[method].scopes <= maker.scopes and allowed:
            return answer.reply
        assert answer.code == "PERMISSION_DENIED", (request, maker, answer)
        assert answer.reason == ("CEILING_EXCEEDED" if METHODS[method].scopes <= maker.scopes else "SCOPE_MISSING")
        return None

    async def holder(self, key: Any) -> Holder:
        me = (await self.wire.call("AuthService.WhoAmI", key=key.secret)).reply
        assert me.id == key.id
        assert list(me.scopes) == list(key.scopes)
        return Holder(key, frozenset(me.scopes))


@pytest.fixture(scope="module")
async def world(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    settings = settings_for(tmp_path_factory.mktemp("data"), RELAY_OIDC_ISSUERS=f"{ISSUER} relay")
    async with databases.new() as url, running(url, settings) as relay, wired(relay) as wire:
        world = World(wire, {}, {}, {})
        async with relay.connect(relay.tenant.admin) as admin:
            for name, kept in CUSTOM_ROLES.items():
                await admin.auth.create_role(name, "admin", kept)
            world.roles = {role.name: frozenset(role.scopes) async for role in admin.auth.list_roles()}
            narrowed = ["keys:write", "roles:write", "actions:read", "actions:execute"]
            described: dict[str, dict[str, Any]] = {
                **{role: {"role": role} for role in world.roles},
                "narrowed": {"role": "admin", "scopes": narrowed},
                "expiring": {"role": "admin", "expire_time": SOON},
                "of few calls": {"role": "admin", "calls_per_minute": 1000},
                "of few executions": {"role": "steward", "calls_per_minute": 900, "executions_per_minute": 10},
            }
            for name, options in described.items():
                for keys in (world.holders, world.victims):
                    keys[name] = await world.holder(await admin.auth.create_api_key(name, **options))
        yield world


MAKERS = (*scopes.ROLES, *CUSTOM_ROLES, "narrowed", "expiring", "of few calls", "of few executions")


@pytest.mark.parametrize("maker", MAKERS)
async def test_no_key_that_is_made_exceeds_its_maker(world: World, maker: str) -> None:
    giver = world.holders[maker]
    mine = {"expire_time": giver.key.expire_time if end(giver.key) else None, "limits": giver.key.limits}
    soon, later = Timestamp(), Timestamp()
    soon.FromDatetime(SOON)
    later.FromDatetime(LATER)
    asked = [
        dict(mine, role=role, scopes=kept)
        for role, allowed in world.roles.items()
        for kept in ([], sorted(allowed & giver.scopes))
    ]
    for ending, calls, executions in (
        (None, 0, 0),
        (None, 900, 10),
        (soon, 0, 0),
        (soon, 900, 10),
        (soon, 1001, 10),
        (soon, 900, 11),
        (later, 900, 10),
    ):
        limits = auth_pb2.KeyLimits(calls_per_minute=calls, executions_per_minute=executions)
        asked.append({"role": "admin", "scopes": sorted(giver.scopes)[:1], "expire_time": ending, "limits": limits})
    made = 0
    for fields in asked:
        request = auth_pb2.CreateApiKeyRequest(name="made", **fields)
        wanted = frozenset(request.scopes) or world.roles[request.role]
        key = await world.gives("AuthService.CreateApiKey", request, giver, giver.holds(wanted, request))
        if key is not None:
            assert giver.holds((await world.holder(key)).scopes, key)
            made += 1
    assert made if "keys:write" in giver.scopes else not made


@pytest.mark.parametrize("maker", MAKERS)
async def test_no_key_that_is_rotated_exceeds_the_one_who_rotates_it(world: World, maker: str) -> None:
    giver, rotated = world.holders[maker], 0
    for victim in world.victims.values():
        request = auth_pb2.RotateApiKeyRequest(id=victim.key.id, overlap={"seconds": 3600})
        allowed = giver.holds(victim.scopes, victim.key)
        key = await world.gives("AuthService.RotateApiKey", request, giver, allowed)
        if key is not None:
            got = await world.holder(key)
            assert (got.scopes, end(key), budgets(key)) == (victim.scopes, end(victim.key), budgets(victim.key))
            assert giver.holds(got.scopes, key)
            rotated += 1
    assert rotated if "keys:write" in giver.scopes else not rotated


@pytest.mark.parametrize("maker", MAKERS)
async def test_no_role_that_is_made_exceeds_its_maker(world: World, maker: str) -> None:
    giver = world.holders[maker]
    for parent, kept in (
        *((parent, allowed) for parent, allowed in scopes.ROLES.items()),
        *((parent, allowed & giver.scopes) for parent, allowed in scopes.ROLES.items()),
        *(("admin", {scope}) for scope in sorted(scopes.SCOPES)),
    ):
        if not kept:
            continue
        name = f"{maker.replace(' ', '-')}-{len(world.roles)}"
        request = auth_pb2.CreateRoleRequest(name=name, parent=parent, scopes=sorted(kept))
        role = await world.gives("AuthService.CreateRole", request, giver, giver.holds(kept))
        if role is not None:
            world.roles[name] = frozenset(role.scopes)
            assert giver.scopes >= world.roles[name] == kept


@pytest.mark.parametrize("maker", MAKERS)
async def test_no_role_that_is_assigned_exceeds_the_one_who_assigns_it(world: World, maker: str) -> None:
    giver = world.holders[maker]
    for role, allowed in world.roles.items():
        request = auth_pb2.AssignRoleRequest(user_id=f"user of {maker}", role=role)
        assignment = await world.gives("AuthService.AssignRole", request, giver, giver.holds(allowed))
        assert (assignment is None) or assignment.role == role
    assigned = (await world.wire.call("AuthService.ListRoleAssignments")).reply.role_assignments
    mine = [one for one in assigned if one.creator == giver.key.id]
    assert all(world.roles[one.role] <= giver.scopes for one in mine)
    assert len(mine) == ("roles:write" in giver.scopes and any(one <= giver.scopes for one in world.roles.values()))


async def test_a_key_can_not_prolong_itself_while_it_retires(world: World) -> None:
    """Whoever got hold of a key that is being replaced has it until then."""
    admin = world.holders["admin"]
    request = auth_pb2.CreateApiKeyRequest(name="leaked", role="steward")
    leaked = (await world.wire.call("AuthService.CreateApiKey", request, admin.secret)).reply
    rotation = auth_pb2.RotateApiKeyRequest(id=leaked.id, overlap={"seconds": 60})
    successor = (await world.wire.call("AuthService.RotateApiKey", rotation, admin.secret)).reply
    for method, escape in (
        ("AuthService.RotateApiKey", rotation),
        ("AuthService.RotateApiKey", auth_pb2.RotateApiKeyRequest(id=successor.id)),
        ("AuthService.CreateApiKey", request),
    ):
        answer = await world.wire.call(method, escape, leaked.secret)
        assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "CEILING_EXCEEDED")
    assert (await world.wire.call("AuthService.WhoAmI", key=successor.secret)).code == "OK"


async def test_refusals_name_what_is_missing_and_leave_nothing_behind(world: World) -> None:
    clerk, before = world.holders["steward"], await everything(world)
    lacking = " ".join(sorted(scopes.DEVELOPER - clerk.scopes))
    for method, request in (
        ("CreateApiKey", auth_pb2.CreateApiKeyRequest(name="made", role="developer")),
        ("AssignRole", auth_pb2.AssignRoleRequest(user_id="me", role="developer")),
        (
            "CreateRole",
            auth_pb2.CreateRoleRequest(name="made", parent="developer", scopes=sorted(scopes.DEVELOPER)),
        ),
        ("RotateApiKey", auth_pb2.RotateApiKeyRequest(id=world.holders["developer"].key.id)),
    ):
        answer = await world.wire.call(f"AuthService.{method}", request, clerk.secret)
        assert (answer.code, answer.reason) == ("PERMISSION_DENIED", "CEILING_EXCEEDED")
        assert answer.detail(error_details_pb2.ErrorInfo).metadata["missing_scopes"] == lacking
        assert lacking in answer.text
    assert await everything(world) == before
    assert (await world.wire.call("AuthService.WhoAmI", key=world.holders["developer"].secret)).code == "OK"


async def everything(world: World) -> list[Any]:
    """All keys, roles and assignments."""
    listings = (METHODS[f"AuthService.{name}"] for name in ("ListApiKeys", "ListRoles", "ListRoleAssignments"))
    replies = [(await world.wire.call(method, method.input_type(page_size=200))).reply for method in listings]
    for key in replies[0].api_keys:
        key.ClearField("last_used_time")
    return replies
