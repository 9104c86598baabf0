"""Is the request what the API says: it parses, and every field is within its bounds (protovalidate)."""

from collections.abc import Iterator
from typing import Any

import protovalidate
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from relay_grpc import errors
from relay_grpc.call import Call, Method
from relay_grpc.interceptors.base import Handler

_validator = protovalidate.Validator()


def validation(method: Method, handler: Handler) -> Handler:
    """Layer: turns the request's bytes into its message."""
    parse = method.input_type.FromString
    _validator.collect_violations(method.input_type())  # compiles the rules now, not in the first call

    async def validated(call: Call, request: Any) -> Any:
        try:
            call.request = message = parse(request)
        except DecodeError as error:
            raise errors.InvalidRequest([("", f"the bytes are not a {method.input_type.__name__}")]) from error
        try:
            _validator.validate(message)
        except protovalidate.ValidationError as error:
            violations = [violation.proto for violation in error.violations]
            raise errors.InvalidRequest([(_path(one), one.message) for one in violations]) from None
        if unkeepable := list(_unkeepable(message)):
            raise errors.InvalidRequest(unkeepable)
        return await handler(call, message)

    return validated


def _path(violation: Any) -> str:
    """The field's path, such as "webhook.url" or "scopes[1]". The key of a map may be as secret as its value."""
    path = ""
    for element in violation.field.elements:
        subscript = element.subscript
        index = f"[{subscript.value}]" if subscript and subscript.field == "index" else ""
        path += f"{'.' if path else ''}{element.field_name}{index}"
    return path


def _unkeepable(message: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """What no rule speaks of and no column can hold. What a Struct may hold is for its action to say."""
    for field, value in message.ListFields():
        path = f"{above}{field.name}"
        if isinstance(value, Timestamp):
            try:
                value.ToDatetime()
            except (ValueError, OverflowError):
                yield path, "should be a time of the years 1 to 9999"
        elif field.type == field.TYPE_STRING:
            if "\0" in "".join(value):  # of one text, or of a repeated field's
                yield path, "must not contain the character NUL"
        elif not field.message_type or isinstance(value, Struct) or field.message_type.GetOptions().map_entry:
            continue  # a map's rules say what its texts may hold
        elif field.is_repeated:
            for index, one in enumerate(value):
                yield from _unkeepable(one, f"{path}[{index}].")
        else:
            yield from _unkeepable(value, f"{path}.")
