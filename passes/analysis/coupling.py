"""Coupling of channels: union-find over atoms, the labels of channels."""

import numpy as np

from dspfx.utils.arrays import IntArray


class Coupling:
    """Atoms and the classes that they are coupled into: union-find with path halving."""

    def __init__(self) -> None:
        self.parent: list[int] = []

    def new(self, count: int) -> IntArray:
        """`count` new atoms."""
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def find(self, atom: int) -> int:
        """The representative of the class of `atom`."""
        parent = self.parent
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    def unite(self, left: IntArray, right: IntArray) -> None:
        """Couple the atoms of two equally long lists, pair by pair."""
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            self.parent[self.find(b)] = self.find(a)

    def classes(self) -> IntArray:
        """Int `[atoms]`, the class of every atom."""
        return np.array([self.find(a) for a in range(len(self.parent))], np.int64)
