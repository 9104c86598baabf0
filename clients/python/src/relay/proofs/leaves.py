"""What a leaf of the log says, and whether the values beside it are those that it was made from."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from relay.proofs.notes import Checkpoint
from relay.proofs.tree import ProofError, leaf_hash, verify_inclusion

ORIGIN = "relay/workspaces/"  # and the workspace's id
_SALT = re.compile(r"[0-9a-f]{32}")  # of 16 bytes: one that could be longer or shorter could take from the value
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), sort_keys=True, allow_nan=False).encode


def canonical(leaf: Mapping[str, Any]) -> bytes:
    """The JSON of a leaf as RFC 8785 writes it. Leaves hold texts, integers below 2^53, lists and objects of them."""
    return _encode(leaf).encode()


def commitment(salt: bytes, value: str) -> bytes:
    """What a leaf holds of a value that can be erased."""
    return hashlib.sha256(salt + value.encode()).digest()


def parse(encoded: bytes) -> Any:
    """JSON that says one thing alone: no key twice, no numbers but integers below 2^53, no half characters.

    Raises ProofError.
    """
    try:
        content = _decode(encoded.decode())
        if b"\\u" in encoded:
            canonical(content)  # which half a surrogate pair can't be
        return content
    except (ValueError, RecursionError) as error:
        raise ProofError(f"it is not JSON: {error}") from None


def check_leaf(leaf: Mapping[str, Any], origin: str, values: Mapping[str, str], salts: Mapping[str, str]) -> list[str]:
    """The event is of the log with this origin, and the values are those that it commits to. Raises ProofError.

    values, salts: by name, what is left of them; salts in hex. Returns the names of the values that were erased.
    """
    if f"{ORIGIN}{leaf.get('workspace_id')}" != origin:
        raise ProofError(f"the event is of workspace {leaf.get('workspace_id')}, and the log is {origin}")
    commitments = leaf.get("commitments")
    if not isinstance(commitments, dict):
        raise ProofError("the event has no commitments")
    if values.keys() != salts.keys():
        raise ProofError("there should be a salt for each value, and no other")
    for name, value in values.items():
        salt = salts[name]
        if not (isinstance(value, str) and isinstance(salt, str) and _SALT.fullmatch(salt)):
            raise ProofError(f"{name} should be a text with a salt of 16 bytes")
        if commitments.get(name) != commitment(bytes.fromhex(salt), value).hex():
            raise ProofError(f"{name} is not what it was when the event was logged")
    return [name for name in commitments if name not in values]


def verify_event(
    leaf: bytes,
    index: int,
    path: Sequence[bytes],
    checkpoint: Checkpoint,
    values: Mapping[str, str] | None = None,
    salts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The event with this leaf is number `index` of the log, and these are its values. Raises ProofError.

    As GetInclusionProof answers leaf, path (`hashes`) and salts (in hex); values: those of the event that are to be
    proven, with exactly their salts. Returns the event as the log has it.
    """
    event = parse(leaf)
    if not isinstance(event, dict) or canonical(event) != leaf:
        raise ProofError("the leaf is not canonical JSON of an event")
    verify_inclusion(index, checkpoint.size, leaf_hash(leaf), path, checkpoint.root)
    check_leaf(event, checkpoint.origin, values or {}, salts or {})
    return event


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("an object has a key twice")
    return made


def _int(digits: str) -> int:
    if len(digits) > 17 or abs(number := int(digits)) >= 1 << 53:
        raise ValueError("a number is too large")
    return number


def _no(number: str) -> None:
    raise ValueError(f"{number[:80]} is not an integer")


_decode = json.JSONDecoder(object_pairs_hook=_object, parse_int=_int, parse_float=_no, parse_constant=_no).decode
