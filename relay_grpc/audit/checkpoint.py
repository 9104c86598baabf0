"""Signed statements of what a log holds: C2SP tlog-checkpoint, in a C2SP signed-note. No I/O."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from uuid import UUID

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from relay.proofs import ProofError, VerifierKey, open_checkpoint

ED25519 = b"\x01"  # the signature type of signed-note
_NOTE = re.compile(r"(?P<origin>.+)\n(?P<size>0|[1-9]\d{0,18})\n(?P<root>[A-Za-z0-9+/]{43}=)\n\n\N{EM DASH} ", re.ASCII)


class Signer:
    """Signs with every one of the operator's keys, so that whoever knows any of them can check while keys change.

    keys: Ed25519 seeds of 32 bytes by name. old: public keys whose seeds are lost, and whose signatures still count.
    """

    def __init__(self, keys: Mapping[str, bytes], old: Sequence[VerifierKey] = ()) -> None:
        self._keys = [_Key(name, seed) for name, seed in keys.items()]
        self._old = old

    @property
    def verifier_keys(self) -> list[str]:
        """The public keys as signed-note writes them: NAME+ID+BASE64."""
        return [key.verifier_key for key in self._keys]

    def note(self, workspace_id: UUID, size: int, root: bytes) -> str:
        """The signed checkpoint of a workspace's log."""
        text = _text(workspace_id, size, root)
        return "\n".join([text, *(key.signature(text) for key in self._keys), ""])

    @property
    def names(self) -> list[str]:
        return [key.name for key in self._keys]

    def all_stand_on(self, note: str) -> bool:
        """Whether each of the keys has put its name and id to the note. What that is worth, `signed` tells."""
        return all(key.mark in note for key in self._keys)

    def signed(self, note: str, workspace_id: UUID, size: int, root: bytes) -> bool:
        """Whether this note says that of the log, and one of the keys, or an old one, signed it.

        Ed25519 signs the same text with the same key always to the same signature (RFC 8032, 5.1.6).
        """
        text = _text(workspace_id, size, root)
        if not note.startswith(f"{text}\n"):
            return False
        signatures = note.removeprefix(f"{text}\n").split("\n")
        return any(key.signature(text) in signatures for key in self._keys) or self._old_signed(note)

    def _old_signed(self, note: str) -> bool:
        try:
            return bool(open_checkpoint(note, self._old))
        except ProofError:
            return False


def origin(workspace_id: UUID) -> str:
    """The name of a workspace's log."""
    return f"relay/workspaces/{workspace_id}"


def stated(note: str, workspace_id: UUID) -> tuple[int, bytes]:
    """The size and the root that a note states of this log, whoever signed it. Raises ValueError."""
    found = _NOTE.match(note)
    if found is None or found["origin"] != origin(workspace_id):
        raise ValueError(f"it is no checkpoint of {origin(workspace_id)}")
    return int(found["size"]), base64.b64decode(found["root"])


def _text(workspace_id: UUID, size: int, root: bytes) -> str:
    return f"{origin(workspace_id)}\n{size}\n{base64.b64encode(root).decode()}\n"


class _Key:
    def __init__(self, name: str, seed: bytes) -> None:
        self.name = name
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        public = ED25519 + self._key.public_key().public_bytes_raw()
        self._id = hashlib.sha256(f"{name}\n".encode() + public).digest()[:4]
        # How its signatures begin: 5 letters of base64 are 30 of the id's 32 bits, whatever follows.
        self.mark = f"\n\N{EM DASH} {name} {base64.b64encode(self._id).decode()[:5]}"
        self.verifier_key = f"{name}+{self._id.hex()}+{base64.b64encode(public).decode()}"

    def signature(self, text: str) -> str:
        signed = base64.b64encode(self._id + self._key.sign(text.encode())).decode()
        return f"\N{EM DASH} {self.name} {signed}"
