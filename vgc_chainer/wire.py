"""What one rank sends in one step.

Three things, in this order:

1. A :class:`Status`, of fixed size, before any residual is touched: can this rank take its
   part, is it at the same step, has it the same model, algorithm and hyperparameters?
2. A :class:`Header`, of fixed size: how long is the payload and each section of it?
3. The payload, a :class:`Message`: a handful of uint32 arrays, packed one behind the other::

       [table | shard counts | absent groups | dense groups | words | dense values]

`table` is the compressor's own header (group exponents, bucket norms, ...). Words are in
index order, one per element sent. *Absent* groups took no part in this step on this rank
(their gradient was None); *dense* groups travel uncompressed, as floats.

A received message is not trusted: lengths, counts, group numbers and indices are checked
before use.
"""

import dataclasses
import zlib

import numpy as np

from vgc_chainer.errors import WireError

VERSION = 1
_MAGIC = 0x56474300 | VERSION  # 'VGC' and the version in the low byte

#: Values of :attr:`Status.code`.
OK, NONFINITE, FAILED, BROADCAST = 0, 1, 2, 3


class _Record:
    """A dataclass of integers that travels as a fixed-size int64 array."""

    def pack(self):
        """The record as int64 array."""
        return np.array(dataclasses.astuple(self), np.int64)

    @classmethod
    def nbytes(cls):
        """Bytes of the packed record."""
        return 8 * len(dataclasses.fields(cls))

    @classmethod
    def unpack(cls, array, rank):
        """Record from an int64 array received from `rank`.

        Raises:
            WireError: The record is not one of this version, or is inconsistent in itself.
        """
        record = cls(*(int(x) for x in array))
        record.check(rank)
        return record


@dataclasses.dataclass
class Status(_Record):
    """Can this rank take its part in the step?

    Attributes:
        code: `OK`, `NONFINITE` or `FAILED`; `BROADCAST`: this rank is not about to exchange
            gradients at all, but to broadcast the model.
        detail: Group that a `NONFINITE` is about.
        step: Number of the step, counted from 1.
        agreement: Hash of model layout, algorithm, hyperparameters and versions.
    """

    code: int = OK
    detail: int = -1
    step: int = 0
    agreement: int = 0
    magic: int = _MAGIC

    def check(self, rank):
        if self.magic != _MAGIC:
            raise WireError(
                f'rank {rank} speaks another wire format: mark {self.magic & 0xFFFFFFFF:#x}, '
                f'expected {_MAGIC:#x} (version {VERSION})'
            )


@dataclasses.dataclass
class Header(_Record):
    """How long the payload is.

    Attributes:
        elements: Number of parameters sent, the paper's count.
        table, shards, absent, dense, words, dense_values: Lengths of the sections of the
            payload, in 32-bit words.
        checksum: CRC-32 of the payload plus one, or 0 where none was asked for.
    """

    elements: int = 0
    table: int = 0
    shards: int = 0
    absent: int = 0
    dense: int = 0
    words: int = 0
    dense_values: int = 0
    checksum: int = 0

    @property
    def payload_words(self):
        """Length of the payload in 32-bit words."""
        return sum(getattr(self, section) for section in _SECTIONS)

    def check(self, rank):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 0:
                raise WireError(
                    f'rank {rank} sent a negative {field.name}: {getattr(self, field.name)}'
                )


_SECTIONS = ('table', 'shards', 'absent', 'dense', 'words', 'dense_values')


def _empty_words():
    return np.empty(0, np.uint32)


