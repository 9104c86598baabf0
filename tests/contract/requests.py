"""Requests made from the rules of their fields (buf.validate): one that fits, and all that are just out of bounds."""

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import protovalidate
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from relay._vendor.buf.validate import validate_pb2

VALIDATOR = protovalidate.Validator()
SECRET = "whsec_" + "A" * 88
OPAQUE = ("google.protobuf.Struct", "google.protobuf.Duration", "google.protobuf.FieldMask")
TIMESTAMP = "google.protobuf.Timestamp"

# A text at the edge of each pattern, and one beyond it. A new pattern needs its own.
PATTERNS = {
    "^[a-z][a-z0-9-]{0,62}$": ("a" * 63, "a" * 64),
    "^[a-z]{1,32}:[a-z]{1,32}$": ("a" * 32 + ":" + "b" * 32, "a" * 33 + ":b"),
    r"^[a-z][a-z0-9_]{0,31}(\.[a-z][a-z0-9_]{0,31}){1,3}$": ("a" * 32 + ".b.c.d", "a" * 33 + ".b.c.d"),
    "^([0-9a-f]{64})?$": ("f" * 64, "f" * 65),
    "^[0-9a-f]{64}$": ("f" * 64, "f" * 63),
    "^[!-~]{0,255}$": ("~" * 255, "~" * 256),
    "^(whsec_[A-Za-z0-9+/]{32,88}={0,2})?$": (SECRET, SECRET + "A"),
    "^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$": ("x" * 64, "x" * 65),
    "^[ -~]*$": ("~ !", "\x7f"),
}

# By kind and name of a rule: from its bound, a value that just keeps it and one that just breaks it. A new kind of rule
# needs a line here.
EDGES: dict[tuple[str, str], Callable[[Any], tuple[Any, Any]]] = {
    ("string", "min_len"): lambda n: ("x" * n, "x" * (n - 1)),
    ("string", "max_len"): lambda n: ("x" * n, "x" * (n + 1)),
    ("string", "max_bytes"): lambda n: (_url(n), _url(n + 1)),
    ("string", "pattern"): PATTERNS.__getitem__,
    ("string", "uuid"): lambda _: (str(UUID(int=1)), str(UUID(int=1))[:-1]),
    ("string", "uri"): lambda _: ("http://127.0.0.1:9", "127.0.0.1"),
    ("string", "in"): lambda allowed: (allowed[0], allowed[0] + "x"),
    ("int32", "gte"): lambda n: (n, n - 1),
    ("int32", "lte"): lambda n: (n, n + 1),
    ("int64", "gte"): lambda n: (n, n - 1),
    ("duration", "gte"): lambda bound: (bound, _later(bound, -1)),
    ("duration", "lte"): lambda bound: (bound, _later(bound, 1)),
    ("timestamp", "gt_now"): lambda _: (Timestamp(seconds=253402300799), Timestamp(seconds=1)),
    ("enum", "defined_only"): lambda _: (1, 99),
    ("enum", "in"): lambda allowed: (allowed[0], 0),
    ("enum", "not_in"): lambda refused: (1, refused[0]),
    ("repeated", "min_items"): lambda n: (_scopes(n), _scopes(n - 1)),
    ("repeated", "max_items"): lambda n: (_scopes(n), _scopes(n + 1)),
    ("repeated", "unique"): lambda _: (_scopes(1), _scopes(1) * 2),
    ("map", "max_pairs"): lambda n: (dict.fromkeys(_scopes(n, ""), "x"), dict.fromkeys(_scopes(n + 1, ""), "x")),
}


@dataclass(frozen=True)
class Edge:
    """A rule of a request's field, and values for `put`. inside: just keeps it; outside: just breaks it."""

    fields: tuple[FieldDescriptor, ...]
    rule: str
    inside: Any
    outside: Any
    index: str = ""

    @property
    def path(self) -> str:
        return told(self.fields) + self.index


def told(fields: tuple[FieldDescriptor, ...]) -> str:
    """The path that a violation tells for the first of each list on the way to a field."""
    inner = [one.name + ("[0]" if one.is_repeated else "") for one in fields[:-1]]
    return ".".join((*inner, fields[-1].name))


def rules_of(field: FieldDescriptor) -> Any:
    return field.GetOptions().Extensions[validate_pb2.field]


