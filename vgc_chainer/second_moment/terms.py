"""Per-sample contributions of one use of one parameter, and how to square and sum them.

Several uses of one parameter in a backward pass (tied weights, a recurrent layer) are one
contribution per sample: they are added *before* squaring, by :func:`total_square_sum`.

All terms are float32, or float64 where the data are; half precision is widened, since squares of
its numbers underflow. Samples are worked off in chunks, so that the contributions of all samples
never exist at the same time.
"""

import chainer
import numpy as np

from vgc_chainer.second_moment.registry import UnsupportedFunctionError

#: Bytes of per-sample products that NumPy squares at a time: they should stay in cache.
_CPU_CHUNK = 1 << 20


def widened(array):
    """`array` in at least single precision."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


class Term:
    """Contributions c_z of the samples to one parameter.

    Attributes:
        n_samples: Number of samples.
        shape: Shape of one contribution.
        dtype: Of the contributions.
        xp: numpy or cupy.
    """

    def per_sample(self, start, stop):
        """Contributions of samples `start` to `stop`: array of shape (stop - start, *shape)."""
        raise NotImplementedError

    def merged(self, others):
        """One term for several uses, if there is a better way than adding up contributions.

        `others` are terms of the same class, shape and number of samples. None if there is not.
        """
        return None

    def square_sum(self, memory):
        """``s = sum over samples of c_z^2``, of shape `shape`.

        Args:
            memory: Bytes that contributions and what they are made of may take at a time.
        """
        return _chunked_square_sum([self], memory)

    def bytes_per_sample(self):
        """Working memory of :meth:`per_sample` for one sample."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def folded(self, n_samples):
        """The contributions of fewer samples, each of which is several of ours in a row."""
        return _Folded(self, n_samples)

    def reshaped(self, shape):
        """The same contributions for a parameter that was reshaped to ours."""
        return _View(self, lambda c, lead: c.reshape(c.shape[:lead] + tuple(shape)), shape)

    def transposed(self, axes):
        """The same contributions for a parameter of which ours is the transpose by `axes`."""
        inverse = np.argsort(axes)
        shape = tuple(self.shape[i] for i in inverse)

        def back(c, lead):
            return c.transpose(tuple(range(lead)) + tuple(int(i) + lead for i in inverse))

        return _View(self, back, shape)


class _View(Term):
    """Another term seen with its elements in another arrangement."""

    def __init__(self, term, arrange, shape):
        self.term, self.arrange, self.shape = term, arrange, tuple(shape)
        self.n_samples, self.dtype, self.xp = term.n_samples, term.dtype, term.xp

    def per_sample(self, start, stop):
        return self.arrange(self.term.per_sample(start, stop), 1)

    def square_sum(self, memory):
        return self.arrange(self.term.square_sum(memory), 0)

    def bytes_per_sample(self):
        return self.term.bytes_per_sample()


class _Folded(Term):
    """Another term whose contributions are added up in groups of equal size."""

    def __init__(self, term, n_samples):
        self.term, self.n_samples, self.rows = term, n_samples, term.n_samples // n_samples
        self.shape, self.dtype, self.xp = term.shape, term.dtype, term.xp

    def per_sample(self, start, stop):
        c = self.term.per_sample(start * self.rows, stop * self.rows)
        return c.reshape((stop - start, self.rows) + c.shape[1:]).sum(axis=1)

    def bytes_per_sample(self):
        return self.rows * self.term.bytes_per_sample()


class SampleTerm(Term):
    """Contributions given as they are: biases, scales.

    Args:
        c: Array of shape (samples, *shape).
    """

    def __init__(self, c):
        self.c = widened(c)
        self.n_samples, self.shape, self.dtype = len(c), c.shape[1:], self.c.dtype
        self.xp = chainer.backend.get_array_module(c)

    def per_sample(self, start, stop):
        return self.c[start:stop]

    def folded(self, n_samples):
        return SampleTerm(self.c.reshape((n_samples, -1) + self.shape).sum(axis=1))

    def merged(self, others):
        return SampleTerm(sum((other.c for other in others), self.c))

    def square_sum(self, memory):
        return (self.c * self.c).sum(axis=0)


