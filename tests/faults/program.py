"""A training in which one rank misbehaves: ``mpiexec -n N python -m tests.faults.program FAULT``.

Rank 1 does it in step 3; prints ``STEP n`` on rank 0 as it goes.
"""

import vgc_chainer  # before mpi4py and chainer  # isort: skip

import os
import signal
import sys
import time

import chainer
import chainermn
from mpi4py import MPI

from tests.mpi.common import Net, backward

world = MPI.COMM_WORLD


def misbehave(fault, comm):
    if fault == 'raise':
        raise RuntimeError('the user divided by zero')
    if fault == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == 'exit':
        sys.exit(0)
    if fault == 'stall':
        time.sleep(1000)
    if fault == 'stop':
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == 'wander':  # into another collective than all the others
        comm.allreduce_obj(1)


def main(fault, watchdog):
    chainermn.global_except_hook.add_hook()
    limit = None if watchdog == 'none' else float(watchdog)
    comm = vgc_chainer.create_communicator('variance', alpha=1.0, watchdog=limit)
    model = Net()
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(), comm).setup(model)
    for step in range(6):
        if fault == 'evaluate' and step == 3:
            if world.rank == 1:
                time.sleep(1000)
            comm.allreduce_obj(1)
        if step == 3 and world.rank == 1:
            misbehave(fault, comm)
        backward(model, step)
        optimizer.update()
        if world.rank == 0:
            print(f'STEP {step}', flush=True)
    print(f'DONE {world.rank}', flush=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
