"""Many compressed steps: all ranks hold the same bits. Run by ``make soak``.

``VGC_SOAK_STEPS`` sets how many. Rank 0 prints ``HASH compressor hash`` of the last parameters.
"""

import hashlib
import os

import chainer
import chainermn
import numpy as np
import pytest

from tests.mpi.common import (
    SETTINGS,
    Net,
    assert_replicas_identical,
    backward,
    created,
    fingerprint,
    world,
)

STEPS = int(os.environ.get('VGC_SOAK_STEPS', 1000))


@pytest.mark.parametrize(('name', 'options'), SETTINGS)
def test_replicas_are_identical_after_many_steps(name, options):
    comm = created(name, check_replicas=max(STEPS // 4, 1), checksum=True, **options)
    model = Net(seed=world.rank)
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.Adam(0.001), comm).setup(
        model
    )
    for step in range(STEPS + 1):
        backward(model, step)
        optimizer.update()
    assert comm.traffic.steps == STEPS
    assert_replicas_identical(model)
    assert all(np.isfinite(param.array).all() for param in model.params())
    if world.rank == 0:
        print(f'\nHASH {name} {fingerprint(model)}', flush=True)
    comm.hook and comm.hook.detach()


@pytest.mark.parametrize(('name', 'options'), SETTINGS)
def test_ten_thousand_small_arrays(name, options):
    """Dense for those that need second moments: gradients are given by hand."""
    comm = created(name, **options)
    model = chainer.ChainList(*[chainer.links.Bias(shape=(1 + k % 150,)) for k in range(10_000)])
    comm.bcast_data(model)
    if comm.hook is not None:
        comm.hook.moment = lambda param: param.grad**2 / 8
    rng = np.random.default_rng(world.rank)
    for _ in range(2):
        for param in model.params():
            param.grad = rng.standard_normal(param.shape).astype(np.float32)
        comm.multi_node_mean_grad(model)
    mine = b''.join(param.grad.tobytes() for param in model.params())
    assert len(set(world.allgather(hashlib.sha256(mine).digest()))) == 1
    comm.hook and comm.hook.detach()
