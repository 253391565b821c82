"""Apportionment: an endless sequence of datasets by exact weights, all numbers in closed form.

The datasets are the leaves of a binary tree. Of the first c slots of a node of weight w, its left
child of weight l has c * l / w, rounded to the nearest, and its right child has the others. Both
numbers never decrease, so a slot of a node is a slot of one of its children: following it down the
tree finds its dataset, and following a slot of a dataset up the tree finds its place. Nothing is
stored but the tree.

**Bound.** Of the first n slots a dataset has its exact share to within 2, for ever. A child's
number is off by its part of what its parent's is off, and by at most 1/2 for the rounding. The tree
is a Huffman tree: a child that is not a leaf has at most 2/3 of its parent (its sibling is at least
as heavy as its own heavier child, or the two would not have been joined before). So an inner node
is off by at most 1/2 * (1 + 2/3 + 4/9 + ...) = 3/2, and a leaf by 1/2 more.

Weights are integers of any size, and so is the arithmetic: only the numbers above are rounded.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class _Node:
    """A node that is no leaf; children are numbers of nodes, or -1 - dataset for leaves."""

    weight: int
    left_weight: int
    left: int
    right: int

    def left_of(self, count: int) -> int:
        """Returns how many of the first `count` slots are the left child's."""
        return (2 * count * self.left_weight + self.weight) // (2 * self.weight)


class Apportionment:
    """The sequence; immutable."""

    def __init__(self, weights: Sequence[int]) -> None:
        """Builds the tree.

        Args:
          weights: One for each dataset, >= 0, not all 0; those of weight 0 have no slot.
        """
        self.num_datasets = len(weights)
        self._nodes: list[_Node] = []
        self._parents: dict[int, tuple[int, bool]] = {}
        heap = [(weight, d, -1 - d) for d, weight in enumerate(weights) if weight > 0]
        heapq.heapify(heap)
        serial = len(weights)
        while len(heap) > 1:
            small, big = heapq.heappop(heap), heapq.heappop(heap)
            number = len(self._nodes)
            self._nodes.append(
                _Node(weight=small[0] + big[0], left_weight=small[0], left=small[2], right=big[2])
            )
            self._parents[small[2]], self._parents[big[2]] = (number, True), (number, False)
            heapq.heappush(heap, (small[0] + big[0], serial, number))
            serial += 1
        self._root = heap[0][2]

    def counts(self, slots: int) -> np.ndarray:
        """Counts each dataset's slots among the first `slots`: int64 [datasets].

        >>> Apportionment([1, 2, 1]).counts(6).tolist()
        [2, 3, 1]
        """
        counts = np.zeros(self.num_datasets, np.int64)
        below = [(self._root, slots)]
        while below:
            number, count = below.pop()
            if number < 0:
                counts[-1 - number] = count
                continue
            node = self._nodes[number]
            left = node.left_of(count)
            below += [(node.left, left), (node.right, count - left)]
        return counts

    def count(self, dataset: int, slots: int) -> int:
        """Counts the slots of one dataset among the first `slots`."""
        number, way = -1 - dataset, []
        while number != self._root:
            number, is_left = self._parents[number]
            way.append((number, is_left))
        for number, is_left in reversed(way):
            left = self._nodes[number].left_of(slots)
            slots = left if is_left else slots - left
        return slots

    def datasets(self, start: int, stop: int) -> np.ndarray:
        """Lists the datasets of slots `start` to `stop` - 1: int64.

        >>> Apportionment([1, 2, 1]).datasets(0, 8).tolist()
        [1, 0, 1, 2, 1, 0, 1, 2]
        """
        found = np.empty(stop - start, np.int64)
        below = [(self._root, list(enumerate(range(start, stop))))]
        while below:
            number, slots = below.pop()
            if not slots:
                continue
            if number < 0:
                found[[i for i, _ in slots]] = -1 - number
                continue
            node = self._nodes[number]
            left, right = [], []
            for i, slot in slots:
                before = node.left_of(slot)
                if node.left_of(slot + 1) > before:
                    left.append((i, before))
                else:
                    right.append((i, slot - before))
            below += [(node.left, left), (node.right, right)]
        return found

    def slot_of(self, dataset: int, count: int) -> int:
        """Finds the slot of a dataset after `count` of its own.

        >>> Apportionment([1, 2, 1]).slot_of(1, 2)
        4
        """
        number, slot = -1 - dataset, count
        while number != self._root:
            number, is_left = self._parents[number]
            node = self._nodes[number]
            # The least c of which the child has slot + 1 is one more than the parent's slot: for
            # the left child c * l / w >= slot + 1/2, for the right one c * r / w > slot + 1/2.
            wanted = (2 * slot + 1) * node.weight
            if is_left:
                slot = -(-wanted // (2 * node.left_weight)) - 1
            else:
                slot = wanted // (2 * (node.weight - node.left_weight))
        return slot
