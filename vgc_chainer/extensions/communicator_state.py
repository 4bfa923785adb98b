"""Puts into a snapshot what Chainer's serializers do not see."""

import warnings

import chainer
import numpy as np
from chainer import serializer as serializer_module
from chainer.training import extension


class CommunicatorState(extension.Extension):
    """Saves and restores this rank's residuals, step, traffic and random generators.

    Extend the trainer with it and take one snapshot per rank, for instance with
    ``chainermn.create_multi_node_checkpointer``. A snapshot of rank 0 alone would lose the
    other ranks' residuals.

    After a resume the first gradient counts: ChainerMN's optimizer would otherwise broadcast
    instead of updating, and a resumed run would be one step behind an uninterrupted one.

    The state of a GPU generator cannot be read back, so it is seeded anew whenever a snapshot is
    taken, from NumPy's generator; a run that takes snapshots at the same steps repeats exactly.

    Args:
        comm: Communicator, compressed or not.
        optimizer: The multi-node optimizer, set up.

    Raises:
        StateError: On loading: the snapshot is of another model, algorithm or version.
    """

    priority = extension.PRIORITY_READER
    trigger = (1, 'epoch')

    def __init__(self, comm, optimizer):
        self._comm = comm
        self._optimizer = optimizer

    def __call__(self, trainer):
        """Nothing to do during training."""

    def serialize(self, serializer):
        saving = isinstance(serializer, serializer_module.Serializer)
        if saving:
            self._save(serializer)
        else:
            self._load(serializer)

    def _save(self, serializer):
        _save_generators(serializer, self._on_gpu())
        state = self._comm.state() if self._is_compressed() else {}
        serializer('keys', np.array(sorted(state), dtype='U'))
        for key, value in state.items():
            serializer(
                key,
                chainer.backends.cuda.to_cpu(value)
                if hasattr(value, 'dtype')
                else np.array(value),
            )

    def _load(self, serializer):
        state = {}
        for key in serializer('keys', None):
            value = serializer(str(key), None)
            state[str(key)] = value if value.ndim else value.item()
        model = self._optimizer.target
        if self._is_compressed():
            if state:
                self._comm.load_state(model, state)
            else:
                warnings.warn('the snapshot holds no residuals; they start at zero', stacklevel=2)
        if hasattr(self._optimizer, 'is_changed'):
            # Remembers the parameters as seen, so that the next update is an update.
            self._optimizer.is_changed(model)
        _load_generators(serializer, self._on_gpu())

    def _is_compressed(self):
        return hasattr(self._comm, 'load_state')

    def _on_gpu(self):
        return any(
            chainer.backend.get_array_module(param.array) is not np
            for param in self._optimizer.target.params()
            if param.array is not None
        )


def _save_generators(serializer, on_gpu):
    seed = int(np.random.randint(2**31 - 1)) if on_gpu else 0
    if on_gpu:
        chainer.backends.cuda.cupy.random.seed(seed)
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    serializer('generator/keys', keys)
    serializer('generator/rest', np.array([position, has_gauss, gauss], np.float64))
    serializer('generator/gpu_seed', np.array(seed))


def _load_generators(serializer, on_gpu):
    position, has_gauss, gauss = serializer('generator/rest', None)
    keys = serializer('generator/keys', None)
    np.random.set_state(('MT19937', keys, int(position), int(has_gauss), float(gauss)))
    if on_gpu:
        chainer.backends.cuda.cupy.random.seed(int(serializer('generator/gpu_seed', None)))
