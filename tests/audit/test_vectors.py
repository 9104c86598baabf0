"""Trees, proofs and notes as others compute them: published vectors, and two libraries that are not ours.

The tree, its proofs and their corruptions are those of transparency-dev/merkle (proof/verify_test.go, Apache 2.0), the
notes those of golang.org/x/mod/sumdb/note (note_test.go, BSD) and what sum.golang.org signed.
"""

import base64
import hashlib
import random
from collections.abc import Iterator, Sequence
from uuid import uuid4

import pymerkle
import pytest
from relay.proofs import (
    EMPTY_ROOT,
    ProofError,
    RootOf,
    VerifierKey,
    leaf_hash,
    open_checkpoint,
    verify_consistency,
    verify_inclusion,
)
from tlog_scales.signing import PlainEd25519Signer, Vkey, VkeySet
from tlog_scales.tlog import Checkpoint, ConsistencyProof, InclusionProof

from relay_grpc.audit.checkpoint import Signer, origin
from relay_grpc.audit.merkle import Tree, consistency, grow, inclusion, right_edge

LEAVES = ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)
INCLUSION = (  # leaf, counted from 1; size; path
    (1, 1, ()),
    (
        *(1, 8),
        (
            "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
        ),
    ),
    (
        *(6, 8),
        (
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ),
    ),
    (3, 3, ("fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",)),
    (
        *(2, 5),
        (
            "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
            "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
            "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        ),
    ),
)
CONSISTENCY = (  # sizes; path
    (1, 1, ()),
    (1, 8, INCLUSION[1][2]),
    (
        *(6, 8),
        (
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ),
    ),
    (2, 5, INCLUSION[4][2][1:]),
    (
        *(6, 7),
        (
            "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
            "b08693ec2e721597130641e8211e7eedccb4c26413963eee6c1e2ed16ffb1a5f",
            "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        ),
    ),
)
OTHER = bytes.fromhex("abacaba000000000000000000000000000000000000000000060061e00123456")

PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
ENOCH = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop"
NOT_ED25519 = (
    "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",  # too long, with the id of that
    "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",  # of another type, with the id of that
)
SUMDB_KEY = "sum.golang.org+033de0ae+Ac4zctda0e5eza+HJyk9SxEdh+s3Ux18htTTAD8OuAn8"
SUMDB = (
    "go.sum database tree\n6476701\nmb8QLQIs0Z0yP5Cstq6guj87oXWeC9gEM8oVikmm9Wk=\n\n"
    "— sum.golang.org Az3grsLX85Gz+s1SiTbgkuqxgItqFq7gsMUEyVnrsa9LM7Us9S+1xbFIGu95949rj4nPRYfvimWEPWL+o3GeoWwOoAw=\n",
    "go.sum database tree\n15067302\ngJyioq6dwR9n+NjEWORfYmH+ubeYm3kH42BBQ0bTpYI=\n\n"
    "— sum.golang.org Az3grp1rvWOs5NKlr/xR4GLN/CDyzzakmt1o61uSxYKpK1SerqOP2ClbX/peKUZjYnyomH5Xz7GZG3TpB7OeKn4E2ww=\n"
    "— test.example.com qTGhC/xIPQ0AXKHK6Y+9ypRfuvMZWPjRXM8NiOg5M1WREn07VQXyuIXM3NRNav3ieVFLUqDRK77PWDmL6w8w84UqeAw=\n",
)


def hashes(texts: Sequence[str]) -> list[bytes]:
    return [bytes.fromhex(text) for text in texts]


def tree_of(leaves: Sequence[bytes]) -> Tree:
    """The server's, from tiles that grow by three leaves at a time."""
    tiles: dict[tuple[int, int], bytes] = {}
    for size in range(0, len(leaves), 3):
        edge = {tile: tiles[tile] for tile in right_edge(size) if tile in tiles}
        tiles |= grow(size, edge, leaves[size : size + 3])
    return Tree(tiles)


def path_of(tree: Tree, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    return [tree.hash(*range_) for range_ in ranges]


def corrupted(path: list[bytes], *roots: bytes) -> Iterator[list[bytes]]:
    """As corruptInclusionProof and corruptConsistencyProof do it."""
    for garbage in (b"", *roots, *path[:1]):
        yield [*path, garbage]
        yield [garbage, *path]
    for n, hashed in enumerate(path):
        yield [*path[:n], bytes([hashed[0] ^ 8]) + hashed[1:], *path[n + 1 :]]
    if path:
        yield path[:-1]
        yield [*path[:1], OTHER, *path[1:]]


def test_the_published_tree_has_the_published_roots() -> None:
    leaves = [leaf_hash(leaf) for leaf in hashes(LEAVES)]
    folded = RootOf()
    assert folded.root() == EMPTY_ROOT == hashlib.sha256(b"").digest()
    for size, root in enumerate(hashes(ROOTS), 1):
        folded.add(leaves[size - 1])
        assert folded.root() == tree_of(leaves[:size]).hash(0, size) == root


@pytest.mark.parametrize(("number", "size", "path"), INCLUSION)
def test_a_published_inclusion_proof_is_made_and_verified_and_no_corruption_of_it(
    number: int, size: int, path: Sequence[str]
) -> None:
    leaves = [leaf_hash(leaf) for leaf in hashes(LEAVES)]
    index, leaf, root, right = number - 1, leaves[number - 1], hashes(ROOTS)[size - 1], hashes(path)
    assert path_of(tree_of(leaves[:size]), inclusion(index, size)) == right
    verify_inclusion(index, size, leaf, right, root)
    wrong = [(index, size, leaf, one, root) for one in corrupted(right, root)]
    wrong += [(at, size, leaf, right, root) for at in (index - 1, index + 1, index ^ 2)]
    wrong += [(index, of, leaf, right, root) for of in (size * 2, size // 2)]
    wrong += [(index, size, other, right, root) for other in (b"WrongLeaf", b"")]
    wrong += [(index, size, leaf, right, other) for other in (EMPTY_ROOT, OTHER, b"")]
    for arguments in wrong:
        with pytest.raises(ProofError):
            verify_inclusion(*arguments)


@pytest.mark.parametrize(("first", "second", "path"), CONSISTENCY)
def test_a_published_consistency_proof_is_made_and_verified_and_no_corruption_of_it(
    first: int, second: int, path: Sequence[str]
) -> None:
    leaves = [leaf_hash(leaf) for leaf in hashes(LEAVES)]
    before, after, right = hashes(ROOTS)[first - 1], hashes(ROOTS)[second - 1], hashes(path)
    assert path_of(tree_of(leaves[:second]), consistency(first, second)) == right
    verify_consistency(first, second, before, after, right)
    wrong = [(first, second, before, after, one) for one in corrupted(right, before, after)]
    wrong += [(first, second, b"WrongRoot", after, right), (first, second, before, b"WrongRoot", right)]
    if path:
        wrong += [(at, second, before, after, right) for at in (first - 1, first + 1, first ^ 2)]
        wrong += [(first, at, before, after, right) for at in (second * 2, second // 2)]
        wrong += [(first, second, after, before, right), (first, second, before, after, [])]
    for arguments in wrong:
        with pytest.raises(ProofError):
            verify_consistency(*arguments)


@pytest.mark.parametrize(
    ("first", "second", "before", "after", "path"),
    [
        (1, 0, OTHER, OTHER, []),
        (2, 1, OTHER, OTHER, []),
        (1, 2, OTHER, OTHER, []),
        (0, 0, EMPTY_ROOT, EMPTY_ROOT, [EMPTY_ROOT]),
        (0, 1, EMPTY_ROOT, EMPTY_ROOT, [EMPTY_ROOT]),
        (1, 1, EMPTY_ROOT, EMPTY_ROOT, [EMPTY_ROOT]),
        (1, 1, EMPTY_ROOT, OTHER, []),
        (0, 1, OTHER, OTHER, []),  # there they take any root for that of the empty log
    ],
)
def test_what_is_published_as_inconsistent_is_refused(
    first: int, second: int, before: bytes, after: bytes, path: list[bytes]
) -> None:
    with pytest.raises(ProofError):
        verify_consistency(first, second, before, after, path)


def test_trees_of_all_sizes_are_what_two_other_implementations_compute() -> None:
    """Roots and inclusion proofs are pymerkle's, and tlog-scales verifies both kinds of proofs of ours."""
    sizes = [*range(1, 41), 255, 256, 257, 300]
    theirs = pymerkle.InmemoryTree(algorithm="sha256")
    leaves = [leaf_hash(b"event %d" % n) for n in range(sizes[-1])]
    for n in range(sizes[-1]):
        theirs.append_entry(b"event %d" % n)
    chosen = random.Random(6962)
    for size in sizes:
        ours = tree_of(leaves[:size])
        root = ours.hash(0, size)
        assert root == theirs.get_root(size)
        for index in range(size) if size <= 40 else chosen.sample(range(size), 20):
            path = path_of(ours, inclusion(index, size))
            assert [leaves[index], *path] == theirs.prove_inclusion(index + 1, size).path
            InclusionProof(index, size, path).check(leaves[index], root)
            verify_inclusion(index, size, leaves[index], path, root)
        for first in range(1, size + 1) if size <= 40 else chosen.sample(range(1, size + 1), 20):
            path = path_of(ours, consistency(first, size))
            ConsistencyProof(first, size, path).check(theirs.get_root(first), root)
            verify_consistency(first, size, theirs.get_root(first), root, path)


def test_both_verifiers_take_and_refuse_the_same_corruptions() -> None:
    leaves = [leaf_hash(b"event %d" % n) for n in range(70)]
    chosen = random.Random(9162)
    for _ in range(300):
        size = chosen.randint(2, 70)
        first = chosen.randint(1, size)
        tree = tree_of(leaves[:size])
        before, after, path = tree.hash(0, first), tree.hash(0, size), path_of(tree, consistency(first, size))
        if path and chosen.random() < 0.5:
            path[chosen.randrange(len(path))] = chosen.choice([OTHER, before, after])
        first += chosen.choice([0, 0, 0, 1, -1])
        assert verified(verify_consistency, first, size, before, after, path) == verified(
            ConsistencyProof(first, size, path).check, before, after
        )


def verified(check: object, *arguments: object) -> bool:
    assert callable(check)
    try:
        check(*arguments)
    except Exception:
        return False
    return True


def test_a_note_of_ours_is_opened_by_another_implementation_under_each_of_its_keys() -> None:
    workspace, root = uuid4(), hashlib.sha256(b"root").digest()
    signer = Signer({"old": bytes(range(32)), "new": bytes(range(1, 33))})
    theirs = Checkpoint.from_text(signer.note(workspace, 5, root))
    assert (theirs.origin, theirs.size, theirs.root_hash) == (origin(workspace), 5, root)
    for key in signer.verifier_keys:
        vkey = Vkey.from_string(key)
        assert vkey.serialize() == key
        theirs.verify(vkey)
    assert len(VkeySet(*map(Vkey.from_string, signer.verifier_keys)).verify(theirs.signatures, theirs)) == 2


def test_a_note_of_another_implementation_is_opened_here() -> None:
    root = hashlib.sha256(b"root").digest()
    signers = [PlainEd25519Signer(name, bytes([n] * 32)) for n, name in enumerate(("log.example/one", "witness"))]
    note = Checkpoint.make_signed("log.example/one", 12345, root, signers).serialize()
    keys = [VerifierKey.parse(signer.vkey.serialize()) for signer in signers]
    opened = open_checkpoint(note, keys)
    assert (opened.origin, opened.size, opened.root) == ("log.example/one", 12345, root)
    assert opened.signers == ("log.example/one", "witness")
    assert open_checkpoint(note, keys[1:]).signers == ("witness",)


@pytest.mark.parametrize("note", SUMDB)
def test_a_checkpoint_that_the_go_checksum_database_signed_is_opened(note: str) -> None:
    key = VerifierKey.parse(SUMDB_KEY)
    opened = open_checkpoint(note, [key])
    assert (opened.origin, opened.signers) == ("go.sum database tree", ("sum.golang.org",))
    assert [str(opened.size), base64.b64encode(opened.root).decode()] == note.split("\n")[1:3]
    with pytest.raises(ProofError, match="wrong"):
        open_checkpoint(note.replace(str(opened.size), str(opened.size + 1)), [key])


@pytest.mark.parametrize("key", [PETER, ENOCH, SUMDB_KEY])
def test_a_published_key_is_parsed_and_no_piece_of_it(key: str) -> None:
    VerifierKey.parse(key)
    for start in range(len(key)):
        for end in range(start + 1, len(key) + 1):
            if (start, end) != (0, len(key)):
                with pytest.raises(ProofError):
                    VerifierKey.parse(key[start:end])
    for n in range(len(key)):
        with pytest.raises(ProofError):
            VerifierKey.parse(key[:n] + chr(ord(key[n]) + 1) + key[n + 1 :])


@pytest.mark.parametrize("key", NOT_ED25519)
def test_a_published_key_that_is_no_ed25519_key_is_refused(key: str) -> None:
    with pytest.raises(ProofError):
        VerifierKey.parse(key)
