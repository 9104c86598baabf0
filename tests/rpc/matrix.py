"""Every RPC x every caller x every kind of name, and what each of these calls may answer.

Made from the descriptors and their policies; resources.py says what the fields name.
"""

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from relay_grpc.auth import keys
from relay_grpc.auth.scopes import ROLES
from relay_grpc.call import Method
from tests.auth.issuer import Issuer
from tests.rpc.resources import FILTERS, FREE, NAMES, Estate, Kind, Neighbours, nobodys, request
from tests.rpc.wire import Answer

OK = ("OK", "")
NOT_FOUND = ("NOT_FOUND", "RESOURCE_NOT_FOUND")
WORKSPACE = "x-relay-workspace"


@dataclass(frozen=True, eq=False)
class Caller:
    """Somebody at the door.

    key: or a user's token; None for a new key that nobody made. role: None where the credential is no good.
    """

    name: str
    estate: Estate
    key: str | None
    role: str | None = None

    @property
    def is_user(self) -> bool:
        return self.key is not None and not self.key.startswith("rk_")

    def may(self, method: Method) -> bool:
        return self.role is not None and method.scopes <= ROLES[self.role]


@dataclass(frozen=True)
class Cell:
    """One call and its answer. whose: the name in `field` is its caller's "own", "foreign" or "nobody's"."""

    caller: Caller
    whose: str
    answer: Answer
    field: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.caller.name}, {self.whose} {self.field}".strip()

    @property
    def end(self) -> tuple[str, str]:
        """A tail that told something until its caller's time was over is a success."""
        if self.answer.code == "OK" or (self.answer.code == "DEADLINE_EXCEEDED" and self.answer.replies):
            return OK
        return self.answer.code, self.answer.reason

    @property
    def told(self) -> str:
        """What its caller can read of the answer, but for what it had asked about."""
        replies = " ".join(reply.SerializeToString().decode("utf-8", "replace") for reply in self.answer.replies)
        answer = self.answer
        kept = {name: value for name, value in answer.trailing.items() if not name.startswith("ratelimit-")}
        text = f"{replies} {answer.text} {answer.status} {kept}"
        if request_id := answer.trailing.get("x-request-id"):
            text = text.replace(str(request_id), "...")
        return text.replace(self.name, "...") if self.name else text


class Matrix:
    """Two tenants that each try the other's names on a server, and their callers."""

    def __init__(self, neighbours: Neighbours, callers: list[Caller]) -> None:
        self._callers = callers
        self._tenants = ((neighbours.ours, neighbours.theirs), (neighbours.theirs, neighbours.ours))
        self._wire = neighbours.wire
        self._peers = count(1)
        self._asked: set[str] = set()  # others' names that somebody named: the log tells each tenant what it named

    async def breaches(self, method: Method) -> list[str]:
        """What a method lets through that it must not, in a line each."""
        found: list[str] = []
        for estate, other in self._tenants:
            foreign = other.standing | {Kind.PAGE_TOKEN: await self._next_page(method, other)}
            workspace = str(other.tenant.workspace_id)
            callers = [
                (caller, foreign | {kind: await other.taken(kind) for kind in self._given(method, caller)})
                for caller in self._callers
                if caller.estate is estate
            ]
            before = await other.rows()
            cells = [cell for caller, names in callers async for cell in self._cells(method, caller, names, workspace)]
            after = await other.rows()
            found += [f"a row changed: {row}" for row in before ^ after]
            self._asked |= {cell.name for cell in cells}
            asked = "\n".join(self._asked)  # whole or cut off: prefixes of parameters have 64 characters
            marks = {mark for mark in other.marks_in(after) - await estate.marks() if mark not in asked}
            for cell in cells:
                told = cell.told
                found += [f"{cell}: tells {mark}" for mark in marks if mark in told]
            found += _wrong(method, cells)
        return found

    def _given(self, method: Method, caller: Caller) -> set[Kind]:
        """The kinds of names that a caller's success takes."""
        return FREE & set(NAMES[method.name].values()) if caller.may(method) else set()

    async def _cells(
        self, method: Method, caller: Caller, foreign: dict[Kind, str], workspace: str
    ) -> AsyncIterator[Cell]:
        names = NAMES[method.name]

        async def cell(whose: str, field: str = "", name: str = "") -> Cell:
            values = {field: name} if field else {}
            for other_field, kind in names.items():
                if other_field != field and kind is not Kind.PAGE_TOKEN:
                    new = caller.may(method) or kind in FREE
                    own = await caller.estate.new(kind, caller.key or "") if new else caller.estate.standing[kind]
                    values[other_field] = own
            return Cell(caller, whose, await self._call(method, caller, request(method, values)), field, name)

        for field, kind in names.items():
            yield await cell("foreign", field, foreign[kind])
            if not caller.may(method):
                break  # nobody looks at what they ask for
            yield await cell("nobody's", field, nobodys(kind))
        if caller.may(method) and names:
            new = {field: nobodys(kind) for field, kind in names.items() if kind in FREE}
            yield Cell(caller, "no", await self._call(method, caller, request(method, new)))
        if caller.role == "admin":
            for whose, name in (("foreign", workspace), ("nobody's", nobodys(Kind.CONNECTION))):
                answer = await self._call(method, caller, request(method, {}), x_relay_workspace=name)
                yield Cell(caller, whose, answer, WORKSPACE, name)
        if caller.role is not None or not names:
            yield await cell("own")

    async def _call(self, method: Method, caller: Caller, message: Message, **metadata: str) -> Answer:
        """From an address of its own, for wrong credentials are counted by address."""
        number = next(self._peers)
        key = keys.generate(live=False).text if caller.key is None else caller.key
        peer = f"10.100.{100 + number // 100}.{100 + number % 100}"
        return await self._wire.call(method, message, key, x_forwarded_for=peer, **metadata)

    async def _next_page(self, method: Method, estate: Estate) -> str:
        """Where this tenant's second page begins."""
        names = NAMES[method.name]
        if Kind.PAGE_TOKEN not in names.values():
            return ""
        required = {field: estate.standing[names[field]] for field in names if field == "execution_id"}
        message: Any = request(method, required)
        if "page_size" not in message.DESCRIPTOR.fields_by_name:
            return nobodys(Kind.PAGE_TOKEN)
        message.page_size = 1
        answer = await self._wire.call(method, message, estate.tenant.admin)
        if answer.code == "UNIMPLEMENTED":
            return nobodys(Kind.PAGE_TOKEN)
        token = str(answer.reply.next_page_token)
        assert token, f"{method.name} has no second page to ask for"
        return token


