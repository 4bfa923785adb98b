"""Triggers for trainer extensions."""

from chainer.training import get_trigger


class EndOfTraining:
    """Stop trigger that is true from a number of epochs or iterations on.

    Chainer's ``(n, 'epoch')`` is true at the crossing of every multiple of n only: a run resumed
    behind n would go on to the next multiple.

    Args:
        period (int): When to end.
        unit (str): ``'epoch'`` or ``'iteration'``.
    """

    def __init__(self, period, unit):
        if unit not in ('epoch', 'iteration'):
            raise ValueError(f"unit must be 'epoch' or 'iteration', not {unit!r}")
        self._period = period
        self._unit = unit

    def __call__(self, trainer):
        updater = trainer.updater
        done = updater.epoch_detail if self._unit == 'epoch' else updater.iteration
        return done >= self._period

    def get_training_length(self):
        """(period, unit), which Chainer's progress bar asks for."""
        return self._period, self._unit


class OrAtEnd:
    """Fires when another trigger does, and in the last iteration of the training.

    With it a run whose length is no multiple of the interval still ends with a line in the log, an
    evaluation and a snapshot of its last state.

    Args:
        trigger: Tuple such as ``(1, 'epoch')``, or a trigger.
        end (EndOfTraining): The trainer's stop trigger.
    """

    def __init__(self, trigger, end):
        self._trigger = get_trigger(trigger)
        self._end = end

    def __call__(self, trainer):
        fires = self._trigger(trainer)  # called at every iteration, since it keeps state
        return fires or self._end(trainer)

    def serialize(self, serializer):
        """Saves or loads the state of the other trigger."""
        if hasattr(self._trigger, 'serialize'):
            self._trigger.serialize(serializer)
