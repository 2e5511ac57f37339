"""Labels: one integer for each channel, and a union-find that says which are the same."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.int64]


class Labels:
    """A vectorised union-find over integer labels that also knows *pairs* and *frozen* labels.

    Two labels are *tied* when their channels can only be removed together. A label may be a *pair*
    of two others: channel 7 of 12 may be row 1, column 3 of a grid of heads. It is removed when
    either of its two factors is. What may not change is *frozen*, with the reason.

    >>> labels = Labels()
    >>> a, b = labels.new(3), labels.new(3)
    >>> labels.tie(a, b)
    >>> bool((labels.find(a) == labels.find(b)).all())
    True
    """

    def __init__(self) -> None:
        self.size = 0
        self.parent: Vector = np.arange(1024)
        self.factors: Vector = np.full((2, 1024), -1)  # of a root; -1: not a pair
        self.reason: Vector = np.zeros(1024, np.int64)  # of a root; 0: free
        self.fresh = np.ones(1024, bool)  # tied to nothing yet, free, and no pair
        self.paired = False  # whether any label is a pair
        self.reasons: list[str] = [""]
        self._known: dict[str, int] = {"": 0}

    def new(self, count: int) -> Vector:
        """Labels that are tied to nothing yet."""
        start, self.size = self.size, self.size + count
        if self.size > len(self.parent):
            self.reserve(2 * self.size)
        return np.arange(start, self.size)

    def reserve(self, room: int) -> None:
        """Room for so many labels at once."""
        more = room - len(self.parent)
        self.parent = np.concatenate([self.parent, np.arange(len(self.parent), room)])
        self.factors = np.concatenate([self.factors, np.full((2, more), -1)], axis=1)
        self.reason = np.concatenate([self.reason, np.zeros(more, np.int64)])
        self.fresh = np.concatenate([self.fresh, np.ones(more, bool)])

    def pair(self, first: Vector, second: Vector) -> Vector:
        """Labels of channels that go when the first or the second of two channels goes."""
        made = self.new(len(first))
        self.factors[0, made], self.factors[1, made] = first, second
        self.fresh[made], self.paired = False, True
        return made

    def find(self, labels: Vector) -> Vector:
        """The root of each label: equal roots are one channel."""
        roots = self.parent[labels]
        while True:
            above = self.parent[roots]
            if not np.count_nonzero(above != roots):
                return roots
            self.parent[labels] = above  # shortens the path for the next search
            roots = above

    def tie(self, first: Vector, second: Vector) -> None:
        """Make the labels one channel, element by element; factors of pairs are tied in turn."""
        if self._hang(first, second) or self._hang(second, first):
            return
        todo = [(first, second)]
        while todo:
            a, b = todo.pop()
            while True:
                a, b = self.find(a), self.find(b)
                apart = a != b
                if not np.count_nonzero(apart):
                    break
                a, b = a[apart], b[apart]
                if self.paired:
                    a, b = self._without_loops(a, b)
                todo += self._hook(np.maximum(a, b), np.minimum(a, b))

    def _hang(self, new: Vector, old: Vector) -> bool:
        """A row of labels that nothing was tied to hangs below older ones at once."""
        count = len(new)
        if not count or not self.fresh[new[0]] or new[-1] - new[0] != count - 1:
            return False
        row = slice(new[0], new[-1] + 1)
        if np.count_nonzero(self.fresh[row]) < count or np.count_nonzero(new[1:] <= new[:-1]):
            return False
        roots = self.find(old)
        if np.count_nonzero(roots >= new[0]):  # the least label is the root
            return False
        self.parent[row] = roots
        self.fresh[row] = self.fresh[old] = False
        return True

    def _hook(self, high: Vector, low: Vector) -> list[tuple[Vector, Vector]]:
        """Hang `high` below `low`; return the factors that have to be tied as well."""
        self.fresh[high] = self.fresh[low] = False
        self.parent[high] = low  # of two claims on one label the last wins; `tie` comes back
        root = self.find(high)
        why = self.reason[high]
        fresh = (why > 0) & (self.reason[root] == 0)
        self.reason[root[fresh]] = why[fresh]
        if not self.paired:
            return []
        paired = self.factors[0, high] >= 0
        high, root = high[paired], root[paired]
        bare = self.factors[0, root] < 0
        self.factors[:, root[bare]] = self.factors[:, high[bare]]
        return [(self.factors[k, high], self.factors[k, root]) for k in (0, 1) if len(high)]

    def _without_loops(self, a: Vector, b: Vector) -> tuple[Vector, Vector]:
        """Drop the ties that would make a channel a factor of itself, and freeze them."""
        loops = self._inside(a, b) | self._inside(b, a)
        if loops.any():
            self.freeze(np.concatenate([a[loops], b[loops]]), "a channel would contain itself")
        return a[~loops], b[~loops]

    def _inside(self, inner: Vector, outer: Vector) -> npt.NDArray[np.bool_]:
        """Where `inner` is a factor, at any depth, of `outer`."""
        found = np.zeros(len(inner), bool)
        todo = [(outer, np.arange(len(outer)))]
        while todo:
            roots, where = todo.pop()
            paired = self.factors[0, roots] >= 0
            if paired.any():
                for k in (0, 1):
                    below = self.find(self.factors[k, roots[paired]])
                    found[where[paired][below == inner[where[paired]]]] = True
                    todo.append((below, where[paired]))
        return found

    def freeze(self, labels: Vector, why: str) -> None:
        """These channels may not change; the first reason given stays."""
        number = self._known.setdefault(why, len(self.reasons))
        if number == len(self.reasons):
            self.reasons.append(why)
        roots = self.find(labels)
        self.reason[roots[self.reason[roots] == 0]] = number
        self.fresh[roots] = False

    def settle(self) -> None:
        """Hand the reason of a frozen pair down to its factors; called once, at the end."""
        while self.paired:
            every = np.arange(self.size)
            roots = every[self.parent[: self.size] == every]
            roots = roots[(self.factors[0, roots] >= 0) & (self.reason[roots] > 0)]
            below = self.find(self.factors[:, roots].ravel())
            why = np.tile(self.reason[roots], 2)
            late = self.reason[below] == 0
            if not late.any():
                return
            self.reason[below[late]] = why[late]

    def leaves(self, labels: Vector) -> dict[str, Vector]:
        """The factors that are not pairs, by their place ("": itself, "01": first, then second).

        -1 stands where a label has no factor at that place.
        """
        if not self.paired:
            return {"": self.find(labels)} if len(labels) else {}
        found: dict[str, Vector] = {}
        todo = [("", self.find(labels), np.ones(len(labels), bool))]
        while todo:
            path, roots, here = todo.pop()
            paired = here & (self.factors[0, roots] >= 0)
            leaf = here & ~paired
            if leaf.any():
                found[path] = np.where(leaf, roots, -1)
            if paired.any():
                for k in (0, 1):
                    below = np.where(paired, self.factors[k, roots], roots)
                    todo.append((path + str(k), self.find(below), paired))
        return found
