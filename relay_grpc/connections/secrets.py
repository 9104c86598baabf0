"""Secrets at rest: envelope encryption with AES-256-GCM. No I/O.

Each secret has a key of its own, which is encrypted by one of the operator's keys. Both layers are bound, as additional
authenticated data, to the workspace, the connection and the secret, so that a row moved elsewhere does not decrypt.
"""

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12
HEADERS = "headers"  # the kind of secret, beside signing.Scheme, that holds a JSON object of header values


class Undecryptable(Exception):
    """The key that this secret needs is not there, or the row was tampered with."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """An encrypted secret, column by column. wrapped_key and ciphertext begin with their nonces."""

    encryption_key_id: str
    wrapped_key: bytes
    ciphertext: bytes


class Vault:
    """Encrypts with the first of the operator's keys, and decrypts with whichever a secret names."""

    def __init__(self, encryption_keys: Mapping[str, bytes]) -> None:
        self._keys = {id_: AESGCM(key) for id_, key in encryption_keys.items()}
        self._current = next(iter(self._keys))

    def seal(self, secret: bytes, *, workspace_id: UUID, connection_id: UUID, secret_id: UUID) -> Sealed:
        binding = workspace_id.bytes + connection_id.bytes + secret_id.bytes
        key = AESGCM.generate_key(256)
        return Sealed(self._current, self._wrap(key, binding), _encrypt(AESGCM(key), secret, binding))

    def open(self, sealed: Sealed, *, workspace_id: UUID, connection_id: UUID, secret_id: UUID) -> bytes:
        """The secret. Raises Undecryptable."""
        binding = workspace_id.bytes + connection_id.bytes + secret_id.bytes
        key = self._unwrap(sealed, binding)
        with _undecryptable():
            return _decrypt(AESGCM(key), sealed.ciphertext, binding)

    def rewrap(self, sealed: Sealed, *, workspace_id: UUID, connection_id: UUID, secret_id: UUID) -> Sealed:
        """The same ciphertext, whose key is encrypted by the first of the operator's keys. Raises Undecryptable."""
        binding = workspace_id.bytes + connection_id.bytes + secret_id.bytes
        return Sealed(self._current, self._wrap(self._unwrap(sealed, binding), binding), sealed.ciphertext)

    def _wrap(self, key: bytes, binding: bytes) -> bytes:
        return _encrypt(self._keys[self._current], key, binding)

    def _unwrap(self, sealed: Sealed, binding: bytes) -> bytes:
        cipher = self._keys.get(sealed.encryption_key_id)
        if cipher is None:
            raise Undecryptable(f"no encryption key is called {sealed.encryption_key_id!r} here")
        with _undecryptable():
            return _decrypt(cipher, sealed.wrapped_key, binding)


@contextmanager
def _undecryptable() -> Iterator[None]:
    try:
        yield
    except (InvalidTag, ValueError) as error:  # ValueError: what is left of it is too short to be one
        raise Undecryptable("the secret does not belong to this key, workspace and connection") from error


def _encrypt(cipher: AESGCM, text: bytes, binding: bytes) -> bytes:
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + cipher.encrypt(nonce, text, binding)


def _decrypt(cipher: AESGCM, sealed: bytes, binding: bytes) -> bytes:
    return cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], binding)