def fitting(kind: Descriptor) -> Any:
    """The smallest message that breaks no rule."""
    message = GetMessageClass(kind)()
    for violation in VALIDATOR.collect_violations(message):
        name = violation.proto.field.elements[0].field_name
        oneof = kind.oneofs_by_name.get(name)
        field = oneof.fields[0] if oneof else kind.fields_by_name[name]
        put(message, (field,), _fit(field))
    return message


def edges(kind: Descriptor) -> Iterator[Edge]:
    """Every rule of every field, nested ones included."""
    for fields in all_fields(kind):
        rules, repeated = rules_of(fields[-1]), fields[-1].is_repeated
        if rules.required:
            yield Edge(fields, "required", fitting(fields[-1].message_type), None)
        yield from _edges_of(fields, rules)
        if repeated:
            for edge in _edges_of(fields, rules.repeated.items):
                yield Edge(fields, f"items.{edge.rule}", [edge.inside], [edge.outside], "[0]")
        for edge in _edges_of(fields, rules.map.keys):
            yield Edge(fields, f"keys.{edge.rule}", {edge.inside: "x"}, {edge.outside: "x"})
        for edge in _edges_of(fields, rules.map.values):
            yield Edge(fields, f"values.{edge.rule}", {"x": edge.inside}, {"x": edge.outside})


def _edges_of(fields: tuple[FieldDescriptor, ...], rules: Any) -> Iterator[Edge]:
    kind = rules.WhichOneof("type")
    for rule, bound in getattr(rules, kind).ListFields() if kind else ():
        if rule.name in ("items", "keys", "values"):
            continue
        inside, outside = EDGES[kind, rule.name](bound)
        if kind == "repeated" and fields[-1].enum_type:
            inside, outside = (_numbered(items) for items in (inside, outside))
        if kind == "repeated" and fields[-1].message_type:
            inside, outside = ([Duration(seconds=1)] * len(items) for items in (inside, outside))
        yield Edge(fields, rule.name, inside, outside)


def all_fields(kind: Descriptor, above: tuple[FieldDescriptor, ...] = ()) -> Iterator[tuple[FieldDescriptor, ...]]:
    """The way to every field of a message and of those inside it."""
    for field in kind.fields:
        yield (*above, field)
        inner = field.message_type
        if inner and inner.full_name not in (*OPAQUE, TIMESTAMP) and not inner.GetOptions().map_entry:
            yield from all_fields(inner, (*above, field))


def put(message: Message, fields: tuple[FieldDescriptor, ...], value: Any) -> None:
    """Sets a field, of the first of each list on the way to it, or clears it for None."""
    for field in fields[:-1]:
        inner = getattr(message, field.name)
        message = inner if not field.is_repeated else inner[0] if inner else inner.add()
    name = fields[-1].name
    message.ClearField(name)
    if isinstance(value, Message):
        getattr(message, name).CopyFrom(value)
        getattr(message, name).SetInParent()
    elif isinstance(value, list):
        getattr(message, name).extend(value)
    elif isinstance(value, dict):
        getattr(message, name).update(value)
    elif value is not None:
        setattr(message, name, value)


def _numbered(items: list[str]) -> list[int]:
    """As many enum values as there are items, equal where those are."""
    return [sorted(set(items)).index(item) + 1 for item in items]


def _fit(field: FieldDescriptor) -> Any:
    if field.message_type:
        return fitting(field.message_type)
    rules = rules_of(field)
    kind = rules.WhichOneof("type")
    if kind == "repeated":
        return _scopes(1)
    inside = [EDGES[kind, rule.name](bound)[0] for rule, bound in getattr(rules, kind).ListFields()]
    return min((value for value in inside if value), key=lambda value: len(str(value)))


def _url(length: int) -> str:
    return "https://relay.example/".ljust(length, "x")


def _later(duration: Duration, nanoseconds: int) -> Duration:
    later = Duration()
    later.FromNanoseconds(duration.ToNanoseconds() + nanoseconds)
    return later


def _scopes(count: int, end: str = ":read") -> list[str]:
    letters = str.maketrans(string.digits, string.ascii_lowercase[:10])
    return [f"{str(i).translate(letters)}{end}" for i in range(count)]
