"""Checkpoints: what a log was, signed. C2SP tlog-checkpoint, in a C2SP signed-note with Ed25519."""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from relay.proofs.tree import ProofError

MAX_NOTE = 1 << 20  # bytes; signed-note asks for 16 signatures at least, of up to 5 kB
ED25519 = b"\x01"  # its signature type
_SIZE = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """The public key of a log. id: 4 bytes. public: 32 bytes."""

    name: str
    id: bytes
    public: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """A key as signed-note writes it: NAME+ID+BASE64. Raises ProofError."""
        name, _, rest = text.partition("+")
        id_, _, encoded = rest.partition("+")
        if not (_is_name(name) and re.fullmatch(r"[0-9a-f]{8}", id_)):
            raise ProofError(f"{text!r} is no verifier key: it should be NAME+ID+BASE64, with an id of 8 hex digits")
        typed = _base64(encoded, f"verifier key {name}")
        if len(typed) != 33 or typed[:1] != ED25519:
            raise ProofError(f"verifier key {name} is no Ed25519 key")
        key = cls(name, bytes.fromhex(id_), typed[1:])
        if hashlib.sha256(f"{name}\n".encode() + typed).digest()[:4] != key.id:
            raise ProofError(f"verifier key {name} has the id of another key: was it copied whole?")
        return key

    def check(self, signature: bytes, text: bytes) -> None:
        """Raises ProofError unless this key made the signature."""
        try:
            from cryptography.exceptions import InvalidSignature
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        except ModuleNotFoundError:
            raise ProofError("signatures are checked with 'cryptography': pip install 'relay-client[verify]'") from None
        try:
            Ed25519PublicKey.from_public_bytes(self.public).verify(signature, text)
        except (InvalidSignature, ValueError):
            raise ProofError(f"the checkpoint's signature by {self.name}+{self.id.hex()} is wrong") from None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log was. origin: its name. root: 32 bytes. signers: names of the known keys that signed it."""

    origin: str
    size: int
    root: bytes
    signers: tuple[str, ...]


def open_checkpoint(note: bytes | str, keys: Sequence[VerifierKey]) -> Checkpoint:
    """The checkpoint in a note that at least one of the keys signed.

    Signatures by other keys are ignored; one that claims a known key and is not by it makes the note worthless.
    Raises ProofError.
    """
    if not keys:
        raise ProofError("there is no verifier key to check the checkpoint with")
    text, signatures = _parts(note)
    known = {(key.name, key.id): key for key in keys}
    if any(known[key.name, key.id] != key for key in keys):
        raise ProofError("two of the verifier keys have the same name and id")
    signers: dict[str, None] = {}
    for name, id_, signature in signatures:
        if key := known.get((name, id_)):
            key.check(signature, text.encode())
            signers[name] = None
    if not signers:
        names = ", ".join(sorted({f"{name}+{id_.hex()}" for name, id_, _ in signatures}))
        raise ProofError(f"none of the verifier keys signed the checkpoint; its signatures are by {names}")
    return _stated(text, tuple(signers))


def _parts(note: bytes | str) -> tuple[str, list[tuple[str, bytes, bytes]]]:
    """The text of a note, and its signatures: name, key id, signature."""
    if len(note) > MAX_NOTE:
        raise ProofError("the checkpoint is too long")
    try:
        whole = note.decode() if isinstance(note, bytes) else note
        whole.encode()
    except UnicodeError:
        raise ProofError("the checkpoint is not UTF-8 text") from None
    if any(letter < " " and letter != "\n" for letter in whole):
        raise ProofError("the checkpoint has control characters in it")
    text, blank, lines = whole.rpartition("\n\n")
    if not (text and blank and lines.endswith("\n")):
        raise ProofError("the checkpoint should be a text, an empty line, and lines of signatures, each with a newline")
    return f"{text}\n", [_signature(line) for line in lines[:-1].split("\n")]


def _signature(line: str) -> tuple[str, bytes, bytes]:
    dash, _, rest = line.partition(" ")
    name, _, encoded = rest.partition(" ")
    if dash != "\N{EM DASH}" or not _is_name(name):
        raise ProofError(f"the checkpoint has a line among its signatures that is none: {line[:80]!r}")
    signed = _base64(encoded, f"the checkpoint's signature by {name}")
    if len(signed) < 5:
        raise ProofError(f"the checkpoint's signature by {name} is too short")
    return name, signed[:4], signed[4:]


def _stated(text: str, signers: tuple[str, ...]) -> Checkpoint:
    lines = text.removesuffix("\n").split("\n")
    if len(lines) < 3 or not all(lines):
        raise ProofError("the checkpoint should be an origin, a size and a root, each on a line")
    origin, size, root = lines[:3]
    if not _SIZE.fullmatch(size):
        raise ProofError(f"the checkpoint's size is not a size: {size[:80]!r}")
    hashed = _base64(root, "the checkpoint's root")
    if len(hashed) != 32:
        raise ProofError("the checkpoint's root should have 32 bytes")
    return Checkpoint(origin, int(size), hashed, signers)


def _is_name(name: str) -> bool:
    return bool(name) and "+" not in name and not any(letter.isspace() for letter in name)


def _base64(text: str, what: str) -> bytes:
    """Canonical base64 alone (RFC 4648, 4 and 3.5), so that nothing has two spellings."""
    try:
        decoded = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        decoded = b""
    if not decoded or base64.b64encode(decoded).decode() != text:
        raise ProofError(f"{what} is not base64")
    return decoded
