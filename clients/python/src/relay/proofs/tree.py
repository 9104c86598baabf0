"""The Merkle tree of RFC 6962, section 2.1: its hashes, and what proofs of them say."""

import hashlib
from collections.abc import Sequence

MOST_TEXT = 500  # characters


class ProofError(Exception):
    """What was to be proven is not so; the text says what, and where: on one line that steers no terminal."""

    def __init__(self, text: str) -> None:
        short = text[:MOST_TEXT]  # it quotes what others wrote
        super().__init__("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in short))


def leaf_hash(leaf: bytes) -> bytes:
    """SHA-256 of a leaf, as RFC 6962 prefixes it."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256 of an inner node, as RFC 6962 prefixes it."""
    return hashlib.sha256(b"\x01" + left + right).digest()


EMPTY_ROOT = hashlib.sha256().digest()


def subtrees(start: int, end: int) -> list[tuple[int, int]]:
    """The fewest perfect subtrees that cover the leaves from `start` up to `end`, as (height, index), left to right.

    >>> subtrees(3, 8)
    [(0, 3), (2, 1)]
    """
    found = []
    while start < end:
        height = min((start & -start).bit_length() - 1 if start else 63, (end - start).bit_length() - 1)
        found.append((height, start >> height))
        start += 1 << height
    return found


class RootOf:
    """Folds the hashes of perfect subtrees, left to right, into the root of the tree that they make.

    size: how many leaves there are so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self._stack: list[bytes] = []  # of the perfect subtrees that size's binary digits tell

    def add(self, hashed: bytes, height: int = 0) -> None:
        """The next subtree. Its place must be one where a subtree of this height can be: subtrees() gives such."""
        if self.size % (1 << height):
            raise ValueError(f"no subtree of height {height} begins at leaf {self.size}")
        carried = self.size >> height
        self.size += 1 << height
        while carried & 1:
            hashed = node_hash(self._stack.pop(), hashed)
            carried >>= 1
        self._stack.append(hashed)

    def root(self) -> bytes:
        if not self._stack:
            return EMPTY_ROOT
        root = self._stack[-1]
        for left in reversed(self._stack[:-1]):
            root = node_hash(left, root)
        return root


class Fold:
    """The perfect subtrees over leaves from number `start` on: their hashes are those of subtrees(start, end).

    It takes as much memory as the logarithm of their number.
    """

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self.hashes: list[bytes] = []

    def add(self, leaf: bytes) -> None:
        """The hash of the next leaf."""
        height, index, hashed = 0, self.end, leaf
        while index & 1 and (index - 1) << height >= self.start:
            hashed = node_hash(self.hashes.pop(), hashed)
            height, index = height + 1, index >> 1
        self.hashes.append(hashed)
        self.end += 1


def verify_inclusion(index: int, size: int, leaf: bytes, path: Sequence[bytes], root: bytes) -> None:
    """Leaf hash `leaf` is number `index` of the log with this size and root (RFC 9162, 2.1.3.2). Raises ProofError."""
    if not 0 <= index < size:
        raise ProofError(f"there is no leaf {index} in a log of {size}")
    node, last, hashed = index, size - 1, leaf
    for sibling in path:
        if not last:
            raise ProofError(f"the inclusion proof of leaf {index} has too many hashes")
        if node & 1 or node == last:
            hashed = node_hash(sibling, hashed)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            hashed = node_hash(hashed, sibling)
        node, last = node >> 1, last >> 1
    if last:
        raise ProofError(f"the inclusion proof of leaf {index} has too few hashes")
    if hashed != root:
        raise ProofError(f"leaf {index} is not in the log of size {size}: its proof leads to another root")


def verify_consistency(first: int, second: int, first_root: bytes, second_root: bytes, path: Sequence[bytes]) -> None:
    """The log of size `first` is a prefix of that of size `second` (RFC 9162, 2.1.4.2). Raises ProofError."""
    if not 0 <= first <= second:
        raise ProofError(f"a log of size {second} can't continue one of size {first}")
    if first in (0, second):
        if path:
            raise ProofError(f"the consistency proof from size {first} to {second} has too many hashes")
        if first_root != (second_root if first else EMPTY_ROOT):
            raise ProofError(f"the logs of size {first} and {second} differ")
        return
    # A perfect tree of size `first` is a node of the second tree: the proof leaves it out.
    hashes = [first_root, *path] if first & (first - 1) == 0 else list(path)
    if not hashes:
        raise ProofError(f"the consistency proof from size {first} to {second} has too few hashes")
    shift = (first & -first).bit_length() - 1
    node, last = (first - 1) >> shift, (second - 1) >> shift
    before = after = hashes[0]
    for sibling in hashes[1:]:
        if not last:
            raise ProofError(f"the consistency proof from size {first} to {second} has too many hashes")
        if node & 1 or node == last:
            before, after = node_hash(sibling, before), node_hash(sibling, after)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            after = node_hash(after, sibling)
        node, last = node >> 1, last >> 1
    if last:
        raise ProofError(f"the consistency proof from size {first} to {second} has too few hashes")
    if before != first_root or after != second_root:
        raise ProofError(f"the log of size {second} does not continue that of size {first}")
