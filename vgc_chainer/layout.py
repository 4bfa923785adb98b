"""All parameters of a model as one flat index space.

A *group* is one parameter array: the unit that shares an exponent on the wire
(PAPER.md section 5, [R]). The order of the groups is the order in which ChainerMN
itself walks a model, ``sorted(model.namedparams())``, so every rank that holds the
same model derives the same layout without talking.
"""

import numpy as np

from vgc_chainer.errors import LayoutError

_SUPPORTED = (np.float16, np.float32, np.float64)


class Layout:
    """Names, shapes and dtypes of the groups, and where each lies in the flat index space.

    Args:
        groups: Sequence of ``(name, shape, dtype)``, in wire order.

    Attributes:
        names, shapes, dtypes, sizes: One entry a group; sizes in elements.
        offsets: int64 array of ``len(self) + 1`` entries; group ``k`` covers the flat
            indices ``offsets[k]`` to ``offsets[k + 1]``.
        total: Number of elements of all groups, the paper's "number of parameters".
        state_dtype: float32, or float64 as soon as one group is float64: residuals and
            decoded gradients are kept in it, never in float16.

    Raises:
        LayoutError: A name appears twice, or a dtype is not float16, float32 or float64.
    """

    def __init__(self, groups):
        groups = [(str(name), tuple(shape), np.dtype(dtype)) for name, shape, dtype in groups]
        self.names = tuple(name for name, _, _ in groups)
        self.shapes = tuple(shape for _, shape, _ in groups)
        self.dtypes = tuple(dtype for _, _, dtype in groups)
        for name, dtype in zip(self.names, self.dtypes):
            if dtype.type not in _SUPPORTED:
                raise LayoutError(
                    f'parameter {name} has dtype {dtype}; supported are float16/32/64'
                )
        if len(set(self.names)) != len(self.names):
            twice = next(n for n in self.names if self.names.count(n) > 1)
            raise LayoutError(f'parameter name {twice} appears twice')
        self.sizes = tuple(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)
        self.offsets = np.zeros(len(groups) + 1, np.int64)
        np.cumsum(self.sizes, out=self.offsets[1:])
        self.total = int(self.offsets[-1])
        wide = any(dtype == np.float64 for dtype in self.dtypes)
        self.state_dtype = np.dtype(np.float64 if wide else np.float32)

    @classmethod
    def of(cls, named_arrays):
        """Layout of ``(name, array)`` pairs."""
        return cls((name, array.shape, array.dtype) for name, array in named_arrays)

    def __len__(self):
        return len(self.names)

    def __eq__(self, other):
        return isinstance(other, Layout) and self.describe() == other.describe()

    __hash__ = None

    def describe(self):
        """The layout as a tuple of ``(name, shape, dtype name)``: comparable and picklable."""
        return tuple(
            (name, shape, dtype.name)
            for name, shape, dtype in zip(self.names, self.shapes, self.dtypes)
        )

    def slice(self, group):
        """Flat index range of one group, as a slice."""
        return slice(int(self.offsets[group]), int(self.offsets[group + 1]))

    def group_of(self, index):
        """Group that holds one flat index (host side; for error messages)."""
        return int(np.searchsorted(self.offsets, index, side='right')) - 1
