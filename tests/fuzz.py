"""Damaged messages for the decoder of every compressor: ``python -m tests.fuzz [MESSAGES [gpu]]``.

A message is right, or it is refused with a WireError. Whatever it is, no other exception comes,
nothing outside of the gradients is written, a refused message changes nothing at all, and an
accepted one changes only the elements that it names.
"""

import sys
import time

import numpy as np

from tests.compressors.common import SETTINGS, layout_of, random_step
from vgc_chainer import wire
from vgc_chainer.compressors import COMPRESSORS
from vgc_chainer.errors import WireError

#: Number of 32-bit poison words before and behind every gradient.
GUARD = 8
POISON = 0x7FC0DEAD  # a NaN
EXTREMES = np.uint32(
    [0, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0x80000000, 0xFFFFFFFF, 0x7FFF8000, 0x80008000]
)
SHAPES = [(5, 7), (0,), (1,), (40,), (3, 3)]
#: Kinds of damage, those that leave the length alone more often: they get further.
_KINDS = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 7, 8, 8, 8, 8]


class Target:
    """One compressor with messages of its own, to be damaged and decoded.

    Args:
        name, options: Of the compressor.
        index_bits: Fewer than usual cut the model into shards.
        checksum: Send one.
        dtype: Of the gradients.
        xp: numpy or cupy: where the decoder works.
    """

    def __init__(self, name, options, index_bits=None, checksum=False, dtype=np.float32, xp=np):
        self.layout = layout_of(SHAPES, dtype)
        self.xp = xp
        self.compressor = COMPRESSORS[name](**options)
        self.compressor.prepare(self.layout, xp)
        if index_bits:
            self.compressor.words = type(self.compressor.words)(
                self.compressor.code_bits, index_bits
            )
        rng = np.random.default_rng(0)
        self.messages = []
        for kind in ('plain', 'absent', 'dense', 'plain', 'empty'):
            gradients, moments = random_step(self.layout, rng)
            if kind == 'absent':
                gradients[0] = moments[0] = None
            if kind == 'dense':
                moments[3] = moments[1] = None
            if kind == 'empty':
                gradients = moments = [np.zeros_like(g) for g in gradients]
            gradients, moments = (
                [None if x is None else xp.asarray(x) for x in arrays]
                for arrays in (gradients, moments)
            )
            message = self.compressor.compress(gradients, moments)
            header, payload = message.header(), _host(message.pack(xp))
            if checksum:
                header.checksum = wire.checksum(payload)
            self.messages.append((header.pack(), payload))
        self.good = self.received(*self.messages[0], 0)
        alone = xp.zeros(self.layout.total, self.layout.state_dtype)
        self.compressor.accumulate(self.good, alone)
        self.alone = _host(alone) / self.layout.state_dtype.type(2)

    def received(self, record, payload, rank):
        """The message as a receiver sees it, checked as :class:`CompressedCommunicator` does."""
        header = wire.Header.unpack(record, rank)
        wire.require_plausible(header, self.layout, rank)
        return wire.unpack(self.xp.asarray(payload), header, self.layout, rank)

    def decoded(self, messages):
        """Gradients after decode, flat; raises AssertionError if anything else was written."""
        sizes = [size * dtype.itemsize // 4 for size, dtype in self._arrays()]
        memory = self.xp.full(sum(sizes) + GUARD * (len(sizes) + 1), POISON, np.uint32)
        gradients, guards, at = [], [slice(0, GUARD)], GUARD
        for words, shape, dtype in zip(sizes, self.layout.shapes, self.layout.dtypes):
            gradients.append(memory[at : at + words].view(dtype).reshape(shape))
            guards.append(slice(at + words, at + words + GUARD))
            at += words + GUARD
        before = memory.copy()
        try:
            self.compressor.decode(messages, gradients)
        except WireError:
            assert (memory == before).all(), 'a refused message has changed gradients'
            raise
        for guard in guards:
            assert (memory[guard] == POISON).all(), 'written outside of the gradients'
        return np.concatenate([_host(g).reshape(-1) for g in gradients])

    def _arrays(self):
        return zip(self.layout.sizes, self.layout.dtypes)

    def feed(self, record, payload):
        """Receive and decode beside a good message; whether it was accepted."""
        sent = payload.copy()
        try:
            message = self.received(record, payload, 1)
            result = self.decoded([self.good, message])
        except WireError:
            return False
        assert (payload == sent).all(), 'the message itself was changed'
        assert np.isfinite(result).all()
        named = np.zeros(self.layout.total, bool)
        assert message.shard_counts.sum(dtype=np.int64) == message.words.size
        base = np.repeat(np.arange(message.shard_counts.size), message.shard_counts)
        words = self.compressor.words
        index = (_host(message.words) & np.uint32((1 << words.index_bits) - 1)).astype(np.int64)
        named[index + (base << words.index_bits)] = True
        for group in message.dense:
            named[self.layout.slice(int(group))] = True
        np.testing.assert_array_equal(result[~named], self.alone[~named])
        return True


def _host(array):
    return array.get() if hasattr(array, 'get') else array


def mutate(rng, target):
    """A header record and payload made from good ones by one to four changes."""
    record, payload = target.messages[rng.integers(len(target.messages))]
    record, payload = record.copy(), payload.copy()
    for _ in range(rng.integers(1, 5)):
        kind = rng.choice(_KINDS)
        n = payload.size
        if kind == 0:
            record[rng.integers(record.size)] = _number(rng, n)
        elif kind == 1:  # a word moves from one section to another
            a, b = rng.integers(1, 7, 2)
            if np.abs(record.astype(float)).max() < 2**62:
                record[a] += 1
                record[b] -= 1
        elif kind == 2:
            payload = payload[: rng.integers(n + 1)]
        elif kind == 3:
            more = rng.integers(0, 2**32, rng.integers(1, 5), dtype=np.uint32)
            payload = np.concatenate([payload, more])
        elif n == 0:
            continue
        elif kind == 4:
            payload[rng.integers(n)] = rng.integers(2**32, dtype=np.uint32)
        elif kind == 5:
            payload[rng.integers(n)] = EXTREMES[rng.integers(EXTREMES.size)]
        elif kind == 6:
            a, b = rng.integers(n, size=2)
            payload[a], payload[b] = payload[b], payload[a]
        elif kind == 7:  # of another length, and the header says so
            section = 1 + rng.integers(6)
            start = int(np.clip(record[1:section], 0, n).sum())
            payload = np.delete(payload, min(start, n - 1))
            record[section] -= record[section] > 0
            record[0] -= section == 5 and record[0] > 0
        else:
            payload[rng.integers(n)] ^= np.uint32(1 << rng.integers(32))
    return record, payload


def _number(rng, n):
    return int(rng.choice([0, 1, -1, n, n + 1, 2**31, 2**32 + 1, 2**62, -(2**63), 7]))


def targets(xp=np):
    """Every setting of every compressor, plain; and with shards, checksum or float64."""
    for name, options in SETTINGS:
        yield f'{name} {options}', Target(name, options, xp=xp)
        yield f'{name} {options} shards', Target(name, options, index_bits=4, xp=xp)
        yield f'{name} {options} checksum', Target(name, options, checksum=True, xp=xp)
        yield f'{name} {options} float64', Target(name, options, dtype=np.float64, xp=xp)


def fuzz(target, messages, rng):
    """How many of so many damaged messages were accepted."""
    return sum(target.feed(*mutate(rng, target)) for _ in range(messages))


def main(messages=1_000_000, device='cpu'):
    xp = np
    if device == 'gpu':
        import cupy as xp
    everything = list(targets(xp))
    each = -(-int(messages) // len(everything))
    start, total, accepted = time.monotonic(), 0, 0
    for number, (what, target) in enumerate(everything):
        rng = np.random.default_rng([int(start), number])
        good = fuzz(target, each, rng)
        total, accepted = total + each, accepted + good
        print(f'{what}: {each} messages, {good} accepted, {each - good} refused', flush=True)
    seconds = time.monotonic() - start
    print(
        f'{total} damaged messages in {seconds:.0f} s: {accepted} accepted and harmless, '
        f'{total - accepted} refused with a WireError, nothing else'
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
