from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Access(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACCESS_UNSPECIFIED: _ClassVar[Access]
    ACCESS_AUTHENTICATED: _ClassVar[Access]
    ACCESS_SCOPED: _ClassVar[Access]
ACCESS_UNSPECIFIED: Access
ACCESS_AUTHENTICATED: Access
ACCESS_SCOPED: Access
POLICY_FIELD_NUMBER: _ClassVar[int]
policy: _descriptor.FieldDescriptor
SENSITIVE_FIELD_NUMBER: _ClassVar[int]
sensitive: _descriptor.FieldDescriptor

class Policy(_message.Message):
    __slots__ = ("access", "scopes", "calls", "executions", "audited")
    ACCESS_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    EXECUTIONS_FIELD_NUMBER: _ClassVar[int]
    AUDITED_FIELD_NUMBER: _ClassVar[int]
    access: Access
    scopes: _containers.RepeatedScalarFieldContainer[str]
    calls: int
    executions: int
    audited: bool
    def __init__(self, access: _Optional[_Union[Access, str]] = ..., scopes: _Optional[_Iterable[str]] = ..., calls: _Optional[int] = ..., executions: _Optional[int] = ..., audited: _Optional[bool] = ...) -> None: ...
