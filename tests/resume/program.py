"""A Trainer run that can be resumed: ``mpiexec -n N python -m tests.resume.program JSON``.

JSON is an object: list `kinds` of ways to take snapshots, folder `out`, `stop` (iteration),
optionally `resume`, `crash` (iteration in which rank 0 dies), `endless`, `interval`, `comm` and
`shuffle`. Each rank prints
``STATE rank hash`` of everything that decides how the training would go on.
"""

import vgc_chainer  # before mpi4py and chainer  # isort: skip

import hashlib
import json
import os
import sys
import time
import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from chainer.training import extensions
from mpi4py import MPI

from vgc_chainer.extensions import CommunicatorState, CompressionReport
from vgc_chainer.training import EndOfTraining, Snapshots, leave_on_usage_error

world = MPI.COMM_WORLD


class Net(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.fc1 = L.Linear(12, 16)
            self.bn = L.BatchNormalization(16)
            self.fc2 = L.Linear(16, 3)

    def forward(self, x):
        return self.fc2(F.dropout(F.relu(self.bn(self.fc1(x))), 0.4))


def data():
    rng = np.random.default_rng(7)
    x = rng.standard_normal((120, 12)).astype(np.float32)
    return chainer.datasets.TupleDataset(x, rng.integers(0, 3, 120).astype(np.int32))


def state_hash(trainer, comm, reported):
    """Hash of all that a snapshot holds but times, and of the residuals in memory."""
    box = chainer.serializers.DictionarySerializer()
    trainer.serialize(box)
    for key, value in comm.state().items() if hasattr(comm, 'state') else ():
        box.target[f'comm/{key}'] = value
    digest = hashlib.sha256(repr(reported).encode())
    for key in sorted(box.target):
        if not any(word in key for word in ('elapsed_time', 'Log', 'Snapshot', 'Checkpointer')):
            digest.update(key.encode() + np.ascontiguousarray(box.target[key]).tobytes())
    params = sorted(trainer.updater.get_optimizer('main').target.namedparams())
    parameters = hashlib.sha256(b''.join(param.array.tobytes() for _, param in params))
    return digest.hexdigest()[:16], parameters.hexdigest()[:16]


def main(
    kinds,
    out,
    stop,
    resume=False,
    crash=None,
    endless=False,
    interval=5,
    comm='variance',
    shuffle=True,
):
    chainermn.global_except_hook.add_hook()
    comm = vgc_chainer.create_communicator(comm, watchdog=20.0)
    np.random.seed(world.rank + 1000 * resume)  # a resumed run must not depend on it
    model = L.Classifier(Net())
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(0.01), comm).setup(
        model
    )
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-4))
    shard = chainermn.scatter_dataset(
        data() if world.rank == 0 else None, comm, shuffle=True, seed=3
    )
    iterator = chainer.iterators.SerialIterator(shard, 8, shuffle=shuffle)
    updater = chainer.training.StandardUpdater(iterator, optimizer)
    trainer = chainer.training.Trainer(updater, EndOfTraining(stop, 'iteration'), out=out)
    trainer.extend(CommunicatorState(comm, optimizer))
    trainer.extend(CompressionReport(comm), trigger=(4, 'iteration'))
    reported = {}
    trainer.extend(
        lambda t: reported.update({t.updater.iteration: t.observation.get('elements_sent')}),
        name='record',
        trigger=(8, 'iteration'),
        priority=-1,
    )
    if crash is not None:
        trainer.extend(
            lambda t: t.updater.iteration == crash and world.rank == 0 and os._exit(3),
            name='crash',
            trigger=(1, 'iteration'),
            priority=-5000,
        )
    if endless:
        trainer.extend(lambda t: time.sleep(0.05), name='slow', trigger=(1, 'iteration'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for kind in kinds:
            take_snapshots(kind, trainer, comm, interval, resume, optimizer)
    if world.rank == 0:
        print('START', trainer.updater.iteration, flush=True)
    trainer.run()
    print('STATE', world.rank, *state_hash(trainer, comm, reported), flush=True)


def take_snapshots(kind, trainer, comm, interval, resume, optimizer):
    trigger = (interval, 'iteration')
    if kind == 'checkpointer':
        saver = chainermn.create_multi_node_checkpointer('run', comm)
        trainer.extend(saver, name='Checkpointer', trigger=trigger)
        if resume:
            saver.maybe_load(trainer, optimizer)
    elif kind == 'multi_node_snapshot':
        snapshot = extensions.snapshot(filename='iter_{.updater.iteration}', autoload=resume)
        sets = [[rank] for rank in range(comm.size)]
        trainer.extend(
            chainermn.extensions.multi_node_snapshot(comm, snapshot, sets),
            name='MultiNodeSnapshot',
            trigger=trigger,
        )
    elif kind == 'snapshot':
        name = f'rank_{comm.rank}_iter_{{.updater.iteration}}'
        saver = extensions.snapshot(filename=name, autoload=resume)
        trainer.extend(saver, name='Snapshot', trigger=trigger)
    elif kind == 'Snapshots':
        saver = Snapshots(comm, trainer.out)
        trainer.extend(saver, trigger=trigger)
        if resume:
            saver.resume(trainer)


if __name__ == '__main__':
    with leave_on_usage_error(world):
        main(**json.loads(sys.argv[1]))
