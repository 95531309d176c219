"""The leaf of an event and the growing tree, against definitions written apart."""

from hashlib import sha256

from hypothesis import given
from hypothesis import strategies as st

from audit.frontier import Frontier
from audit.leaf import leaf
from audit.tree import Edge

TEXT = st.text(max_size=20)


@given(st.tuples(*[TEXT] * 9))
def test_a_leaf_is_the_hash_of_netstrings(fields):
    assert leaf(*fields) == defined(fields)


def defined(fields):
    joined = b"\0"
    for field in ("syncward/audit/v1", *fields):
        raw = field.encode("utf-8", "surrogatepass")
        joined += str(len(raw)).encode() + b":" + raw + b","
    return sha256(joined).digest()


@given(st.tuples(*[TEXT] * 9), st.integers(0, 8), st.integers(0, 8))
def test_text_that_moves_to_another_field_makes_another_leaf(fields, a, b):
    moved = list(fields)
    moved[b], moved[a] = (moved[b] + moved[a], "") if a != b else (moved[b], moved[a])
    assert (leaf(*moved) == leaf(*fields)) == (tuple(moved) == fields)


@given(st.lists(st.integers(1, 400), max_size=6))
def test_a_frontier_has_the_root_and_the_tiles_of_the_sealers_edge(steps):
    edge, frontier = Edge(), Frontier()
    tiles: dict[tuple[int, int], bytes] = {}
    above: list[bytes] = []
    for step in steps:
        leaves = [sha256(str(edge.size + n).encode()).digest() for n in range(step)]
        tiles |= {(level, n): hashes for level, n, hashes in edge.append(leaves)}
        above += [hash_ for _, hashes in frontier.extend(leaves) for hash_ in hashes]
        assert (frontier.size, frontier.root()) == (edge.size, edge.root())
    tiles |= {(level, n): hashes for level, n, hashes in edge.partial()}
    assert b"".join(above) == tiles.get((1, 0), b"")
    loaded = Frontier.load(edge.size, lambda level, n: tiles[level, n])
    assert loaded.hashes == frontier.hashes
    assert Frontier.of(edge.size, frontier.hashes).root() == frontier.root()
