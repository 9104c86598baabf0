"""What may be written of requests and parameters: their shape, and of their values those that tell nothing. No I/O."""

import json
import re
from collections.abc import Callable, Mapping, Set
from functools import cache
from typing import Any
from uuid import UUID

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from relay._vendor.buf.validate import validate_pb2
from relay.v1 import policy_pb2

PREFIX_LENGTH = 64
MASK = "*"

# Of names in lower case without separators: "X-Api-Key" and "apiKey" are both "apikey".
_SECRET_NAME = re.compile(
    r"passw(or)?d|passphrase|passcode|pwd|secret|token|authori[sz]ation|credential|cookie|bearer|assertion"
    r"|(api|access|auth|private|signing|encryption|license|account)key|sessionid|^session$|jwt|^otp$|^pin$|^cvv?c?$|^ssn$"
)
_SEPARATORS = re.compile(r"[^0-9a-z]")
# Scheme, user information, host, port. What follows must be a path, a query, a fragment or the end.
_URL = re.compile(
    r"(?P<scheme>https?)://(?:[^/?#@\\\s]*@)?(?P<authority>(?:[0-9a-z.-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?)(?=[/?#]|\Z)",
    re.IGNORECASE,
)
Renderer = Callable[[Any, int], str]  # of a value, within a budget of characters


def masked_prefix(parameters: Any, names: Set[str]) -> str:
    """The first 64 characters of the parameters as JSON, with everything masked that the caller put in.

    names: the field names of the action's schema. Only these stay: values never do, since no list of suspicious names
    is ever complete, and in free-form objects the names are the caller's too.

    >>> masked_prefix({"payload": {"ann@example.com": 5}, "method": "POST"}, {"method", "payload"})
    '{"method":*,"payload":{*:*}}'
    """
    return _mask(parameters, names, PREFIX_LENGTH)[:PREFIX_LENGTH]


def request_prefix(request: Message) -> str:
    """The first 64 characters of a request as JSON: its field names, and values that can't be secrets.

    Numbers, booleans, enums, times, durations and ids stay as they are, and of URLs the origin. Other texts are masked,
    and so is every field that is (sensitive) or has the name of a secret. The request need not be valid.
    """
    return _object(request, PREFIX_LENGTH)[:PREFIX_LENGTH]


def told_apart_by(request: Message) -> bytes:
    """What a request's keyed hash is of: its deterministic bytes, but for its sensitive fields."""
    if _holds_secrets(request.DESCRIPTOR):
        whole, request = request, type(request)()
        request.CopyFrom(whole)
        _clear_secrets(request)
    return request.SerializeToString(deterministic=True)


def origin_of(url: str) -> str:
    """Scheme, host and port of an http or https URL; the mask where it is none."""
    found = _URL.match(url)
    return f"{found['scheme']}://{found['authority']}".lower() if found else MASK


def names_a_secret(name: str) -> bool:
    """Whether a value of this name is a secret by all that is usual, in whatever spelling."""
    return _SECRET_NAME.search(_SEPARATORS.sub("", name.lower())) is not None


def _mask(value: Any, names: Set[str], budget: int) -> str:
    if budget <= 0:
        return ""
    if isinstance(value, dict):
        text = "{"
        for name in sorted(value):
            text += ("" if text == "{" else ",") + (f'"{name}":' if name in names else f"{MASK}:")
            text += _mask(value[name], names, budget - len(text))
            if len(text) >= budget:
                break
        return text + "}"
    if isinstance(value, list):
        return _array(value, lambda one, left: _mask(one, names, left), budget)
    return MASK


def _array(values: Any, render: Renderer, budget: int) -> str:
    """The first of them stands for all."""
    first = render(values[0], budget - 1) if values else ""
    return f"[{first}{',...' if len(values) > 1 else ''}]"


def _object(message: Message, budget: int) -> str:
    renderers = _renderers(message.DESCRIPTOR)
    text = "{"
    for field, value in message.ListFields():
        text += f'{"" if text == "{" else ","}"{field.name}":'
        if len(text) >= budget:
            break
        text += renderers[field.name](value, budget - len(text))
    return text + "}"


@cache
def _renderers(kind: Descriptor) -> Mapping[str, Renderer]:
    """How each field of a message type is written, by its name; made once for each type."""
    return {field.name: _renderer(field) for field in kind.fields}


def _renderer(field: FieldDescriptor) -> Renderer:
    if _is_sensitive(field) or names_a_secret(field.name):
        return _masked
    one = _of_message(field.message_type) if field.message_type else _of_scalar(field)
    if field.message_type and field.message_type.GetOptions().map_entry:
        return lambda _value, _budget: f"{{{MASK}:{MASK}}}"  # its keys are the caller's
    return (lambda values, budget: _array(values, one, budget)) if field.is_repeated else one


def _of_message(kind: Descriptor) -> Renderer:
    match kind.full_name:
        case "google.protobuf.Timestamp" | "google.protobuf.Duration":
            return _moment
        case "google.protobuf.Struct" | "google.protobuf.FieldMask":
            return _masked
    return _object


def _of_scalar(field: Any) -> Renderer:
    rules = field.GetOptions().Extensions[validate_pb2.field]
    texts = rules.repeated.items.string if field.is_repeated else rules.string
    if field.enum_type:
        words = {value.number: f'"{value.name}"' for value in field.enum_type.values}
        return lambda value, _budget: words.get(value, str(value))
    if field.type == field.TYPE_BYTES or (field.type == field.TYPE_STRING and not (texts.uuid or texts.uri)):
        return _masked
    if field.type == field.TYPE_STRING:
        return _id if texts.uuid else _origin
    return lambda value, _budget: json.dumps(value)


def _masked(_value: Any, _budget: int) -> str:
    return MASK


def _moment(value: Any, _budget: int) -> str:
    try:
        return f'"{value.ToJsonString()}"'
    except (ValueError, OverflowError):
        return MASK  # of no year that there is


def _id(value: str, _budget: int) -> str:
    try:
        return f'"{UUID(value)}"' if len(value) == 36 else MASK
    except ValueError:
        return MASK


def _origin(value: str, _budget: int) -> str:
    origin = origin_of(value)
    return origin if origin == MASK else f'"{origin}"'


def _is_sensitive(field: Any) -> bool:
    return bool(field.GetOptions().Extensions[policy_pb2.sensitive])


def _inner(field: FieldDescriptor) -> Descriptor | None:
    """The type of a field that is a message of ours, or several."""
    kind = field.message_type
    return kind if kind and kind.file.package == "relay.v1" and not kind.GetOptions().map_entry else None


@cache
def _holds_secrets(kind: Descriptor) -> bool:
    """No request type contains itself."""
    return any(_is_sensitive(one) or ((inner := _inner(one)) and _holds_secrets(inner)) for one in kind.fields)


def _clear_secrets(message: Message) -> None:
    for field, value in message.ListFields():
        if _is_sensitive(field):
            message.ClearField(field.name)
        elif inner := _inner(field):
            for one in (value if field.is_repeated else (value,)) if _holds_secrets(inner) else ():
                _clear_secrets(one)
