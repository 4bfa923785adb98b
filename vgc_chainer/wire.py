"""What one rank sends in one step.

A :class:`Message` is a handful of uint32 arrays; packed they lie one behind the other::

    [table | shard counts | absent groups | dense groups | words | dense values]

`table` is the compressor's own header (group exponents, bucket norms, ...). Words are in
index order, one per element sent. *Absent* groups took no part in this step on this rank
(their gradient was None); *dense* groups travel uncompressed, as floats.

The lengths travel before the payload in a :class:`Header` of fixed size, so that every rank
can size its receive buffer, learn whether all others could take part, and refuse a message
that is not what it claims to be.
"""

import dataclasses
import zlib

import numpy as np

from vgc_chainer.errors import WireError

VERSION = 1
_MAGIC = 0x56474300  # 'VGC' and the version in the low byte

#: int64 fields of the header, in order.
FIELDS = (
    'magic',
    'status',
    'detail',
    'step',
    'layout',
    'elements',
    'table',
    'shards',
    'absent',
    'dense',
    'words',
    'dense_values',
    'checksum',
)
HEADER_BYTES = 8 * len(FIELDS)

#: Values of the field `status`.
OK, NONFINITE, FAILED = 0, 1, 2


@dataclasses.dataclass
class Header:
    """Fixed-size part of a message: :data:`FIELDS` as integers.

    `elements` is the paper's count of parameters sent; `table` to `dense_values` are lengths in
    32-bit words; `detail` is the group that a non-OK `status` is about; `checksum` is the
    CRC-32 of the payload plus one, or 0 where none was asked for.
    """

    status: int = OK
    detail: int = -1
    step: int = 0
    layout: int = 0
    elements: int = 0
    table: int = 0
    shards: int = 0
    absent: int = 0
    dense: int = 0
    words: int = 0
    dense_values: int = 0
    checksum: int = 0
    magic: int = _MAGIC | VERSION

    @property
    def payload_words(self):
        """Length of the payload in 32-bit words."""
        return (
            self.table + self.shards + self.absent + self.dense + self.words + self.dense_values
        )

    def pack(self):
        """The header as int64 array of ``len(FIELDS)``."""
        return np.array([getattr(self, field) for field in FIELDS], np.int64)

    @classmethod
    def unpack(cls, array, rank):
        """Header from an int64 array received from `rank`.

        Raises:
            WireError: Wrong magic or version, or a negative length.
        """
        header = cls(**{field: int(x) for field, x in zip(FIELDS, array)})
        if header.magic != _MAGIC | VERSION:
            raise WireError(
                f'rank {rank} sent a header with mark {header.magic & 0xFFFFFFFF:#x}; '
                f'expected {_MAGIC | VERSION:#x} (wire format version {VERSION})'
            )
        for field in FIELDS[5:12]:
            if getattr(header, field) < 0:
                raise WireError(f'rank {rank} sent a negative length: {field} = '
                                f'{getattr(header, field)}')
        return header


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
    """

    table: object = dataclasses.field(default_factory=_empty_words)
    words: object = dataclasses.field(default_factory=_empty_words)
    shard_counts: object = dataclasses.field(default_factory=_empty_words)
    absent: object = dataclasses.field(default_factory=_empty_words)
    dense: object = dataclasses.field(default_factory=_empty_words)
    dense_values: object = dataclasses.field(default_factory=_empty_words)
    dense_elements: int = 0

    def header(self, **fields):
        """Header that describes this message."""
        return Header(
            elements=int(self.words.size) + self.dense_elements,
            table=int(self.table.size),
            shards=int(self.shard_counts.size),
            absent=int(self.absent.size),
            dense=int(self.dense.size),
            words=int(self.words.size),
            dense_values=int(self.dense_values.size),
            **fields,
        )

    def pack(self, xp):
        """The payload as one contiguous uint32 array on `xp`."""
        parts = (
            self.table,
            self.shard_counts,
            self.absent,
            self.dense,
            self.words,
            self.dense_values,
        )
        return xp.concatenate([xp.asarray(part, dtype=np.uint32) for part in parts])


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
    for field in ('table', 'shards', 'absent', 'dense', 'words', 'dense_values'):
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
        raise WireError(f'rank {rank} announced {header.elements} elements and sent '
                        f'{words.size + dense_elements}')
    return Message(table, words, shard_counts, absent, dense, dense_values, dense_elements)


def checksum(payload):
    """CRC-32 of a payload plus one, so that 0 can mean "none"."""
    return zlib.crc32(_to_host(payload)) + 1


def _to_host(array):
    return array.get() if hasattr(array, 'get') else np.ascontiguousarray(array)
