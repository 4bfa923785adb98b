"""What all compressors share: the contract, the state, blocks, dense and absent groups.

A compressor knows nothing of Chainer or MPI: arrays in, words out. The same array code runs
on NumPy and CuPy. NumPy walks the index space in blocks that fit a core's cache; CuPy takes the
whole model as one block. A GPU kernel may take over one whole pass: see
:meth:`Compressor.compress`.
"""

import numpy as np

from vgc_chainer.compressors.finite import first_nonfinite
from vgc_chainer.compressors.words import WordFormat
from vgc_chainer.errors import StateError, WireError
from vgc_chainer.wire import Message

#: Elements in a NumPy block: r, v and the float64 temporaries of the test stay in a 1 MB L2 cache.
BLOCK = 1 << 15


def concatenate(xp, parts, dtype):
    """``xp.concatenate`` that accepts no parts at all."""
    return xp.concatenate(parts) if parts else xp.empty(0, dtype)


class Compressor:
    """Base class. One instance belongs to one rank.

    Life: construct with hyperparameters, :meth:`prepare` with a layout, then in every step
    :meth:`compress` this rank's gradient and :meth:`accumulate` everybody's messages in rank
    order.

    Class attributes:
        name: Name in :func:`vgc_chainer.create_communicator`.
        uses_second_moment: Whether :meth:`compress` needs second moments.
        state_names: Names of the flat state arrays, each as long as the layout.

    Attributes:
        use_kernels: On CuPy, let CUDA kernels take over whole passes where there are any; False
            leaves them to the array code, with the same results. Set before :meth:`prepare`.
    """

    name = None
    uses_second_moment = False
    state_names = ()
    code_bits = 0
    use_kernels = True

    def __init__(self):
        self.words = WordFormat(self.code_bits)
        self.layout = None
        self.xp = np
        self.rank = 0
        self.step = 0
        self._state = {}
        self._passes = None

    # -- what a subclass defines

    def hyperparameters(self):
        """Everything that must agree between ranks, as a dict of plain values."""
        raise NotImplementedError

    def _encode(self, gradients, moments, scale):
        """Take this step's gradients in, return ``(table, indices, negative, codes)``.

        `gradients` and `moments` are flat; None for groups that are absent or dense. `indices`
        ascend; `codes` may be None.
        """
        raise NotImplementedError

    def _decode(self, table, indices, negative, codes, rank):
        """Values, in the state dtype, of the elements of one message from `rank`."""
        raise NotImplementedError

    def _table_words(self):
        """Length of the table in 32-bit words."""
        return 0

    def _table_problem(self, table):
        """What is wrong with a received table of the right length, in words, or None.

        A damaged norm or exponent would not hit one element, but a whole bucket or array.
        """
        return None

    # -- the contract

    def prepare(self, layout, xp=np, rank=0):
        """Set up for a layout; state of parameters that were there before is carried over.

        Args:
            layout: :class:`vgc_chainer.layout.Layout`.
            xp: numpy or cupy: where gradients, state and words live.
            rank: This worker's rank; seeds the stochastic compressors.
        """
        old_layout, old_state = self.layout, self._state
        self.layout, self.xp, self.rank = layout, xp, rank
        self._offsets = xp.asarray(layout.offsets)
        self._state = {n: xp.zeros(layout.total, layout.state_dtype) for n in self.state_names}
        self._passes = self._kernel_passes()
        if old_layout is None:
            return
        was = {name: k for k, name in enumerate(old_layout.names)}
        for group, name in enumerate(layout.names):
            k = was.get(name)
            if k is not None and old_layout.shapes[k] == layout.shapes[group]:
                for key, array in old_state.items():
                    self._state[key][layout.slice(group)] = xp.asarray(array[old_layout.slice(k)])

    def compress(self, gradients, moments=None, scale=1.0):
        """Take one step's gradient in and return what is to be sent.

        This is the whole pass from gradient to words, and the seam at which a fused GPU kernel
        replaces it.

        Args:
            gradients: One array a group, any float dtype, any shape of the right size. None
                for a group that takes no part in this step: its state is left alone.
            moments: One array a group where the compressor uses second moments. None for a group
                whose gradient is there makes it dense: sent uncompressed, residual flushed.
            scale: Loss scale that the gradients carry (moments carry its square); divided out.

        Returns:
            vgc_chainer.wire.Message
        """
        xp, layout = self.xp, self.layout
        self.step += 1
        if self._passes is not None:
            message = self._passes.compress(gradients, moments, scale)
            if message is not None:
                return message
        absent = [k for k, g in enumerate(gradients) if g is None]
        gradients = [None if g is None else g.reshape(-1) for g in gradients]
        if moments is not None:
            moments = [None if s is None else s.reshape(-1) for s in moments]
        dense = self._dense_groups(gradients, moments)
        dense_values = [self._flush(k, gradients[k], scale) for k in dense]
        for k in dense:
            gradients[k] = None
        # An overflow of r or v is dealt with where it matters (see residual.py).
        with np.errstate(over='ignore'):
            table, indices, negative, codes = self._encode(gradients, moments, scale)
        values = concatenate(xp, dense_values, layout.state_dtype)
        return Message(
            table=table,
            words=self.words.pack(indices, negative, codes),
            shard_counts=self.words.shard_counts(indices, layout.total, xp).astype(np.uint32),
            absent=np.array(absent, np.uint32),
            dense=np.array(dense, np.uint32),
            dense_values=values.view(np.uint32),
            dense_elements=int(values.size),
        )

    def decode(self, messages, gradients, scale=1.0):
        """Write the mean of all ranks' messages into the gradients (PAPER.md section 6, [R]).

        Like :meth:`compress` one whole pass, and a seam for a GPU kernel.

        Args:
            messages: One :class:`vgc_chainer.wire.Message` a rank, in rank order.
            gradients: One array a group to be overwritten, or None to leave a group out.
            scale: Loss scale to multiply the mean by, as the optimizer will divide by it.

        Raises:
            WireError: A message does not fit the layout; `gradients` are then unchanged.
        """
        if self._passes is not None and self._passes.decode(messages, gradients, scale):
            return
        layout = self.layout
        total = self.xp.zeros(layout.total, layout.state_dtype)
        # Of NumPy an overflow can be heard without looking for it in 10^8 numbers.
        overflows = []
        with np.errstate(over='call', call=lambda *_: overflows.append(1)):
            for rank, message in enumerate(messages):
                self.accumulate(message, total, rank)
            total /= len(messages)
            if scale != 1.0:
                total *= layout.state_dtype.type(scale)
        for group, gradient in enumerate(gradients):
            if gradient is not None:
                mean = total[layout.slice(group)].reshape(gradient.shape)
                if overflows or gradient.dtype.itemsize < total.dtype.itemsize:
                    # A residual may have grown beyond what float16 holds.
                    largest = np.finfo(gradient.dtype).max
                    mean = mean.clip(-largest, largest)
                gradient[...] = mean

    def accumulate(self, message, out, rank=0):
        """Decode a message and add it to `out`.

        Indices of one message are unique, so no two additions meet and the result does not
        depend on scheduling; call it in rank order on every rank and all hold the same bits.

        Args:
            message: Message of any rank.
            out: Flat array of ``layout.total`` elements in the state dtype.
            rank: Sender, for error messages.

        Raises:
            WireError: The message does not fit the layout; `out` is then unchanged.
        """
        layout, xp = self.layout, self.xp
        if message.table.size != self._table_words():
            raise WireError(
                f'rank {rank} sent a table of {message.table.size} words; '
                f'{self.name} has {self._table_words()}'
            )
        problem = self._table_problem(message.table)
        if problem is not None:
            raise WireError(f'rank {rank} sent {problem}')
        if message.shard_counts.size != self.words.n_shards(layout.total):
            raise WireError(f'rank {rank} sent {message.shard_counts.size} shards')
        dense = self._dense_values(message, rank)
        indices, negative, codes = self.words.unpack(message.words, message.shard_counts, xp)
        if indices.size:
            ascending = bool((indices[1:] > indices[:-1]).all())
            if not ascending or int(indices[-1]) >= layout.total:
                raise WireError(
                    f'rank {rank} sent indices that are not ascending below {layout.total}'
                )
            self._refuse_words_elsewhere(message, indices, rank)
            values = self._decode(message.table, indices, negative, codes, rank)
            out[indices] += values
        start = 0
        for group in message.dense:
            stop = start + layout.sizes[int(group)]
            out[layout.slice(int(group))] += dense[start:stop]
            start = stop

    def state(self):
        """State as a dict of arrays and integers: what a snapshot must hold."""
        return {'step': self.step, **self._state}

    def load_state(self, state):
        """Restore what :meth:`state` returned. Call after :meth:`prepare`.

        Raises:
            StateError: An array is missing or has another size or dtype.
        """
        for name, mine in self._state.items():
            array = state.get(name)
            if array is None:
                raise StateError(f'state of compressor {self.name} lacks {name}')
            if array.shape != mine.shape or array.dtype != mine.dtype:
                raise StateError(
                    f'{name} of compressor {self.name}: saved {array.dtype}{array.shape}, '
                    f'this model needs {mine.dtype}{mine.shape}'
                )
        for name, mine in self._state.items():
            mine[...] = self.xp.asarray(state[name])
        self.step = int(state['step'])

    # -- helpers for subclasses

    def _dense_values(self, message, rank):
        """Values of the dense groups of a received message, flat, in the state dtype."""
        dense = message.dense_values
        if dense.ctypes.data % 8 if self.xp is np else dense.data.ptr % 8:
            dense = dense.copy()  # a payload is aligned to four bytes only
        dense = dense.view(self.layout.state_dtype)
        if dense.size and first_nonfinite([dense], self.xp) >= 0:
            raise WireError(f'rank {rank} sent NaN or Inf among its dense values')
        return dense

    def _refuse_words_elsewhere(self, message, indices, rank):
        """No word may lie in a group that the message itself calls absent or dense."""
        for what, groups in (('absent', message.absent), ('dense', message.dense)):
            for group in groups:
                where = self.layout.slice(int(group))
                first, last = self.xp.searchsorted(
                    indices, self.xp.asarray([where.start, where.stop])
                )
                if int(first) != int(last):
                    raise WireError(f'rank {rank} sent words of group {group}, which is {what}')

    def _kernel_passes(self):
        if self.xp is np:
            return None
        from vgc_chainer.compressors import cuda

        return cuda.passes_for(self)

    def _dense_groups(self, gradients, moments):
        if not self.uses_second_moment:
            return []
        return [k for k, g in enumerate(gradients) if g is not None and moments[k] is None]

    def _flush(self, group, gradient, scale):
        """Dense value of a group: its gradient and whatever residual was held back."""
        value = self._unscaled(gradient, scale).astype(self.layout.state_dtype)
        largest = np.finfo(value.dtype).max
        for name, array in self._state.items():
            held = array[self.layout.slice(group)]
            if name == 'r':
                with np.errstate(over='ignore'):
                    value += held
                # A receiver refuses Inf.
                self.xp.clip(value, -largest, largest, out=value)
            held[...] = 0
        return value

    def _unscaled(self, flat, scale):
        """`flat` without the factor `scale` that it carries; exact for powers of two."""
        if scale == 1.0:
            return flat
        dtype = self.layout.state_dtype
        return flat.astype(dtype) * dtype.type(1.0 / scale)

    def _groups_of(self, indices):
        """Group of each flat index; `indices` ascend."""
        if self.xp is not np:
            return self.xp.searchsorted(self._offsets, indices, side='right') - 1
        counts = np.diff(np.searchsorted(indices, self._offsets))
        return np.repeat(np.arange(len(self.layout)), counts)

    def _blocks(self):
        """Blocks of the flat index space: ``(start, stop, [(group, from, to)])``.

        `from` and `to` are positions within the group. A block of NumPy's holds at most `BLOCK`
        elements, of many small groups or of a part of a large one.
        """
        limit = BLOCK if self.xp is np else max(self.layout.total, 1)
        start, pieces, filled = 0, [], 0
        for group, size in enumerate(self.layout.sizes):
            done = 0
            while done < size:
                take = min(size - done, limit - filled)
                pieces.append((group, done, done + take))
                done += take
                filled += take
                if filled == limit:
                    yield start, start + filled, pieces
                    start, pieces, filled = start + filled, [], 0
        if filled:
            yield start, start + filled, pieces