@dataclasses.dataclass
class Message:
    """Payload of one rank in one step.

    Attributes:
        table: uint32, the compressor's header.
        words: uint32, one an element sent, ascending flat index.
        shard_counts: uint32, number of words of each shard (host).
        absent: uint32 group numbers (host).
        dense: uint32 group numbers that travel uncompressed (host).
        dense_values: uint32 view of their values in the layout's state dtype, group by group.
        dense_elements: How many elements `dense_values` holds.
        packed: The payload, where the sections above are cut out of it already; else None.
    """

    table: object = dataclasses.field(default_factory=_empty_words)
    words: object = dataclasses.field(default_factory=_empty_words)
    shard_counts: object = dataclasses.field(default_factory=_empty_words)
    absent: object = dataclasses.field(default_factory=_empty_words)
    dense: object = dataclasses.field(default_factory=_empty_words)
    dense_values: object = dataclasses.field(default_factory=_empty_words)
    dense_elements: int = 0
    packed: object = dataclasses.field(default=None, repr=False, compare=False)

    def header(self):
        """Header that describes this message, without checksum."""
        return Header(
            elements=int(self.words.size) + self.dense_elements,
            table=int(self.table.size),
            shards=int(self.shard_counts.size),
            absent=int(self.absent.size),
            dense=int(self.dense.size),
            words=int(self.words.size),
            dense_values=int(self.dense_values.size),
        )

    def pack(self, xp):
        """The payload as one contiguous uint32 array on `xp`."""
        if self.packed is not None:
            return self.packed
        parts = (
            self.table,
            self.shard_counts,
            self.absent,
            self.dense,
            self.words,
            self.dense_values,
        )
        return xp.concatenate([xp.asarray(part, dtype=np.uint32) for part in parts])


def require_plausible(header, layout, rank):
    """Check that a payload of these lengths can exist, before memory is set aside for it.

    Raises:
        WireError: A section is longer than the layout allows.
    """
    groups, elements = len(layout), layout.total
    limits = {
        'table': elements + groups,  # a norm a bucket, and a bucket an element
        'shards': elements + 1,
        'absent': groups,
        'dense': groups,
        'words': elements,
        'dense_values': elements * layout.state_dtype.itemsize // 4,
    }
    for section, limit in limits.items():
        length = getattr(header, section)
        if length > limit:
            raise WireError(
                f'rank {rank} announced {length} words of {section.replace("_", " ")}; a model of '
                f'{elements} elements cannot have more than {limit}'
            )


def unpack(payload, header, layout, rank):
    """Cut a received payload into a :class:`Message`.

    Args:
        payload: uint32 array of ``header.payload_words`` entries, NumPy or CuPy.
        header: The sender's header.
        layout: Layout that both sides agreed upon.
        rank: Sender, for error messages.

    Raises:
        WireError: Lengths, group numbers or checksum do not fit.
    """
    if payload.size != header.payload_words:
        raise WireError(
            f'rank {rank} announced {header.payload_words} words and sent {payload.size}'
        )
    if header.checksum and checksum(payload) != header.checksum:
        raise WireError(f'payload of rank {rank} fails its checksum')
    parts, start = [], 0
    for field in _SECTIONS:
        stop = start + getattr(header, field)
        parts.append(payload[start:stop])
        start = stop
    table, shard_counts, absent, dense, words, dense_values = parts
    shard_counts, absent, dense = (_to_host(part) for part in (shard_counts, absent, dense))
    for what, ids in (('absent', absent), ('dense', dense)):
        if ids.size and (int(ids.max()) >= len(layout) or np.any(np.diff(ids.astype(int)) <= 0)):
            raise WireError(f'rank {rank} sent {what} groups that are not ascending group numbers')
    if int(shard_counts.sum(dtype=np.int64)) != words.size:
        raise WireError(f'shard counts of rank {rank} do not add up to its {words.size} words')
    dense_elements = sum(layout.sizes[int(group)] for group in dense)
    if dense_elements * layout.state_dtype.itemsize != dense_values.size * 4:
        raise WireError(f'dense values of rank {rank} do not fit the groups that it names')
    if header.elements != words.size + dense_elements:
        raise WireError(
            f'rank {rank} announced {header.elements} elements and sent '
            f'{words.size + dense_elements}'
        )
    return Message(table, words, shard_counts, absent, dense, dense_values, dense_elements)


def checksum(payload):
    """CRC-32 of a payload plus one, so that 0 can mean "none"."""
    return zlib.crc32(_to_host(payload)) + 1


def _to_host(array):
    return array.get() if hasattr(array, 'get') else np.ascontiguousarray(array)
