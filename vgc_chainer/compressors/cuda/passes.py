"""The passes of a compressor as kernel launches: gradient to message, messages to gradient.

Both return at once with "not mine" where the kernels do not apply, before anything is changed,
and the array code runs instead.
"""

import cupy
import numpy as np

from vgc_chainer.compressors.cuda.finite import first_nonfinite
from vgc_chainer.compressors.cuda.source import kernel
from vgc_chainer.compressors.cuda.tables import CODES, Arrays, ReadBack, Upload, pointers
from vgc_chainer.compressors.quantizer import NO_EXPONENT
from vgc_chainer.wire import Message

#: Launch shape of the pass over all parameters: threads a block, elements a thread.
THREADS, ITEMS = 256, 8
#: Elements a warp decodes; warps a block times tile times state dtype fill 32 kB.
DECODE_TILE = 1024

#: Number of each algorithm in common.cu.
_RULES = {'variance': 0, 'hybrid': 1, 'strom': 2, 'qsgd': 3, 'terngrad': 4, 'none': 5}
_RESIDUAL = ('variance', 'hybrid', 'strom')
_STOCHASTIC = ('qsgd', 'terngrad')
#: Elements that a warp of the stochastic kernels folds; 2^20 rows of them in one group at most.
_ROW = 1024
_WARPS = 8


