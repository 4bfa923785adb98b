"""Validation in which every sample counts once, however batches and shards divide the set."""

import chainer
from chainer import reporter
from chainer.dataset import convert
from chainer.training import extensions

from vgc_chainer.training.collective import allgather_obj


class ExactEvaluator(extensions.Evaluator):
    """Evaluator for ``chainermn.create_multi_node_evaluator`` that takes the mean over samples.

    Chainer's evaluator takes the mean of the batch means and ChainerMN's the mean of the ranks'
    means, so that samples of a short last batch or of a small shard count more than others. Here
    each rank returns its sum over samples times (ranks / samples of all ranks); ChainerMN's mean
    over ranks then is the sum over all samples divided by their number.

    The shards must not overlap: ``scatter_dataset(..., force_equal_length=False)``. A rank may
    have none.

    Args:
        iterator: Iterator over this rank's shard, with ``repeat=False``.
        target (chainer.Link): What is called with a batch; it reports means over the batch.
        comm: ChainerMN communicator.
        device: Where batches are sent; see ``chainer.get_device``.
    """

    def __init__(self, iterator, target, comm, device=None):
        super().__init__(iterator, target, device=device)
        n_samples = comm.allreduce_obj(len(iterator.dataset))
        self._weight = comm.size / n_samples
        self._comm = comm

    def evaluate(self):
        """Evaluates the shard.

        Returns:
            dict: Name of each reported value to this rank's term of the mean.
        """
        iterator = self.get_iterator('main')
        iterator.reset()
        target = self.eval_func or self.get_target('main')
        sums = {}
        for batch in iterator if len(iterator.dataset) else ():  # SerialIterator divides by it
            observation = {}
            inputs = convert._call_converter(self.converter, batch, self.device)
            with reporter.report_scope(observation), chainer.no_backprop_mode():
                target(*inputs) if isinstance(inputs, tuple) else target(inputs)
            for name, value in observation.items():
                mean = float(getattr(value, 'array', value))
                sums[name] = sums.get(name, 0.0) + mean * len(batch)
        # A rank without samples reports nothing, but must take part in the mean of every name.
        names = sorted(set().union(*allgather_obj(self._comm, list(sums))))
        return {name: sums.get(name, 0.0) * self._weight for name in names}