class OuterTerm(Term):
    """Contributions that are sums of outer products: ``c_z = sum_p a_zp b_zp^T``.

    Linear layers have one position p, convolutions one per output pixel. With one position the
    squares factorise, ``s = (a^2)^T (b^2)``, one matrix product and no per-sample arrays.
    With more, a batched product forms the contributions chunk by chunk. (The squares of a sum of P
    products could be written as P (P + 1) / 2 products, too; terms of both signs would
    cancel there, and a second moment must not come out negative.)

    Args:
        factors: Called with a range of samples, returns ``(a, b)`` of shapes
            (n, groups, rows, positions) and (n, groups, columns, positions).
        n_samples: Number of samples.
        groups, rows, columns, positions: Sizes; a contribution has groups * rows * columns
            elements.
        shape: Shape of a contribution.
        dtype: Of the factors.
        xp: numpy or cupy.
    """

    def __init__(self, factors, n_samples, groups, rows, columns, positions, shape, dtype, xp):
        self.factors = factors
        self.n_samples = n_samples
        self.groups, self.rows, self.columns, self.positions = groups, rows, columns, positions
        self.shape, self.xp = tuple(shape), xp
        self.dtype = np.promote_types(dtype, np.float32)

    def per_sample(self, start, stop):
        a, b = self._factors(start, stop)
        return self.xp.matmul(a, b.swapaxes(2, 3)).reshape((stop - start,) + self.shape)

    def merged(self, others):
        terms = [self, *others]

        def factors(start, stop):
            both = zip(*(term._factors(start, stop) for term in terms))
            return tuple(self.xp.concatenate(list(side), axis=3) for side in both)

        positions = sum(term.positions for term in terms)
        return OuterTerm(
            factors, self.n_samples, self.groups, self.rows, self.columns, positions,
            self.shape, self.dtype, self.xp,
        )  # fmt: skip

    def folded(self, n_samples):
        rows = self.n_samples // n_samples

        def factors(start, stop):
            # Positions of all rows of a sample side by side.
            return tuple(
                f.reshape((stop - start, rows) + f.shape[1:])
                .transpose(0, 2, 3, 1, 4)
                .reshape((stop - start,) + f.shape[1:3] + (-1,))
                for f in self.factors(start * rows, stop * rows)
            )

        return OuterTerm(
            factors, n_samples, self.groups, self.rows, self.columns, rows * self.positions,
            self.shape, self.dtype, self.xp,
        )  # fmt: skip

    def square_sum(self, memory):
        if self.positions != 1:
            return super().square_sum(memory)
        a, b = (widened(f)[:, :, :, 0] for f in self.factors(0, self.n_samples))
        a, b = a * a, b * b
        return self.xp.matmul(a.transpose(1, 2, 0), b.transpose(1, 0, 2)).reshape(self.shape)

    def bytes_per_sample(self):
        factors = self.groups * (self.rows + self.columns) * self.positions
        return super().bytes_per_sample() + factors * np.dtype(self.dtype).itemsize

    def _factors(self, start, stop):
        return tuple(widened(factor) for factor in self.factors(start, stop))


