"""Checkpoints as C2SP's signed-note and tlog-checkpoint have them, and which of them a server takes for its own."""

import base64
import hashlib
from collections.abc import Callable
from uuid import UUID

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from relay_grpc.audit.checkpoint import Signer, stated

WORKSPACE = UUID("0192f0c1-2d3e-7a4b-8c5d-6e7f8091a2b3")
ROOT = hashlib.sha256(b"a root").digest()
OLD, NEW = {"old": b"\x01" * 32}, {"new": b"\x02" * 32}


def check(note: str, verifier_key: str) -> None:
    """Reads a note as https://c2sp.org/signed-note says, with the key as it writes those. Raises InvalidSignature."""
    name, key_id, encoded = verifier_key.split("+", 2)
    public = base64.b64decode(encoded, validate=True)
    assert public[0] == 1, "an Ed25519 key"
    assert key_id == hashlib.sha256(f"{name}\n".encode() + public).digest()[:4].hex()
    text, _, signatures = note.partition("\n\n")
    assert signatures.endswith("\n")
    for line in signatures.splitlines():
        dash, signer, content = line.split(" ")
        assert dash == "\u2014"
        signature = base64.b64decode(content, validate=True)
        if signer == name and signature[:4].hex() == key_id:
            Ed25519PublicKey.from_public_bytes(public[1:]).verify(signature[4:], f"{text}\n".encode())
            return
    raise InvalidSignature


def test_a_checkpoint_is_three_lines_and_a_signature_of_each_key() -> None:
    signer = Signer(OLD | NEW)
    note = signer.note(WORKSPACE, 1234, ROOT)
    lines = note.split("\n")
    assert lines[:4] == [f"relay/workspaces/{WORKSPACE}", "1234", base64.b64encode(ROOT).decode(), ""]
    assert [line.split(" ")[:2] for line in lines[4:-1]] == [["\u2014", "old"], ["\u2014", "new"]]
    assert lines[-1] == ""
    for key in signer.verifier_keys:
        check(note, key)
        with pytest.raises(InvalidSignature):
            check(note.replace("1234", "1235"), key)


def test_a_verifier_key_is_that_of_the_seed() -> None:
    """The key that C2SP's signed-note gives as an example: PeterNeumann, of golang.org/x/mod/sumdb/note."""
    example = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    name, key_id, encoded = example.split("+", 2)
    assert hashlib.sha256(f"{name}\n".encode() + base64.b64decode(encoded)).digest()[:4].hex() == key_id
    [ours] = Signer({"PeterNeumann": b"\x03" * 32}).verifier_keys
    public = Ed25519PrivateKey.from_private_bytes(b"\x03" * 32).public_key().public_bytes_raw()
    assert ours.startswith("PeterNeumann+")
    assert base64.b64decode(ours.split("+", 2)[2]) == b"\x01" + public
    check(Signer({"PeterNeumann": b"\x03" * 32}).note(WORKSPACE, 1, ROOT), ours)


@pytest.mark.parametrize(("signs", "knows"), [(OLD, OLD), (OLD, OLD | NEW), (OLD | NEW, NEW), (OLD | NEW, OLD)])
def test_keys_change_while_both_sign(signs: dict[str, bytes], knows: dict[str, bytes]) -> None:
    assert Signer(knows).signed(Signer(signs).note(WORKSPACE, 7, ROOT), WORKSPACE, 7, ROOT)


def test_nothing_else_is_taken_for_signed() -> None:
    signer = Signer(OLD)
    note = signer.note(WORKSPACE, 7, ROOT)
    text, _, signature = note.partition("\n\n")
    others = {
        "another key": Signer(NEW).note(WORKSPACE, 7, ROOT),
        "another key of this name": Signer({"old": b"\x02" * 32}).note(WORKSPACE, 7, ROOT),
        "no signature": f"{text}\n\n",
        "no note": "",
        "the signature of another text": f"{text}\n\n" + signer.note(WORKSPACE, 8, ROOT).partition("\n\n")[2],
        "another text": signer.note(WORKSPACE, 8, ROOT),
        "more text": f"{text}\nmore\n\n{signature}",
    }
    assert [why for why, other in others.items() if signer.signed(other, WORKSPACE, 7, ROOT)] == []
    assert not signer.signed(note, UUID(int=1), 7, ROOT)
    assert not signer.signed(note, WORKSPACE, 7, hashlib.sha256().digest())
    assert signer.signed(note + "\u2014 witness c2lnbmVkCg==\n", WORKSPACE, 7, ROOT), "others may sign too"


def test_what_a_note_states_is_read_back() -> None:
    assert stated(Signer(OLD).note(WORKSPACE, 7, ROOT), WORKSPACE) == (7, ROOT)


@pytest.mark.parametrize(
    "damage",
    [
        lambda note: "",
        lambda note: note[:40],
        lambda note: note[: note.index("\n\n") + 2],
        lambda note: note.replace("\n7\n", "\n07\n"),
        lambda note: note.replace("\n7\n", "\n-7\n"),
        lambda note: note.replace("\n7\n", "\n\n"),
        lambda note: note.replace("=\n", "\n"),
        lambda note: f"\n{note}",
        lambda note: note.replace(str(WORKSPACE), str(UUID(int=0))),
    ],
)
def test_what_is_no_checkpoint_of_the_log_is_not_read(damage: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match=f"it is no checkpoint of relay/workspaces/{WORKSPACE}"):
        stated(damage(Signer(OLD).note(WORKSPACE, 7, ROOT)), WORKSPACE)
