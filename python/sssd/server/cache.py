"""The key-value cache of a running batch: rows join it once prefilled, and leave when they end."""

from typing import Any

from sssd.hf.verify import TreeCache

_ROOM = 128
"""Slots beyond those that are needed at once."""


class RunningCache(TreeCache):
    """A :class:`TreeCache` whose rows come and go.

    Its tensors have room for more rows and slots than are in use, so that they are seldom copied, and are
    given back when the last row leaves.

    Args:
        max_rows: Most rows that there will be.
    """

    def __init__(self, max_rows: int) -> None:
        super().__init__(0)
        self.max_rows = max_rows
        self._tensors: dict[int, Any] = {}
        """By layer and part: [..., rows, heads, slots, dim]; one for all where layers are alike."""

    def join(self, other: TreeCache) -> None:
        """Adds the row of a cache of one row behind the others."""
        row, length = len(self.lengths), other.lengths[0]
        while len(self.layers) < len(other.layers):
            self.layers.append(self.layer_class_to_replicate())
        for own, theirs in zip(self.layers, other.layers, strict=True):
            own.is_initialized = theirs.is_initialized
            if theirs.is_initialized:
                own.dtype, own.device = theirs.dtype, theirs.device
        parts = _tensors_of(other)
        self._reserve(parts, row + 1, length)
        for place, part in parts.items():
            self._tensors[place].select(-4, row)[..., :length, :] = part.select(-4, 0)[..., :length, :]
        self.lengths.append(length)
        self._expose()

    def leave(self, row: int) -> None:
        """Removes a row; the last one takes its place."""
        length = self.lengths.pop()
        last = len(self.lengths)
        if row != last:
            for tensor in self._tensors.values():
                tensor.select(-4, row)[..., :length, :] = tensor.select(-4, last)[..., :length, :]
            self.lengths[row] = length
        if not self.lengths:
            self.clear()
            return
        self._expose()

    def make_room(self, count: int) -> None:
        """Prepares for a pass of ``count`` tokens of each row."""
        self._reserve(self._tensors, len(self.lengths), max(self.lengths) + count)
        self._expose()

    def clear(self) -> None:
        """Drops all rows and gives their memory back."""
        self.lengths = []
        self.layers: list[Any] = []
        self.stack = None
        self._tensors = {}

    @property
    def bytes(self) -> int:
        """Memory that the tensors take."""
        return sum(int(tensor.nbytes) for tensor in self._tensors.values())

    def _reserve(self, parts: dict[int, Any], rows: int, slots: int) -> None:
        """Makes tensors for parts of this form, or larger ones, with room for so much."""
        for place, part in parts.items():
            held = self._tensors.get(place)
            old_rows, old_slots = (0, 0) if held is None else (held.shape[-4], held.shape[-2])
            if old_rows >= rows and old_slots >= slots:
                continue
            new_rows = old_rows if old_rows >= rows else min(max(rows, 2 * old_rows), self.max_rows)
            new_slots = old_slots if old_slots >= slots else max(slots + _ROOM, 3 * old_slots // 2)
            # zeros: what lies beyond a row's length is weighted by zero, and must be a number
            larger = part.new_zeros(*part.shape[:-4], new_rows, part.shape[-3], new_slots, part.shape[-1])
            if held is not None:
                larger[..., :old_rows, :, :old_slots, :] = held
            self._tensors[place] = larger

    def _expose(self) -> None:
        """Lets the layers write to the rows in use."""
        rows = len(self.lengths)
        views = {place: tensor.narrow(-4, 0, rows) for place, tensor in self._tensors.items()}
        self.stack = views[0] if self.alike else None
        for index, layer in enumerate(self.layers):
            places = (2 * index, 2 * index + 1)
            layer.buffers = [
                self.stack[place] if self.alike else views[place]
                for place in places
                if self.alike or place in views  # a layer may share those of another
            ]


def _tensors_of(cache: TreeCache) -> dict[int, Any]:
    if cache.stack is not None:
        return {0: cache.stack}
    return {
        2 * index + part: buffer
        for index, layer in enumerate(cache.layers)
        for part, buffer in enumerate(layer.buffers)
    }