def _blocks(n, size):
    return (max(1, -(-int(n) // size)),)


class KernelPasses:
    """Kernels, static tables and staging buffers of one prepared compressor."""

    def __init__(self, compressor):
        self.compressor = compressor
        self.layout = layout = compressor.layout
        self.rule = _RULES.get(compressor.name, -1)
        self._defines = {'STATE_BYTES': layout.state_dtype.itemsize, 'RULE': self.rule}
        self._upload, self._read_back = Upload(), ReadBack()
        self._offsets = cupy.asarray(layout.offsets)
        self._sizes = list(layout.sizes)
        if compressor.name in _RESIDUAL + _STOCHASTIC:
            self._cut_compress_tiles()
        if compressor.name == 'terngrad':
            rows = [-(-size // _ROW) for size in layout.sizes]
            self._first_row = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)])
            self._device_first_row = cupy.asarray(self._first_row)
        self._cut_decode_tiles()

    def _cut_compress_tiles(self):
        """Tiles of the compress pass: at most `tile` elements of one group."""
        self.threads, self.items = THREADS, ITEMS
        self.tile = self.threads * self.items
        each = [-(-size // self.tile) for size in self.layout.sizes]
        first = np.concatenate([[0], np.cumsum(each, dtype=np.int64)])
        self.tiles = int(first[-1])
        self._first_tile = cupy.asarray(first.astype(np.int32))
        self._tile_group = cupy.asarray(np.repeat(np.arange(len(each), dtype=np.int32), each))

    def _cut_decode_tiles(self):
        """Tiles of the decode pass: `DECODE_TILE` elements, of whatever groups."""
        layout = self.layout
        self.decode_tile = DECODE_TILE
        self.decode_tiles = -(-layout.total // DECODE_TILE)
        starts = np.minimum(
            np.arange(self.decode_tiles + 1, dtype=np.int64) * DECODE_TILE, layout.total
        )
        groups = np.searchsorted(layout.offsets, starts, side='right') - 1
        self._tile_first_group = cupy.asarray(groups.astype(np.int32))

    # -- compress

    def compress(self, gradients, moments, scale):
        """Message of this step, or None if the array code must do it."""
        launched = self.launch_compress(gradients, moments, scale)
        return None if launched is None else self.collect(*launched)

    def launch_compress(self, gradients, moments, scale):
        """Enqueue the compress pass without waiting for it; arguments of :meth:`collect`."""
        compressor, layout = self.compressor, self.layout
        if not self._has_compress_kernels():
            return None
        inputs = Arrays(gradients)
        if not self._fit(inputs):
            return None
        absent = [k for k, g in enumerate(gradients) if g is None]
        dense, dense_values = [], []
        if compressor.uses_second_moment:
            squares = Arrays(moments)
            if not self._fit(squares):
                return None
            squares = squares.made_contiguous(layout.state_dtype)
            dense = [k for k, g in enumerate(gradients) if g is not None and moments[k] is None]
        else:
            squares = Arrays([None] * len(layout))
        if dense:
            dense_values = [compressor._flush(k, gradients[k].reshape(-1), scale) for k in dense]
            inputs = Arrays([None if k in dense else g for k, g in enumerate(gradients)])
        packed, head = self._launch(inputs.made_contiguous(), squares, scale, absent, dense)
        return packed, head, absent, dense, dense_values

    def _has_compress_kernels(self):
        compressor, layout = self.compressor, self.layout
        if not layout.total:
            return False
        if compressor.name == 'qsgd':
            return compressor.bucket_size <= _ROW
        if compressor.name == 'terngrad':
            return max(layout.sizes) <= _ROW << 20
        return compressor.name in _RESIDUAL

    def _fit(self, arrays):
        """Whether the arrays have the right sizes and none is wider than the state."""
        widest = CODES[self.layout.state_dtype.char]
        return arrays.fit(self._sizes) and max(arrays.codes, default=0) <= widest

    def _launch(self, gradients, moments, scale, absent, dense):
        compressor, layout = self.compressor, self.layout
        groups, shards = len(layout), compressor.words.n_shards(layout.total)
        lists = np.array(absent + dense, np.uint32)
        listed = np.zeros((lists.size + 1) // 2, np.int64)
        listed.view(np.uint32)[: lists.size] = lists
        least = 0 if compressor.name == 'terngrad' else NO_EXPONENT
        tops = np.full((groups + 1) // 2 * 2, least, np.int32).view(np.int64)
        at = self._upload.send(
            gradients=gradients.pointers,
            moments=moments.pointers,
            codes=gradients.codes,
            tops=tops,
            lists=listed,
        )
        table = compressor._table_words()
        head = table + shards + lists.size
        # At most 8 bytes a parameter beside r and v, back in CuPy's pool after the step.
        scratch = cupy.empty(layout.total, np.uint32)
        packed = cupy.empty(head + layout.total, np.uint32)
        counts = cupy.empty((3, self.tiles), np.uint32)
        selected, fitting, starts = counts
        exponents = compressor.name == 'variance'
        if not exponents:
            fitting = selected
        hold = exponents and compressor.unrepresentable == 'hold'
        feedback = exponents and compressor.error_feedback
        state = self._state_pointers()
        tiles = (self._offsets, self._tile_group, self._first_tile)
        if compressor.name in _STOCHASTIC:
            self._launch_stochastic(at, tiles, scale, packed, scratch, selected)
        else:
            self._launch_residual(at, tiles, state, scale, scratch, selected, hold, feedback)
        rows = _blocks(self.tiles, _WARPS)
        if exponents:
            self._kernel('count_fitting', 'compress')(
                rows,
                (32 * _WARPS,),
                (at['tops'], *tiles, scratch, selected, fitting, self.tiles, self.tile),
            )
        self._kernel('scan_tiles', 'compress')(
            (1,),
            (1024,),
            (
                fitting,
                starts,
                self.tiles,
                at['tops'],
                groups,
                int(exponents),
                packed,
                table,
                shards,
                at['lists'],
                int(lists.size),
            ),
        )
        self._kernel('emit_words', 'compress')(
            rows,
            (32 * _WARPS,),
            (
                at['tops'],
                *tiles,
                scratch,
                selected,
                starts,
                self.tiles,
                self.tile,
                *state,
                packed.data.ptr + 4 * table,
                shards,
                compressor.words.index_bits,
                packed.data.ptr + 4 * head,
                int(exponents),
                int(compressor.name == 'qsgd'),
                int(feedback),
                int(hold),
            ),
        )
        return packed, head

    def _launch_residual(self, at, tiles, state, scale, scratch, selected, hold, feedback):
        """Residuals, test and selection of variance, hybrid and Strom."""
        compressor = self.compressor
        self._kernel('accumulate', 'residual', THREADS=self.threads, ITEMS=self.items)(
            (self.tiles,),
            (self.threads,),
            (
                at['gradients'],
                at['moments'],
                at['codes'],
                at['tops'],
                *tiles,
                *state,
                scratch,
                selected,
                1.0 / scale,
                1.0 / (scale * scale),
                getattr(compressor, 'alpha', 0.0),
                getattr(compressor, 'zeta', 1.0),
                getattr(compressor, 'tau', 0.0),
                int(hold or feedback),
                int(hold),
            ),
        )

    def _launch_stochastic(self, at, tiles, scale, packed, scratch, selected):
        """Norms or bounds, then the random selection, of QSGD and TernGrad."""
        compressor, groups = self.compressor, len(self.layout)
        defines = {'THREADS': self.threads, 'ITEMS': self.items, 'BUCKET_ROWS': 1}
        source = (at['gradients'], at['codes'], 1.0 / scale, self._offsets)
        bounds = buckets = 0
        if compressor.name == 'qsgd':
            buckets = compressor._device_first_bucket
            width = 1 << (compressor.bucket_size - 1).bit_length()
            defines['BUCKET_ROWS'] = max(1, width // 32)
            self._kernel('bucket_norms', 'stochastic', **defines)(
                _blocks(compressor._table_words(), _WARPS),
                (32 * _WARPS,),
                (
                    *source,
                    buckets,
                    groups,
                    compressor.bucket_size,
                    int(compressor.norm == 'max'),
                    packed,
                ),
            )
        else:
            sums = cupy.empty(int(self._first_row[-1]), np.float64)
            means, bounds = cupy.empty(groups, np.float64), cupy.empty(groups, np.float32)
            for squared in (0, 1):
                self._kernel('row_sums', 'stochastic', **defines)(
                    _blocks(self._first_row[-1], _WARPS),
                    (32 * _WARPS,),
                    (*source, self._device_first_row, groups, means, squared, sums, at['tops']),
                )
                self._kernel('fold_rows', 'stochastic', **defines)(
                    (groups,),
                    (256,),
                    (
                        at['codes'],
                        self._offsets,
                        self._device_first_row,
                        sums,
                        squared,
                        compressor.clip,
                        means,
                        at['tops'],
                        bounds,
                        packed,
                    ),
                )
        self._kernel('draw', 'stochastic', **defines)(
            (self.tiles,),
            (self.threads,),
            (
                *source[:3],
                *tiles,
                packed,
                bounds,
                buckets,
                getattr(compressor, 'bucket_size', 1),
                getattr(compressor, 'levels', 1),
                compressor.step,
                compressor.seed,
                compressor.rank,
                scratch,
                selected,
            ),
        )

    def _state_pointers(self):
        """Addresses of r and v; 0 for a state that the algorithm does not have."""
        state = self.compressor._state
        return [state[name].data.ptr if name in state else 0 for name in ('r', 'v')]

    def _kernel(self, name, *files, **defines):
        return kernel(name, files, **self._defines, **defines)

    def collect(self, packed, head, absent, dense, dense_values):
        """Message of an enqueued compress pass: reads the counts, the only synchronisation."""
        compressor, layout = self.compressor, self.layout
        table = compressor._table_words()
        shards = compressor.words.n_shards(layout.total)
        counts = self._read_back.read(packed.data.ptr + 4 * table, shards, np.uint32)
        stop = head + int(counts.sum(dtype=np.int64))
        values = (
            cupy.concatenate(dense_values) if dense_values else cupy.empty(0, layout.state_dtype)
        )
        return Message(
            table=packed[:table],
            words=packed[head:stop],
            shard_counts=counts,
            absent=np.array(absent, np.uint32),
            dense=np.array(dense, np.uint32),
            dense_values=values.view(np.uint32),
            dense_elements=int(values.size),
            packed=None if dense else packed[:stop],
        )

    # -- decode

    def decode(self, messages, gradients, scale):
        """Whether the gradients were written; otherwise nothing was."""
        launched = self.launch_decode(messages, gradients, scale)
        if launched is None:
            return False
        refused, copies = launched
        if self._read_back.read(refused, 1, np.int64)[0]:
            return False  # the array code finds out what is wrong, and says so
        for target, copy in copies:
            target[...] = copy
        return True

    def launch_decode(self, messages, gradients, scale):
        """Enqueue both launches; ``(address of the flag, [(gradient, its contiguous copy)])``."""
        compressor, layout = self.compressor, self.layout
        words = compressor.words
        if (
            self.rule < 0
            or not layout.total
            or (1 << words.index_bits) < self.decode_tile
            or not all(self._known(message) for message in messages)
        ):
            return None
        written = Arrays(gradients)
        if not written.fit(self._sizes):
            return None
        dense = [m.dense_values for m in messages if m.dense.size]
        closed = dense or any(m.absent.size for m in messages)
        if first_nonfinite([self._aligned(values) for values in dense]) >= 0:
            return None
        targets = written
        if not written.contiguous:
            targets = Arrays(
                [
                    g if g is None or g.flags.c_contiguous else cupy.empty(g.shape, g.dtype)
                    for g in gradients
                ]
            )
        shards = words.n_shards(layout.total)
        counts = [message.words.size for message in messages]
        at = self._upload.send(
            words=pointers([message.words for message in messages]),
            tables=pointers([message.table for message in messages]),
            counts=counts,
            shard_first=self._shard_starts(messages) if shards > 1 else [],
            dense=self._dense_pointers(messages),
            closed=self._closed(messages),
            gradients=targets.pointers,
            codes=targets.codes,
            refused=[0],
        )
        starts = cupy.empty((self.decode_tiles + 1) * len(messages), np.uint32)
        static = (layout.total, self.decode_tiles, self._offsets, self._tile_first_group)
        warps = 32768 // (self.decode_tile * layout.state_dtype.itemsize)
        defines = {'TILE': self.decode_tile, 'WARPS': warps}
        self._kernel('find_tiles', 'decode', **defines)(
            (*_blocks(max(counts) + 1, 1024), len(messages)),
            (256,),
            (
                at['words'],
                at['tables'],
                at['counts'],
                at['shard_first'],
                len(messages),
                shards,
                words.index_bits,
                *static,
                len(layout),
                self._table_entries(),
                at['closed'] if closed else 0,
                starts,
                at['refused'],
            ),
        )
        first_bucket = getattr(compressor, '_device_first_bucket', None)
        self._kernel('write_mean', 'decode', **defines)(
            _blocks(self.decode_tiles, warps),
            (32 * warps,),
            (
                at['words'],
                at['tables'],
                at['dense'] if dense else 0,
                at['gradients'],
                at['codes'],
                len(messages),
                len(layout),
                words.index_bits,
                (1 << words.code_bits) - 1,
                getattr(compressor, 'bucket_size', 1),
                getattr(compressor, 'tau', 0.0),
                0 if first_bucket is None else first_bucket.data.ptr,
                *static,
                starts,
                at['refused'],
                scale,
            ),
        )
        copies = [(g, t) for g, t in zip(gradients, targets.arrays) if t is not g]
        return at['refused'], copies

    def _known(self, message):
        """Whether a message has what its lengths promise, and lies where kernels can read it."""
        compressor, layout = self.compressor, self.layout
        return (
            message.table.size == compressor._table_words()
            and message.shard_counts.size == compressor.words.n_shards(layout.total)
            and int(message.shard_counts.sum(dtype=np.int64)) == message.words.size < 1 << 31
            and all(
                isinstance(array, cupy.ndarray) and array.flags.c_contiguous
                for array in (message.words, message.table, message.dense_values)
            )
        )

    def _aligned(self, values):
        # A payload is aligned to four bytes only.
        values = values.copy() if values.data.ptr % 8 else values
        return values.view(self.layout.state_dtype)

    def _table_entries(self):
        """Number of entries of a table to be checked: exponents or norms."""
        compressor = self.compressor
        return len(self.layout) if compressor.name == 'variance' else compressor._table_words()

    def _closed(self, messages):
        """1 for every group, messages x groups, that may have no words; nothing if all may."""
        if not any(message.absent.size or message.dense.size for message in messages):
            return []
        table = np.zeros((len(messages), len(self.layout)), np.int64)
        for row, message in zip(table, messages):
            row[message.absent] = row[message.dense] = 1
        return table.reshape(-1)

    def _shard_starts(self, messages):
        starts = np.zeros((len(messages), messages[0].shard_counts.size + 1), np.int64)
        for row, message in zip(starts, messages):
            np.cumsum(message.shard_counts, dtype=np.int64, out=row[1:])
        return starts.reshape(-1)

    def _dense_pointers(self, messages):
        """Address of the values of every dense group, messages x groups; nothing if none has."""
        if not any(message.dense.size for message in messages):
            return []
        layout = self.layout
        table = np.zeros((len(messages), len(layout)), np.int64)
        for row, message in zip(table, messages):
            at = message.dense_values.data.ptr
            for group in message.dense:
                row[int(group)] = at
                at += layout.sizes[int(group)] * layout.state_dtype.itemsize
        return table.reshape(-1)
