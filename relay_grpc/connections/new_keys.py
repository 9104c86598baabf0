"""New signing keys, as callers ask for them. No I/O."""

from dataclasses import dataclass, field

from relay.v1 import connections_pb2

from relay_grpc import errors
from relay_grpc.actions import signing
from relay_grpc.actions.signing import Scheme
from relay_grpc.connections.messages import SCHEMES

_SCHEMES = {number: scheme for scheme, number in SCHEMES.items()}


@dataclass(frozen=True, slots=True)
class NewKey:
    """raw: what is kept. told: the secret as the answer has it; empty for Ed25519, whose public key it has."""

    scheme: Scheme
    raw: bytes = field(repr=False)
    told: str = field(repr=False)


def new_key(scheme: connections_pb2.SignatureScheme, signing_secret: str, *, otherwise: Scheme) -> NewKey:
    """The given HMAC secret, or a key that is made here. otherwise: the scheme where none is named.

    Raises errors.InvalidRequest.
    """
    wanted = _SCHEMES.get(scheme, otherwise)
    if wanted is Scheme.ED25519:
        if signing_secret:
            raise errors.InvalidRequest([("signing_secret", "is made by the server for Ed25519: leave it empty")])
        return NewKey(wanted, signing.new_ed25519(), "")
    told = signing_secret or signing.new_secret()
    try:
        return NewKey(wanted, signing.decode_secret(told), told)
    except ValueError as error:
        raise errors.InvalidRequest([("signing_secret", str(error))]) from None
