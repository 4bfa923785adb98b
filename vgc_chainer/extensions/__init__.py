"""Trainer extensions."""

from vgc_chainer.extensions.communicator_state import CommunicatorState
from vgc_chainer.extensions.compression_report import CompressionReport

__all__ = ['CommunicatorState', 'CompressionReport']
