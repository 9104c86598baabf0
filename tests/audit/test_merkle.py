"""The tree in its tiles, against RFC 6962, section 2.1, as it is written: by recursion over all leaves."""

import hashlib
import random
from collections.abc import Sequence
from functools import cache

import pytest
from relay.proofs import verify_consistency, verify_inclusion

from relay_grpc.audit.merkle import (
    HASH,
    WIDTH,
    Tile,
    Tree,
    consistency,
    grow,
    inclusion,
    right_edge,
    tiles_of,
)

AROUND_TILES = (255, 256, 257, 511, 512, 513, 65_535, 65_536, 65_537)
SIZES = (*range(1, 71), *AROUND_TILES)
LEAVES = [hashlib.sha256(b"\x00" + str(n).encode()).digest() for n in range(max(SIZES))]


def _k(count: int) -> int:
    """The largest power of two smaller than count."""
    k = 1
    while k * 2 < count:
        k *= 2
    return k


@cache
def mth(start: int, end: int) -> bytes:
    """MTH(D[start:end]) of RFC 6962, section 2.1."""
    if start == end:
        return hashlib.sha256(b"").digest()
    if end - start == 1:
        return LEAVES[start]
    k = _k(end - start)
    return hashlib.sha256(b"\x01" + mth(start, start + k) + mth(start + k, end)).digest()


def path(m: int, start: int, end: int) -> list[bytes]:
    """PATH(m, D[start:end]), section 2.1.1."""
    if end - start == 1:
        return []
    k = _k(end - start)
    if m < k:
        return [*path(m, start, start + k), mth(start + k, end)]
    return [*path(m - k, start + k, end), mth(start, start + k)]


def subproof(m: int, start: int, end: int, complete: bool) -> list[bytes]:
    """SUBPROOF(m, D[start:end], b), section 2.1.2."""
    if m == end - start:
        return [] if complete else [mth(start, end)]
    k = _k(end - start)
    if m <= k:
        return [*subproof(m, start, start + k, complete), mth(start + k, end)]
    return [*subproof(m - k, start + k, end, False), mth(start, start + k)]


def grown(*steps: int) -> dict[Tile, bytes]:
    """The tiles of a log that grew to each of these sizes, in turn, from what its right edge held alone."""
    tiles: dict[Tile, bytes] = {}
    size = 0
    for step in steps:
        edge = {tile: tiles[tile] for tile in right_edge(size)}
        tiles |= grow(size, edge, LEAVES[size:step])
        size = step
    return tiles


@pytest.mark.parametrize("size", SIZES)
def test_roots_and_proofs_are_those_of_rfc_6962(size: int) -> None:
    tree = Tree(grown(size))
    assert tree.hash(0, size) == mth(0, size)
    some = range(size) if size <= 70 else sorted({0, 1, 254, size // 2, size - 2, size - 1})
    for index in some:
        proof = [tree.hash(*range_) for range_ in inclusion(index, size)]
        assert proof == path(index, 0, size)
        verify_inclusion(index, size, LEAVES[index], proof, mth(0, size))
    for first in (n + 1 for n in some):
        proof = [tree.hash(*range_) for range_ in consistency(first, size)]
        assert proof == subproof(first, 0, size, True)
        verify_consistency(first, size, mth(0, first), mth(0, size), proof)


@pytest.mark.parametrize("seed", range(20))
def test_however_a_log_grows_its_tiles_are_the_same(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice((*AROUND_TILES[:6], chance.randrange(1, 3000)))
    steps = sorted({*(chance.randrange(1, size + 1) for _ in range(chance.randrange(12))), size})
    assert grown(*steps) == grown(size)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000, 65_536, 65_793])
def test_tiles_are_those_of_tlog_tiles(size: int) -> None:
    """https://c2sp.org/tlog-tiles: at level L, floor(size / 256^L) hashes, 256 a tile, none where that is nothing."""
    leaves = [*LEAVES, *LEAVES[: max(0, size - len(LEAVES))]][:size]
    tiles = grow(0, {}, leaves)
    wanted = {}
    level, hashes = 0, size
    while hashes:
        full, partial = divmod(hashes, WIDTH)
        wanted |= {(level, n): WIDTH for n in range(full)} | ({(level, full): partial} if partial else {})
        level, hashes = level + 1, hashes // WIDTH
    assert {tile: len(content) // HASH for tile, content in tiles.items()} == wanted
    if size <= len(LEAVES):
        for (level, index), content in tiles.items():
            for n in range(len(content) // HASH):
                first = (index * WIDTH + n) * WIDTH**level
                assert content[HASH * n : HASH * (n + 1)] == mth(first, first + WIDTH**level)


@pytest.mark.parametrize("size", [1, 5, 255, 256, 300, 65_537])
def test_what_it_takes_to_grow_or_to_prove_is_a_few_tiles(size: int) -> None:
    tiles = grown(size)
    assert right_edge(size) <= tiles.keys()
    assert len(right_edge(size)) <= 3
    root = Tree({tile: tiles[tile] for tile in right_edge(size)}).hash(0, size)
    assert root == mth(0, size)
    for index in {0, size // 2, size - 1}:
        ranges = inclusion(index, size)
        assert tiles_of(ranges) <= tiles.keys()
        assert len(tiles_of(ranges)) <= 5
        read = Tree({tile: tiles[tile] for tile in tiles_of(ranges)})
        verify_inclusion(index, size, LEAVES[index], [read.hash(*range_) for range_ in ranges], mth(0, size))


def cut(tiles: dict[Tile, bytes], tile: Tile, hashes: int) -> dict[Tile, bytes]:
    return tiles | {tile: tiles[tile][: HASH * hashes]}


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        cut(grown(300), (0, 1), 43),
        cut(grown(300), (0, 1), 0),
        {tile: content for tile, content in grown(300).items() if tile != (1, 0)},
        grown(301),
    ],
    ids=["nothing", "a hash short", "an empty tile", "no upper tile", "a hash too many"],
)
def test_a_log_does_not_grow_on_other_tiles_than_its_own(damaged: dict[Tile, bytes]) -> None:
    def go_on() -> None:
        Tree(damaged).hash(0, 300)
        grow(300, damaged, LEAVES[300:310])

    with pytest.raises(LookupError, match=r"tile \d of level \d"):
        go_on()


def verified(first: int, second: int, proof: Sequence[bytes]) -> None:
    verify_consistency(first, second, mth(0, first), mth(0, second), proof)


def test_the_examples_of_rfc_6962() -> None:
    """Section 2.1.3: a tree of seven leaves, whose proofs are named by their nodes."""
    tree = Tree(grown(7))
    a, b, c, d, f, j = (LEAVES[n] for n in (0, 1, 2, 3, 5, 6))
    g, h, i = mth(0, 2), mth(2, 4), mth(4, 6)
    k = mth(0, 4)
    of = {index: [tree.hash(*range_) for range_ in inclusion(index, 7)] for index in (0, 3, 4, 6)}
    assert of == {0: [b, h, mth(4, 7)], 3: [c, g, mth(4, 7)], 4: [f, j, k], 6: [i, k]}
    between = {first: [tree.hash(*range_) for range_ in consistency(first, 7)] for first in (3, 4, 6)}
    assert between == {3: [c, d, g, mth(4, 7)], 4: [mth(4, 7)], 6: [i, j, k]}
    assert a not in between[3]
    for first, proof in between.items():
        verified(first, 7, proof)
