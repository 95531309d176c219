"""The Merkle tree over the log's leaves, in tiles. Pure: hashes in, hashes out.

RFC 6962 section 2.1: a leaf's hash is SHA-256(00 || leaf), which the database stamps on each event;
a node's is SHA-256(01 || left || right). Tiles as in C2SP tlog-tiles: 256 hashes, each the root of
a full subtree of 256^level leaves.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

HASH_BYTES = 32
TILE_WIDTH = 256

#: Returns the hashes of tile (level, n), or fewer at the right edge; KeyError if it is not there.
FetchTile = Callable[[int, int], bytes]


class ProofError(Exception):
    """A proof does not lead to the root, or cannot be made from these tiles."""


def empty_root() -> bytes:
    """Return the root of a tree without leaves."""
    return sha256(b"").digest()


def node(left: bytes, right: bytes) -> bytes:
    """Return the hash of an inner node."""
    return sha256(b"\x01" + left + right).digest()


def split(hashes: bytes) -> list[bytes]:
    """Return the hashes of a tile one by one."""
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def root_of(hashes: Sequence[bytes]) -> bytes:
    """Return the root over subtree roots, the last of which may be of a smaller subtree."""
    if not hashes:
        return empty_root()
    layer = list(hashes)
    while len(layer) > 1:
        paired = [node(layer[at], layer[at + 1]) for at in range(0, len(layer) - 1, 2)]
        if len(layer) % 2:
            paired.append(layer[-1])
        layer = paired
    return layer[0]


@dataclass(slots=True)
class Edge:
    """The right edge of the tree: the tile of each level that is not full yet."""

    size: int = 0
    levels: list[list[bytes]] = field(default_factory=lambda: [[]])

    def append(self, leaves: Iterable[bytes]) -> Iterator[tuple[int, int, bytes]]:
        """Add leaves; yield (level, n, hashes) of each tile that became full on the way."""
        for leaf in leaves:
            self.size += 1
            yield from self._push(0, leaf)

    def _push(self, level: int, hash_: bytes) -> Iterator[tuple[int, int, bytes]]:
        if level == len(self.levels):
            self.levels.append([])
        held = self.levels[level]
        held.append(hash_)
        if len(held) == TILE_WIDTH:
            yield level, (self.size // TILE_WIDTH ** (level + 1)) - 1, b"".join(held)
            full = root_of(held)
            held.clear()
            yield from self._push(level + 1, full)

    def partial(self, since: int = 0) -> Iterator[tuple[int, int, bytes]]:
        """Yield (level, n, hashes) of the tiles at the edge that grew since so many leaves."""
        for level, held in enumerate(self.levels):
            if held and self.size // TILE_WIDTH**level != since // TILE_WIDTH**level:
                yield level, self.size // TILE_WIDTH ** (level + 1), b"".join(held)

    def root(self) -> bytes:
        """Return the root over all leaves."""
        below: list[bytes] = []
        for held in self.levels:
            below = [root_of([*held, *below])] if held or below else []
        return below[0] if below else empty_root()

    @classmethod
    def load(cls, size: int, fetch: FetchTile) -> "Edge":
        """Return the edge of a tree of `size` leaves from its tiles; ProofError if they are cut."""
        levels: list[list[bytes]] = []
        level = 0
        while level == 0 or size // TILE_WIDTH**level:
            held = size // TILE_WIDTH**level % TILE_WIDTH
            tile_n = size // TILE_WIDTH ** (level + 1)
            hashes = split(fetch(level, tile_n))[:held] if held else []
            if len(hashes) < held:
                raise ProofError(f"tile {tile_n} of level {level} is cut")
            levels.append(hashes)
            level += 1
        return cls(size, levels)


def subtree_root(begin: int, end: int, fetch: FetchTile) -> bytes:
    """Return the root over leaves [begin, end), which is a subtree of RFC 6962, from tiles."""
    count = end - begin
    level = 0
    while count % TILE_WIDTH == 0 and begin % TILE_WIDTH == 0 and count >= TILE_WIDTH:
        # a full tile below is one hash above
        begin, end, count, level = begin // 256, end // 256, count // 256, level + 1
    if count <= TILE_WIDTH and begin // TILE_WIDTH == (end - 1) // TILE_WIDTH:
        hashes = split(fetch(level, begin // TILE_WIDTH))
        first = begin % TILE_WIDTH
        if len(hashes) < first + count:
            raise ProofError(f"tile {begin // TILE_WIDTH} of level {level} is cut")
        return root_of(hashes[first : first + count])
    scale = TILE_WIDTH**level
    middle = (begin + _power_below(count)) * scale
    return node(
        subtree_root(begin * scale, middle, fetch), subtree_root(middle, end * scale, fetch)
    )


def _power_below(count: int) -> int:
    """Return the largest power of two smaller than `count`, which is at least 2."""
    return 1 << (count - 1).bit_length() - 1


def inclusion_proof(index: int, size: int, fetch: FetchTile) -> list[bytes]:
    """Return the audit path of RFC 6962 section 2.1.1 for a leaf of a tree of `size` leaves."""
    if not 0 <= index < size:
        raise ProofError(f"index {index} is not in a tree of {size} leaves")
    path: list[bytes] = []
    begin, end = 0, size
    while end - begin > 1:
        middle = begin + _power_below(end - begin)
        if index < middle:
            path.append(subtree_root(middle, end, fetch))
            end = middle
        else:
            path.append(subtree_root(begin, middle, fetch))
            begin = middle
    return path[::-1]


def root_from_proof(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes:
    """Return the root that a path leads to; ProofError if its length cannot be right."""
    if not 0 <= index < size:
        raise ProofError(f"index {index} is not in a tree of {size} leaves")
    sides: list[bool] = []  # from the root down: whether the leaf is on the left
    begin, end = 0, size
    while end - begin > 1:
        middle = begin + _power_below(end - begin)
        sides.append(index < middle)
        begin, end = (begin, middle) if index < middle else (middle, end)
    if len(path) != len(sides):
        raise ProofError(f"a path of {len(sides)} hashes is needed, not {len(path)}")
    found = leaf
    for on_left, sibling in zip(reversed(sides), path, strict=True):
        found = node(found, sibling) if on_left else node(sibling, found)
    return found
