"""A growing tree of which only the right edge is kept: many leaves at once, and a root at any time.

`audit.tree.Edge` keeps what the sealer must store; this keeps less and is faster: who verifies
hashes every leaf of the log and needs the root at every checkpoint.
"""

from hashlib import sha256

from audit.tree import Edge, FetchTile, empty_root, node, root_of

#: Levels of the binary tree between two levels of tiles.
_TILE_LEVELS = 8


class Frontier:
    """The roots of the full subtrees whose sizes are the binary digits of the tree's size."""

    def __init__(self) -> None:
        self.size = 0
        self._held: list[bytes | None] = []  # by level of the binary tree

    @classmethod
    def load(cls, size: int, fetch: FetchTile) -> "Frontier":
        """Return the frontier of a tree of `size` leaves from its tiles, as `Edge.load` does."""
        made = cls()
        made.size = size
        made._held = []
        for hashes in Edge.load(size, fetch).levels:
            at = len(hashes)
            for bit in range(_TILE_LEVELS):
                width = 1 << bit
                made._held.append(root_of(hashes[at - width : at]) if at & width else None)
                at -= at & width
        return made

    @classmethod
    def of(cls, size: int, hashes: list[bytes]) -> "Frontier":
        """Return the frontier with these hashes, the largest subtree first; ValueError if none."""
        made, left = cls(), list(hashes)
        made.size = size
        for bit in range(size.bit_length()):
            made._held.append(left.pop() if size >> bit & 1 and left else None)
        if left or size.bit_count() != len(hashes):
            raise ValueError(size)
        return made

    @property
    def hashes(self) -> list[bytes]:
        """What is kept, the largest subtree first."""
        return [held for held in reversed(self._held) if held is not None]

    def copy(self) -> "Frontier":
        """Return another one that grows apart from this."""
        made = Frontier()
        made.size, made._held = self.size, list(self._held)
        return made

    def extend(self, leaves: list[bytes]) -> list[tuple[int, list[bytes]]]:
        """Add leaves; return (level, hashes) of what the tiles above level 0 gained by them."""
        self.size += len(leaves)
        nodes, level, gained = leaves, 0, []
        while nodes:
            if level == len(self._held):
                self._held.append(None)
            if level and level % _TILE_LEVELS == 0:
                gained.append((level // _TILE_LEVELS, nodes))
            held = self._held[level]
            if held is not None:
                nodes = [held, *nodes]
            self._held[level] = nodes[-1] if len(nodes) % 2 else None
            nodes = [
                sha256(b"\x01" + left + right).digest()
                for left, right in zip(nodes[::2], nodes[1::2], strict=False)
            ]
            level += 1
        return gained

    def root(self) -> bytes:
        """Return the root over all leaves."""
        found: bytes | None = None
        for held in self._held:
            if held is not None:
                found = held if found is None else node(held, found)
        return empty_root() if found is None else found
