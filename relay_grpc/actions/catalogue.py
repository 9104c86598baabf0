"""The actions that Relay knows, and what their parameters must look like. No I/O."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jsonschema_rs
import rfc8785

from relay_grpc import errors
from relay_grpc.actions.execution import Delivery

MAX_PARAMETERS_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_VALUES = 10_000


@dataclass(frozen=True, slots=True)
class Effects:
    """relay.v1.Effects, with the defaults of the Model Context Protocol's tool annotations."""

    read_only: bool = False
    destructive: bool = True
    idempotent: bool = False
    open_world: bool = True


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of the catalogue. schema: a JSON Schema (draft 2020-12) of the parameters; names: its field names."""

    name: str
    version: int
    title: str
    description: str
    provider: str
    schema: Mapping[str, Any]
    delivery: Delivery
    effects: Effects = Effects()
    names: frozenset[str] = field(init=False)
    _validator: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", frozenset(_names(self.schema)))
        object.__setattr__(self, "_validator", jsonschema_rs.validator_for(dict(self.schema), mask="the value"))

    def canonical(self, parameters: Mapping[str, Any]) -> str:
        """The parameters as canonical JSON (RFC 8785), once they fit the bounds and the schema.

        Raises InvalidRequest naming every field that does not, in the schema's words: a name that is none of them may
        be a secret as well as a value.
        """
        _bound(parameters)
        violations = [self._violation(error) for error in self._validator.iter_errors(parameters)]
        if violations:
            raise errors.InvalidRequest(violations)
        text = rfc8785.dumps(dict(parameters)).decode()
        if len(text.encode()) > MAX_PARAMETERS_BYTES:
            raise errors.InvalidRequest([("parameters", f"more than {MAX_PARAMETERS_BYTES} bytes of canonical JSON")])
        return text

    def _violation(self, error: Any) -> tuple[str, str]:
        path = [str(part) if isinstance(part, int) or part in self.names else "*" for part in error.instance_path]
        problem = error.message
        if error.kind.name in _ABOUT_NAMES:
            problem = f"has a field that {self.name} does not know; it knows {', '.join(sorted(self.names))}"
        return ".".join(("parameters", *path)), problem


# Rules whose messages quote names that the caller chose.
_ABOUT_NAMES = {"additionalProperties", "unevaluatedProperties", "propertyNames"}


def _names(schema: Any) -> Iterator[str]:
    """The names of all properties that a schema declares, at any depth."""
    if isinstance(schema, Mapping):
        yield from schema.get("properties", {})
        for part in schema.values():
            yield from _names(part)


def _bound(parameters: Mapping[str, Any]) -> None:
    """Refuses what is too deep or too much to look at, before anything recursive looks at it."""
    count = 0
    waiting: list[tuple[Any, int]] = [(parameters, 1)]
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise errors.InvalidRequest([("parameters", f"more than {MAX_DEPTH} levels deep")])
        if count > MAX_VALUES:
            raise errors.InvalidRequest([("parameters", f"more than {MAX_VALUES} values")])
        if isinstance(value, float) and not math.isfinite(value):
            raise errors.InvalidRequest([("parameters", "numbers must be finite")])
        waiting.extend((child, depth + 1) for child in _children(value))


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


_WEBHOOK = {
    "type": "object",
    "properties": {
        "payload": {"type": "object", "description": "The body, sent as canonical JSON (RFC 8785)."},
        "method": {"enum": ["POST", "PUT", "PATCH"], "default": "POST", "description": "The HTTP method."},
    },
    "required": ["payload"],
    "additionalProperties": False,
}

CATALOGUE = (
    Action(
        name="webhook.send",
        version=1,
        title="Send a webhook",
        description="Sends a JSON object to the connection's URL, signed as Standard Webhooks says.",
        provider="independent",
        schema=_WEBHOOK,
        delivery=Delivery.AT_LEAST_ONCE,
    ),
    Action(
        name="webhook.send_once",
        version=1,
        title="Send a webhook at most once",
        description="As webhook.send, for receivers that can't deduplicate: a delivery whose outcome is not known is "
        "never repeated, and waits for ReconcileExecution.",
        provider="independent",
        schema=_WEBHOOK,
        delivery=Delivery.AT_MOST_ONCE,
    ),
)


def find(name: str) -> Action:
    """Raises NotFound."""
    for action in CATALOGUE:
        if action.name == name:
            return action
    raise errors.NotFound("action", name)