class EmbedTerm(Term):
    """Contributions to the rows of a table that were looked up: sparse.

    A row that a sample looked up several times gets the sum of these gradients before squaring.
    Only rows that were looked up are touched. Sums run over sorted entries in a fixed order.

    Args:
        ids: int array (samples, tokens); negative entries are ignored.
        gy: (samples, tokens, width).
        n_rows: Rows of the table.
    """

    def __init__(self, ids, gy, n_rows):
        self.ids, self.gy = ids, widened(gy)
        self.n_samples, self.shape, self.dtype = len(ids), (n_rows, gy.shape[2]), self.gy.dtype
        self.xp = chainer.backend.get_array_module(gy)

    def folded(self, n_samples):
        width = self.shape[1]
        return EmbedTerm(
            self.ids.reshape(n_samples, -1), self.gy.reshape(n_samples, -1, width), self.shape[0]
        )

    def merged(self, others):
        terms = [self, *others]
        return EmbedTerm(
            self.xp.concatenate([term.ids for term in terms], axis=1),
            self.xp.concatenate([term.gy for term in terms], axis=1),
            self.shape[0],
        )

    def per_sample(self, start, stop):
        c = self.xp.zeros((stop - start, *self.shape), self.dtype)
        samples, rows, values = self._rows(start, stop)
        c[samples, rows] = values
        return c

    def square_sum(self, memory):
        _, rows, values = self._rows(0, self.n_samples)
        s = self.xp.zeros(self.shape, self.dtype)
        if rows.size:
            rows, sums = _sum_by_key(rows, values * values, self.xp)
            s[rows] = sums
        return s

    def _rows(self, start, stop):
        """Distinct (sample, row) pairs and the sum of the gradients of each."""
        xp, ids = self.xp, self.ids[start:stop].astype(np.int64)
        key = ids + xp.arange(stop - start)[:, None] * self.shape[0]
        known = xp.flatnonzero(ids.reshape(-1) >= 0)
        key = key.reshape(-1)[known]
        gy = self.gy[start:stop].reshape(-1, self.shape[1])[known]
        if not key.size:
            return key, key, gy
        key, values = _sum_by_key(key, gy, xp)
        return key // self.shape[0], key % self.shape[0], values


def _sum_by_key(key, rows, xp):
    """Distinct keys, ascending, and the sums of the `rows` that belong to each."""
    # CuPy's argsort is stable; NumPy's has to be asked.
    order = key.argsort(kind='stable') if xp is np else key.argsort()
    key, rows = key[order], rows[order]
    first = xp.concatenate([xp.ones(1, bool), key[1:] != key[:-1]])
    starts = xp.flatnonzero(first)
    return key[starts], xp.add.reduceat(rows, starts, axis=0)


def different_counts(what, counts):
    """Why the uses of a parameter cannot be added."""
    return (
        f'parameter {what} is used with different numbers of samples ({counts}) in one backward '
        "pass: its uses cannot be added sample by sample. Choose unsupported='batch' or 'dense'"
    )


def total_square_sum(terms, memory, what):
    """Second moment of all uses of one parameter: contributions are added, then squared.

    Args:
        terms: One a use.
        memory: See :meth:`Term.square_sum`.
        what: The parameter, for error messages.

    Raises:
        UnsupportedFunctionError: The uses have different numbers of samples.
    """
    first = terms[0]
    counts = {term.n_samples for term in terms}
    if len(counts) > 1:
        raise UnsupportedFunctionError(different_counts(what, sorted(counts)))
    if len(terms) == 1:
        return first.square_sum(memory)
    merged = None
    if all(type(term) is type(first) for term in terms):
        merged = first.merged(terms[1:])
    if merged is not None:
        return merged.square_sum(memory)
    return _chunked_square_sum(terms, memory)


def _chunked_square_sum(terms, memory):
    first = terms[0]
    xp, n = first.xp, first.n_samples
    s = xp.zeros(first.shape, first.dtype)
    budget = min(memory, _CPU_CHUNK) if xp is np else memory
    chunk = max(1, min(n, budget // max(1, sum(term.bytes_per_sample() for term in terms))))
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        c = first.per_sample(start, stop)
        for term in terms[1:]:
            c = c + term.per_sample(start, stop)
        c = xp.square(c)
        s += c[0] if len(c) == 1 else c.sum(axis=0)
    return s
