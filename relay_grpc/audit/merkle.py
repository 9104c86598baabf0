"""The Merkle tree of RFC 6962, section 2.1, in tiles of 256 hashes (C2SP tlog-tiles, without its encoding). No I/O.

A perfect subtree of height 8 * level, whose leaves are those from index * 256**level on, has its hash in tile (level,
index // 256). What lies between is computed. Ranges of leaves are half open.
"""

from collections.abc import Iterable, Mapping, Sequence

from relay.proofs import EMPTY_ROOT, node_hash, subtrees

HASH = 32  # bytes
HEIGHT = 8
WIDTH = 1 << HEIGHT
Tile = tuple[int, int]  # level, index
Range = tuple[int, int]  # from a leaf up to another


def inclusion(index: int, size: int) -> list[Range]:
    """The ranges whose hashes are the path of a leaf, from the leaf up (RFC 6962, 2.1.1)."""
    path = []
    start, end = 0, size
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append((middle, end))
            end = middle
        else:
            path.append((start, middle))
            start = middle
    return path[::-1]


def consistency(first: int, second: int) -> list[Range]:
    """The ranges whose hashes prove that the log of size `first` is a prefix of that of `second` (RFC 6962, 2.1.2).

    0 < first <= second.
    """
    path = []
    start, end = 0, second
    whole = True  # the older log's root is known to whoever checks, as long as the range is all of it
    while first != end:
        middle = start + _split(end - start)
        if first <= middle:
            path.append((middle, end))
            end = middle
        else:
            path.append((start, middle))
            start, whole = middle, False
    if not whole:
        path.append((start, end))
    return path[::-1]


def _split(count: int) -> int:
    """The largest power of two below count."""
    return 1 << (count - 1).bit_length() - 1


def tiles_of(ranges: Iterable[Range]) -> set[Tile]:
    """The tiles that it takes to hash these ranges."""
    return {
        (height // HEIGHT, (index << height % HEIGHT) // WIDTH)
        for start, end in ranges
        for height, index in subtrees(start, end)
    }


def right_edge(size: int) -> set[Tile]:
    """The tiles that a log of this size grows on and its root is computed from."""
    return tiles_of([(0, size)]) if size else set()


class Tree:
    """Hashes of a log whose tiles are given. A tile or a hash that is missing is a LookupError: the log is damaged."""

    def __init__(self, tiles: Mapping[Tile, bytes]) -> None:
        self._tiles = tiles

    def hash(self, start: int, end: int) -> bytes:
        """The root of the tree over these leaves alone, as RFC 6962's MTH(D[start:end])."""
        if start == end:
            return EMPTY_ROOT
        hashes = [self._perfect(height, index) for height, index in subtrees(start, end)]
        root = hashes[-1]
        for left in reversed(hashes[:-1]):
            root = node_hash(left, root)
        return root

    def perfect(self, start: int, end: int) -> list[bytes]:
        """The hashes of relay.proofs.subtrees(start, end)."""
        return [self._perfect(height, index) for height, index in subtrees(start, end)]

    def _perfect(self, height: int, index: int) -> bytes:
        level, inner = divmod(height, HEIGHT)
        first = index << inner
        tile = self._tiles.get((level, first // WIDTH), b"")
        at = first % WIDTH
        hashes = [tile[HASH * n : HASH * (n + 1)] for n in range(at, at + (1 << inner))]
        if len(hashes[-1]) != HASH:
            raise LookupError(f"tile {first // WIDTH} of level {level} ends before hash {at + (1 << inner) - 1}")
        return _fold(hashes)


def _fold(hashes: Sequence[bytes]) -> bytes:
    """The root of a perfect tree over these."""
    while len(hashes) > 1:
        hashes = [node_hash(*pair) for pair in zip(hashes[::2], hashes[1::2], strict=True)]
    return hashes[0]


def grow(size: int, tiles: Mapping[Tile, bytes], leaves: Sequence[bytes]) -> dict[Tile, bytes]:
    """The tiles that change, as they are when these leaf hashes are added to a log of `size`.

    tiles: those of right_edge(size).
    """
    grown: dict[Tile, bytes] = {}
    level, added, first = 0, list(leaves), size
    while added:
        completed: list[bytes] = []
        tile, at = divmod(first, WIDTH)
        while added:
            room = WIDTH - at
            before = tiles.get((level, tile), b"") if at else b""
            if len(before) != at * HASH:
                raise LookupError(f"tile {tile} of level {level} holds {len(before) // HASH} hashes, and not {at}")
            hashes = grown[level, tile] = before + b"".join(added[:room])
            if len(hashes) == WIDTH * HASH:
                completed.append(_fold([hashes[n : n + HASH] for n in range(0, len(hashes), HASH)]))
            added = added[room:]
            tile, at = tile + 1, 0
        level, added, first = level + 1, completed, first // WIDTH
    return grown
