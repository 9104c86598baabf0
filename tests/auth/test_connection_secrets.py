"""Signing secrets at rest: encrypted from the first row on, and bound to where they stand."""

import secrets
from dataclasses import replace
from uuid import uuid4

import pytest

from relay_grpc.connections.secrets import Undecryptable, Vault

PLACE = {"workspace_id": uuid4(), "connection_id": uuid4(), "secret_id": uuid4()}
SECRET = b"planted-secret" * 3


def new_vault(*ids: str) -> Vault:
    return Vault({id_: secrets.token_bytes(32) for id_ in ids})


def test_what_is_sealed_is_opened_where_it_belongs_and_nowhere_else() -> None:
    vault = new_vault("k1")
    sealed = vault.seal(SECRET, **PLACE)
    assert vault.open(sealed, **PLACE) == SECRET
    for part in PLACE:
        with pytest.raises(Undecryptable, match="does not belong to this key, workspace and connection"):
            vault.open(sealed, **PLACE | {part: uuid4()})


@pytest.mark.parametrize("column", ["wrapped_key", "ciphertext"])
def test_every_changed_or_missing_byte_is_noticed(column: str) -> None:
    vault = new_vault("k1")
    sealed = vault.seal(SECRET, **PLACE)
    value: bytes = getattr(sealed, column)
    for i in range(len(value)):
        with pytest.raises(Undecryptable):
            vault.open(replace(sealed, **{column: value[:i]}), **PLACE)  # type: ignore[arg-type]
    for i in range(len(value)):
        changed = replace(sealed, **{column: value[:i] + bytes([value[i] ^ 1]) + value[i + 1 :]})  # type: ignore[arg-type]
        with pytest.raises(Undecryptable):
            vault.open(changed, **PLACE)


def test_parts_of_two_secrets_do_not_fit_together() -> None:
    vault = new_vault("k1")
    one, other = vault.seal(SECRET, **PLACE), vault.seal(SECRET, **PLACE)
    assert one.ciphertext != other.ciphertext
    with pytest.raises(Undecryptable):
        vault.open(replace(one, wrapped_key=other.wrapped_key), **PLACE)


def test_a_key_that_is_gone_is_named() -> None:
    sealed = new_vault("last-year").seal(SECRET, **PLACE)
    with pytest.raises(Undecryptable, match="no encryption key is called 'last-year' here"):
        new_vault("k1").open(sealed, **PLACE)
    with pytest.raises(Undecryptable, match="does not belong"):
        new_vault("last-year").open(sealed, **PLACE)


def test_the_first_key_encrypts_and_each_decrypts_its_own() -> None:
    old, new = secrets.token_bytes(32), secrets.token_bytes(32)
    before = Vault({"old": old}).seal(SECRET, **PLACE)
    vault = Vault({"new": new, "old": old})
    assert vault.open(before, **PLACE) == SECRET
    after = vault.seal(SECRET, **PLACE)
    assert (before.encryption_key_id, after.encryption_key_id) == ("old", "new")
    assert Vault({"new": new}).open(after, **PLACE) == SECRET
