"""The Merkle tree against the definition of RFC 6962, word for word, and known vectors."""

import functools
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.tree import (
    TILE_WIDTH,
    Edge,
    ProofError,
    empty_root,
    inclusion_proof,
    node,
    root_from_proof,
    subtree_root,
)

EDGES = (0, 1, 2, 3, 255, 256, 257, 511, 512, 513, 65_535, 65_536, 65_537, 66_000)
LEAVES = [sha256(str(n).encode()).digest() for n in range(EDGES[-1])]


@functools.cache
def naive(begin: int, end: int) -> bytes:
    """MTH of RFC 6962 section 2.1 over leaf hashes."""
    if begin == end:
        return sha256(b"").digest()
    if end - begin == 1:
        return LEAVES[begin]
    k = 1
    while k * 2 < end - begin:
        k *= 2
    return sha256(b"\x01" + naive(begin, begin + k) + naive(begin + k, end)).digest()


def naive_path(index: int, begin: int, end: int) -> list[bytes]:
    """PATH of RFC 6962 section 2.1.1."""
    if end - begin == 1:
        return []
    k = 1
    while k * 2 < end - begin:
        k *= 2
    if index < begin + k:
        return [*naive_path(index, begin, begin + k), naive(begin + k, end)]
    return [*naive_path(index, begin + k, end), naive(begin, begin + k)]


class Tiles(dict[tuple[int, int], bytes]):
    """What the table would hold."""

    def put(self, level: int, n: int, hashes: bytes) -> None:
        assert self.get((level, n), b"") == hashes[: len(self.get((level, n), b""))], "rewritten"
        self[level, n] = hashes

    def fetch(self, level: int, n: int) -> bytes:
        return self[level, n]


def grown(sizes) -> tuple[Edge, Tiles]:
    """Grow a tree batch by batch, as the sealer does, writing only what grew."""
    edge, tiles = Edge(), Tiles()
    for size in sizes:
        before = edge.size
        for tile in [*edge.append(LEAVES[before:size]), *edge.partial(since=before)]:
            tiles.put(*tile)
        assert edge.root() == naive(0, size)
    return edge, tiles


@pytest.fixture(scope="module")
def tiles():
    return grown(EDGES)[1]


def test_known_vectors_of_rfc_6962():
    """The eight leaves of the reference tests of Certificate Transparency."""
    inputs = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657",
              "606162636465666768696a6b6c6d6e6f"]  # fmt: skip
    roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ]
    edge = Edge()
    assert edge.root() == empty_root() == sha256(b"").digest()
    for data, root in zip(inputs, roots, strict=True):
        list(edge.append([sha256(b"\x00" + bytes.fromhex(data)).digest()]))
        assert edge.root().hex() == root


def test_the_edge_loads_from_tiles_at_every_boundary(tiles):
    for size in (*EDGES, 254, 258, 1_000, 65_000, 65_534, 65_793):
        edge = Edge.load(size, tiles.fetch)
        assert edge.root() == naive(0, size)
        ahead = min(size + 300, len(LEAVES))
        list(edge.append(LEAVES[size:ahead]))  # and goes on from there
        assert edge.root() == naive(0, ahead)


@given(st.integers(0, 3_000), st.integers(0, 3_000))
def test_it_does_not_matter_in_which_batches_a_tree_grew(one, other):
    edge, tiles = grown(sorted({one, other}))
    assert dict(tiles) == dict(grown([edge.size])[1])
    assert Edge.load(min(one, other), tiles.fetch).root() == naive(0, min(one, other))


def test_only_tiles_that_grew_are_written():
    edge = Edge()
    list(edge.append(LEAVES[: 65_536 + 256 + 5]))
    assert [(level, n) for level, n, _ in edge.partial()] == [(0, 257), (1, 1), (2, 0)]
    assert [(level, n) for level, n, _ in edge.partial(since=edge.size - 5)] == [(0, 257)]
    assert [(level, n) for level, n, _ in edge.partial(since=edge.size - 6)] == [(0, 257), (1, 1)]
    assert list(edge.partial(since=edge.size)) == []


@pytest.mark.parametrize("size", range(1, 40))
def test_every_leaf_of_a_small_tree_has_the_proof_of_the_definition(size, tiles):
    for index in range(size):
        path = inclusion_proof(index, size, tiles.fetch)
        assert path == naive_path(index, 0, size)
        assert root_from_proof(LEAVES[index], index, size, path) == naive(0, size)


@given(st.data())
def test_proofs_of_large_trees(tiles, data):
    size = data.draw(st.sampled_from(EDGES[1:]) | st.integers(1, len(LEAVES)))
    index = data.draw(st.integers(0, size - 1))
    path = inclusion_proof(index, size, tiles.fetch)
    assert path == naive_path(index, 0, size)
    assert root_from_proof(LEAVES[index], index, size, path) == naive(0, size)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 13])
def test_a_mutated_proof_leads_nowhere(size, tiles):
    root = naive(0, size)
    for index in range(size):
        path, leaf = inclusion_proof(index, size, tiles.fetch), LEAVES[index]
        for place, hash_ in enumerate(path):
            for bit in range(0, 256, 37):
                flipped = bytearray(hash_)
                flipped[bit // 8] ^= 1 << bit % 8
                changed = [*path[:place], bytes(flipped), *path[place + 1 :]]
                assert root_from_proof(leaf, index, size, changed) != root
        assert root_from_proof(LEAVES[size], index, size, path) != root
        for wrong in (*([path[:-1]] if path else ()), [*path, root]):
            with pytest.raises(ProofError, match="is needed"):
                root_from_proof(leaf, index, size, wrong)
        for elsewhere in range(size):
            if elsewhere != index:
                with_other = _outcome(leaf, elsewhere, size, path)
                assert with_other != root
    for outside in (-1, size):
        with pytest.raises(ProofError, match="is not in a tree"):
            root_from_proof(LEAVES[0], outside, size, [])
        with pytest.raises(ProofError, match="is not in a tree"):
            inclusion_proof(outside, size, tiles.fetch)


def _outcome(leaf, index, size, path) -> bytes | None:
    try:
        return root_from_proof(leaf, index, size, path)
    except ProofError:
        return None


def test_a_leaf_is_no_inner_node():
    assert node(LEAVES[0], LEAVES[1]) != sha256(b"\x00" + LEAVES[0] + LEAVES[1]).digest()


def test_cut_or_missing_tiles_are_noticed(tiles):
    cut = Tiles(tiles)
    cut[0, 0] = cut[0, 0][: 200 * 32]
    with pytest.raises(ProofError, match="tile 0 of level 0 is cut"):
        Edge.load(201, cut.fetch)
    with pytest.raises(ProofError, match="tile 0 of level 0 is cut"):
        subtree_root(128, 256, cut.fetch)
    assert Edge.load(200, cut.fetch).root() == naive(0, 200)
    del cut[1, 0]
    with pytest.raises(KeyError):
        Edge.load(TILE_WIDTH * 3, cut.fetch)