def _wrong(method: Method, cells: list[Cell]) -> Iterator[str]:
    """Answers that are not what the policy says, and names of others that don't answer like nobody's."""
    unbuilt = any(cell.answer.code == "UNIMPLEMENTED" for cell in cells)
    nobodys = {(cell.caller, cell.field): cell for cell in cells if cell.whose == "nobody's"}
    refusals = {cell.answer.text for cell in cells if cell.caller.role is None}
    if len(refusals) > 1:
        yield f"credentials that are no good are told apart: {refusals}"
    for cell in cells:
        expected = _expected(method, cell, unbuilt=unbuilt)
        if cell.end not in expected:
            yield f"{cell}: {cell.end} {cell.answer.text}"
        if cell.whose == "foreign" and (like := nobodys.get((cell.caller, cell.field))):
            free = NAMES[method.name].get(cell.field) in FREE
            if (cell.end, _gist(cell, free)) != (like.end, _gist(like, free)):
                yield f"{cell}: {_gist(cell, free)} and not {_gist(like, free)}"


def _expected(method: Method, cell: Cell, *, unbuilt: bool) -> set[tuple[str, str]]:
    """How a call may end: code and reason."""
    if cell.caller.role is None:
        return {("UNAUTHENTICATED", "CREDENTIALS_INVALID")}
    invalid = ("INVALID_ARGUMENT", "INVALID_REQUEST")
    if cell.field == WORKSPACE:
        return {("PERMISSION_DENIED", "ROLE_MISSING") if cell.caller.is_user else invalid}
    if not cell.caller.may(method):
        return {("PERMISSION_DENIED", "SCOPE_MISSING")}
    if unbuilt:
        return {("UNIMPLEMENTED", "METHOD_UNIMPLEMENTED")}
    if cell.whose == "own":
        return {OK}
    if cell.whose == "no":
        return {OK, NOT_FOUND, invalid}
    kind = NAMES[method.name][cell.field]
    if kind in (Kind.PAGE_TOKEN, Kind.CURSOR):
        return {invalid}
    unfound = kind in FREE | {Kind.SECRET} or (method.name, cell.field) in FILTERS
    return {OK} if unfound else {NOT_FOUND}


def _gist(cell: Cell, free: bool) -> str:
    """What an answer says, but for the name it was asked about. free: and but for what is new in each of its like."""
    if free and cell.answer.code == "OK":
        return str([sorted(_filled(reply)) for reply in cell.answer.replies])
    return cell.told


def _filled(message: Message, above: str = "") -> Iterator[str]:
    """The fields of a message that are set, true flags among them."""
    for field, value in message.ListFields():
        yield f"{above}{field.name}"
        if isinstance(value, Message) and not isinstance(value, Timestamp):
            yield from _filled(value, f"{above}{field.name}.")


async def matrix_of(neighbours: Neighbours) -> Matrix:
    """The matrix of these two and everybody who tries something."""
    ours, theirs, issuer = neighbours.ours, neighbours.theirs, neighbours.issuer
    callers = [*await _strangers(ours, issuer), *_keys(ours), *await _users(ours, issuer), *_keys(theirs)[:1]]
    return Matrix(neighbours, callers)


def _keys(estate: Estate) -> list[Caller]:
    """A key of each role, the admin's first."""
    return [Caller(f"{estate.mark} {role}", estate, getattr(estate.tenant, role), role) for role in ROLES]


async def _users(estate: Estate, issuer: Issuer) -> list[Caller]:
    """A user with each role."""
    callers = []
    for role in ROLES:
        await estate.give_role(user := f"{estate.mark}-{role}-user", role)
        callers.append(Caller(user, estate, issuer.token(issuer.claims(sub=user)), role))
    return callers


async def _strangers(estate: Estate, issuer: Issuer) -> list[Caller]:
    """Whoever presents a credential that is no good, or none."""
    ended = {}
    for name in ("revoked_at", "expires_at", "retires_at"):
        ended[name] = await estate.new(Kind.SECRET)
        await estate.postgres.execute(
            f"UPDATE api_keys SET {name} = now() WHERE public_id = $1", keys.public_id_of(ended[name])
        )
    good = estate.tenant.admin
    credentials = {
        "no key": "",
        "a key with a typing error": good[:-1] + ("x" if good[-1] != "x" else "y"),
        "a text that is no key": "letmein",
        "a key that nobody made": None,
        "a revoked key": ended["revoked_at"],
        "an expired key": ended["expires_at"],
        "a key whose overlap is over": ended["retires_at"],
        "a token of another issuer": issuer.token(issuer.claims(iss="https://elsewhere.example")),
        "a token for another audience": issuer.token(issuer.claims(aud="elsewhere")),
    }
    return [Caller(name, estate, key) for name, key in credentials.items()]
