import types

import chainer
import pytest

from vgc_chainer.training import EndOfTraining, OrAtEnd


def trainer(iteration, per_epoch=10):
    detail = iteration / per_epoch
    updater = types.SimpleNamespace(
        iteration=iteration, epoch_detail=detail, previous_epoch_detail=detail - 1 / per_epoch
    )
    return types.SimpleNamespace(updater=updater)


@pytest.mark.parametrize(('unit', 'last'), [('iteration', 3), ('epoch', 30)])
def test_end_is_the_end_from_whatever_side_one_comes(unit, last):
    end = EndOfTraining(3, unit)
    assert [i for i in range(40) if end(trainer(i))] == list(range(last, 40))
    assert EndOfTraining(3, unit)(trainer(last + 5))
    assert end.get_training_length() == (3, unit)


def test_end_refuses_unknown_units():
    with pytest.raises(ValueError, match='hours'):
        EndOfTraining(3, 'hours')


def test_or_at_end_fires_at_the_interval_and_in_the_last_iteration():
    trigger = OrAtEnd((1, 'epoch'), EndOfTraining(25, 'iteration'))
    assert [i for i in range(1, 26) if trigger(trainer(i))] == [10, 20, 25]
    trigger = OrAtEnd((1, 'epoch'), EndOfTraining(2, 'epoch'))
    assert [i for i in range(1, 21) if trigger(trainer(i))] == [10, 20]


def test_or_at_end_keeps_the_state_of_its_trigger(tmp_path):
    end = EndOfTraining(100, 'iteration')
    first, second = OrAtEnd((4, 'iteration'), end), OrAtEnd((4, 'iteration'), end)
    for i in range(1, 4):
        first(trainer(i))
    chainer.serializers.save_npz(str(tmp_path / 'state'), first)
    chainer.serializers.load_npz(str(tmp_path / 'state'), second)
    assert second(trainer(4)) and first(trainer(4))
