"""Errors of vgc-chainer. Every one names the parameter, rank, option or message it is about."""


class VgcError(Exception):
    """Base of all errors that vgc-chainer raises on its own account."""


class LayoutError(VgcError, ValueError):
    """The parameters of the model cannot be laid out, or do not fit what was laid out."""


class MismatchError(VgcError, RuntimeError):
    """Ranks disagree about model, algorithm, hyperparameters or versions."""


class NonFiniteError(VgcError, FloatingPointError):
    """A gradient or second moment holds NaN or Inf."""


class RankFailedError(VgcError, RuntimeError):
    """Another rank could not take its part in a step; its message is repeated here."""


class WireError(VgcError, ValueError):
    """A received message is not what its header says; nothing of it was used."""


class StateError(VgcError, ValueError):
    """A saved state does not belong to this model, algorithm or set of hyperparameters."""


class TransportError(VgcError, RuntimeError):
    """The transport that was asked for cannot work on these ranks."""
