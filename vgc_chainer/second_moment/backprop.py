"""Tells second-moment hooks where a backward pass begins and ends.

A function hook sees the functions of a pass one by one and cannot tell two passes apart: gradients
that were cleared in between and gradients that are being accumulated look the same. All of
``Variable.backward`` and ``chainer.backward`` runs through one function of Chainer, which is
wrapped while a hook is attached (Chainer is frozen at 7.8.1). ``chainer.grad`` does not run
through it, and leaves ``param.grad`` alone, too.
"""

import threading

import chainer
from chainer import _backprop

_lock = threading.Lock()
_attached = 0
_original = None


def install():
    """Wrap; may be called once for every hook."""
    global _attached, _original
    with _lock:
        _attached += 1
        if _attached == 1:
            _original = _backprop._backprop_to_all
            _backprop._backprop_to_all = _observed_backprop


def uninstall():
    """Undo one :func:`install`; the last one restores Chainer's own function."""
    global _attached
    with _lock:
        _attached -= 1
        if _attached == 0:
            _backprop._backprop_to_all = _original


def _observed_backprop(outputs, retain_grad, loss_scale):
    # Function hooks are kept a thread: a backward pass in another thread is not observed.
    hooks = [h for h in chainer.get_function_hooks().values() if hasattr(h, 'begin_pass')]
    begun = []
    try:
        for hook in hooks:
            hook.begin_pass([y for y, _ in outputs])
            begun.append(hook)
        _original(outputs, retain_grad, loss_scale)
    except BaseException:
        for hook in begun:
            hook.abort_pass()
        raise
    for hook in begun:
        hook.end_pass()
