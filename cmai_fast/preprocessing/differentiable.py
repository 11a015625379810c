"""A processor's result for some pictures as a differentiable function of them, from its `Trace`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cmai_fast.preprocessing.trace import Node, Places


class _Take:
    """Pixels of some nodes at `places` (..., h, w); elsewhere `filling`, which has the shape of the result.

    `sizes` are those of the nodes, by number.
    """

    def __init__(self, places: Places, filling: Tensor | None, sizes: Mapping[int, tuple[int, int]]) -> None:
        self.nodes = sorted(_numbers(places))
        start, offset = 0, np.zeros(max(self.nodes, default=0) + 1, dtype=np.int64)
        wide = np.zeros_like(offset)
        for node in self.nodes:
            offset[node], wide[node] = start, sizes[node][1]
            start += sizes[node][0] * sizes[node][1]
        real = places.node >= 0
        own = np.where(real, places.node, 0)
        flat = np.where(real, offset[own] + places.row * wide[own] + places.column, 0)
        self.shape = flat.shape
        # The whole of a node as it is, which is the most frequent case, needs no index.
        self.whole = bool(real.all()) and flat.size == start and bool((flat.ravel() == np.arange(start)).all())
        self.index = torch.from_numpy(flat.ravel())
        self.real = None if real.all() else torch.from_numpy(real)
        self.filling = None
        if self.real is not None and filling is not None:
            self.filling = torch.where(self.real, 0.0, filling)

    def __call__(self, values: Mapping[int, Tensor]) -> Tensor:
        """`values` (n, C, H, W) by node, to (n, C, ...)."""
        if not self.nodes:  # a sample without pictures
            assert self.filling is not None
            return self.filling[None]
        flat = [values[node].flatten(2) for node in self.nodes]
        joined = flat[0] if len(flat) == 1 else torch.cat(flat, 2)
        taken = joined if self.whole else joined.index_select(2, self.index.to(joined.device))
        taken = taken.unflatten(2, self.shape)
        if self.real is None:
            return taken
        assert self.filling is not None
        return torch.where(self.real.to(joined.device), taken, self.filling.to(taken))

    def key(self) -> bytes:
        parts = [self.index, self.real, self.filling]
        return repr((self.nodes, self.shape)).encode() + b"".join(p.numpy().tobytes() for p in parts if p is not None)


class Route:
    """What a processor makes of the pictures of one sample.

    Args:
        nodes: of the trace.
        places: (U, h, w) of the sample's units.
        filling: (U, 3, h, w) in [0, 1], of pixels that come from no picture.
        first: the number of the sample's first picture.

    Attributes:
        key: equal for samples of which the same is made.
        reached: whether any pixel of the result comes from a picture.
    """

    def __init__(self, nodes: Sequence[Node], places: Places, filling: Tensor, first: int) -> None:
        used: set[int] = set()
        left = _numbers(places)
        while left:
            used.add(number := left.pop())
            if (source := nodes[number].source) is not None:
                left |= _numbers(source) - used
        order = sorted(used)
        local = np.full(len(nodes) + 1, -1, dtype=np.int64)  # the last stands for no node
        local[order] = np.arange(len(order))
        self._nodes = [nodes[number] for number in order]
        sizes = {i: (node.height, node.width) for i, node in enumerate(self._nodes)}
        self._pictures = [node.number - first for node in self._nodes]
        self._takes: list[_Take | None] = []
        for node in self._nodes:
            if node.source is None:
                self._takes.append(None)
                continue
            filled = None if node.filling is None else torch.from_numpy(node.filling)
            self._takes.append(_Take(_local(node.source, local), filled, sizes))
        self._last = _Take(_local(places, local), filling.movedim(1, 0).contiguous(), sizes)
        digest = hashlib.blake2b(self._last.key())
        for node, take, picture in zip(self._nodes, self._takes, self._pictures, strict=True):
            own = -1 if node.source is not None else picture
            digest.update(repr((node.height, node.width, own, node.how)).encode())
            digest.update(b"" if take is None else take.key())
        self.key, self.reached = digest.digest(), bool(self._last.nodes)

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        """The pictures of n samples, each (n, 3, H, W) on the grid k/255, to units (n, U, 3, h, w) on that grid."""
        values: dict[int, Tensor] = {}
        for i, (node, take, picture) in enumerate(zip(self._nodes, self._takes, self._pictures, strict=True)):
            if take is None:
                values[i] = pictures[picture]
            else:
                assert node.how is not None
                values[i] = node.how(take(values), node.height, node.width)
        return self._last(values).movedim(2, 1)


def _numbers(places: Places) -> set[int]:
    return {int(n) for n in np.unique(places.node) if n >= 0}


def _local(places: Places, local: np.ndarray) -> Places:
    return Places(local[places.node], places.row, places.column)


def by_route(routes: Sequence[Route], work: Callable[[Route, list[int]], Tensor]) -> Tensor:
    """`work(route, rows)` for each route and the rows that have it, put together by row."""
    groups: dict[bytes, list[int]] = {}
    for row, route in enumerate(routes):
        groups.setdefault(route.key, []).append(row)
    made = torch.cat([work(routes[rows[0]], rows) for rows in groups.values()])
    if len(groups) == 1:
        return made
    order = torch.tensor([row for rows in groups.values() for row in rows])
    return made[order.argsort().to(made.device)]
