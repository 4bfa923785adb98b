"""Every kind of layer that has a rule, in small settings, and the loop over samples beside it."""

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np

from vgc_chainer.second_moment import SecondMomentHook

N = 5


class Setting:
    """A layer and its input.

    Args:
        link: Called without arguments; makes the link.
        shape: Shape of one sample.
        ids: Integers below this bound as input, instead of real numbers.
        call: How the link is applied: ``call(link, x)``.
    """

    def __init__(self, link, shape, ids=None, call=None):
        self.link, self.shape, self.ids = link, shape, ids
        self.call = call or (lambda link, x: link(x))

    def make(self, dtype, n=N, seed=0):
        """``(link, x, weights)``; the loss is the mean over samples of sum(weights * y)."""
        rng = np.random.default_rng(seed)
        np.random.seed(seed)
        with chainer.using_config('dtype', dtype):
            link = self.link()
            if self.ids:
                x = rng.integers(0, self.ids, (n, *self.shape)).astype(np.int32)
            else:
                x = rng.standard_normal((n, *self.shape)).astype(dtype)
            with chainer.using_config('train', False):
                y = self.call(link, x[:1])  # initialises lazy parameters
        for param in link.params():
            param.array[...] = rng.standard_normal(param.shape)
        weights = rng.standard_normal((n, *y.shape[1:])).astype(dtype)
        return link, x, weights

    def loss(self, link, x, weights, samples):
        return F.sum(self.call(link, x) * weights) / samples


def params(function, **shapes):
    """A link with plain parameters of these shapes, applied by ``function(link, x)``."""

    class Plain(chainer.Link):
        def __init__(self):
            super().__init__()
            with self.init_scope():
                for name, shape in shapes.items():
                    setattr(self, name, chainer.Parameter(np.ones(shape, chainer.get_dtype())))

        def forward(self, x):
            return function(self, x)

    return Plain


def over_time(link, x):
    """A recurrent layer over the second axis; last state."""
    link.reset_state()
    for step in range(x.shape[1]):
        y = link(x[:, step])
    return y


def rows_of_samples(link, x):
    """(b, t, d) -> (b * t, d) by hand, through a nonlinearity, and back."""
    h = F.relu(F.reshape(chainer.as_variable(x), (-1, x.shape[2])))
    return F.reshape(link(h), (len(x), -1))


def twice(link, x):
    return link(F.tanh(link(x)))


def frames(link, x):
    """(b, t, ...) -> (b * t, ...) and back: a sample is a film."""
    h = link(F.reshape(chainer.as_variable(x), (-1, *x.shape[2:])))
    return F.reshape(h, (len(x), -1))


def lstm_steps(link, x):
    c = h = None
    for step in range(x.shape[1]):
        c, h = link(c, h, x[:, step])
    return h


def gru_steps(link, x):
    h = chainer.Variable(np.zeros_like(x[:, 0, :1], shape=(len(x), 4)))
    for step in range(x.shape[1]):
        h = link(h, x[:, step])
    return h


class Tagger(chainer.Chain):
    """A recurrent layer with an output at every step."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.rnn = L.StatelessLSTM(3, 4)
            self.out = L.Linear(4, 2)

    def states(self, x):
        c = h = None
        states = []
        for step in range(x.shape[1]):
            c, h = self.rnn(c, h, x[:, step])
            states.append(h)
        return states


def tags_stacked_along_time(link, x):
    return link.out(F.stack(link.states(x), axis=1), n_batch_axes=2)


def tags_one_by_one(link, x):
    return F.stack([link.out(h) for h in link.states(x)], axis=1)


def steps_of_a_transposed_batch(link, x):
    h = F.transpose(chainer.as_variable(x), (1, 0, 2))
    return F.concat([link(h[step]) for step in range(len(h))], axis=1)


class Attention(chainer.Chain):
    """Two heads."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.query, self.out = L.Linear(4, 4), L.Linear(4, 4)
            self.key = L.Linear(4, 4, nobias=True)  # softmax does not see a shift

    def weigh(self, query, key):
        return F.matmul(F.softmax(F.matmul(query, key, transb=True), axis=-1), query)


def heads_along_axis_0(link, x):
    """Heads one batch after the other, as in Chainer's own examples."""

    def split(h):
        return F.concat(F.split_axis(h, 2, axis=2), axis=0)

    h = link.weigh(split(link.query(x, n_batch_axes=2)), split(link.key(x, n_batch_axes=2)))
    return link.out(F.concat(F.split_axis(h, 2, axis=0), axis=2), n_batch_axes=2)


def heads_by_transposing(link, x):
    b, t, d = x.shape

    def split(h):
        return F.transpose(F.reshape(h, (b, t, 2, 2)), (0, 2, 1, 3))

    h = link.weigh(split(link.query(x, n_batch_axes=2)), split(link.key(x, n_batch_axes=2)))
    h = link.out(F.reshape(F.transpose(h, (0, 2, 1, 3)), (b * t, d)))
    return F.reshape(h, (b, t, d))


def every_pixel(link, x):
    h = F.transpose(chainer.as_variable(x), (0, 2, 3, 1))
    return F.reshape(link(F.reshape(h, (-1, x.shape[1]))), (len(x), -1))


class Critic(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(1, 3, 3, pad=1)
            self.hidden = L.Linear(48, 6)
            self.out = L.Linear(6, 1)

    def forward(self, x):
        return self.out(F.sin(self.hidden(F.sin(self.conv(x)))))


def gradient_penalty(link, x):
    """Double backpropagation: the weights are used once more, in the gradient."""
    x = chainer.Variable(x)
    y = link(x)
    (gx,) = chainer.grad([y], [x], enable_double_backprop=True)
    return y + F.expand_dims((F.sqrt(F.sum(gx * gx, axis=(1, 2, 3))) - 1) ** 2, 1)


SETTINGS = {
    'linear': Setting(lambda: L.Linear(4, 3), (4,)),
    'linear of images': Setting(lambda: L.Linear(None, 3), (2, 3, 2)),
    'linear without bias': Setting(lambda: L.Linear(4, 3, nobias=True), (4,)),
    'linear over two axes': Setting(
        lambda: L.Linear(4, 3), (6, 4), call=lambda link, x: link(x, n_batch_axes=2)
    ),
    'linear over three axes': Setting(
        lambda: L.Linear(4, 3), (2, 3, 4), call=lambda link, x: link(x, n_batch_axes=3)
    ),
    'linear on reshaped rows': Setting(lambda: L.Linear(4, 3), (6, 4), call=rows_of_samples),
    'linear twice': Setting(lambda: L.Linear(4, 4), (4,), call=twice),
    'convolution': Setting(lambda: L.Convolution2D(3, 4, 3), (3, 7, 6)),
    'convolution, stride and pad': Setting(
        lambda: L.Convolution2D(3, 4, (3, 2), stride=(2, 3), pad=(1, 2)), (3, 7, 6)
    ),
    'convolution, dilated': Setting(lambda: L.Convolution2D(2, 3, 3, dilate=2, pad=1), (2, 7, 8)),
    'dilated convolution': Setting(lambda: L.DilatedConvolution2D(2, 3, 3, dilate=2), (2, 7, 8)),
    'convolution, grouped': Setting(lambda: L.Convolution2D(4, 6, 3, pad=1, groups=2), (4, 5, 5)),
    'convolution 1x1': Setting(lambda: L.Convolution2D(3, 4, 1, nobias=True), (3, 4, 5)),
    'convolution, one position': Setting(lambda: L.Convolution2D(3, 4, 3), (3, 3, 3)),
    'convolution, cover all': Setting(
        lambda: params(
            lambda link, x: F.convolution_2d(x, link.W, link.b, stride=2, cover_all=True),
            W=(4, 3, 3, 3),
            b=(4,),
        )(),
        (3, 6, 6),
    ),
    'convolution twice': Setting(lambda: L.Convolution2D(3, 3, 3, pad=1), (3, 4, 4), call=twice),
    'convolution 1d': Setting(lambda: L.Convolution1D(3, 4, 3, stride=2, pad=1), (3, 9)),
    'convolution 3d': Setting(
        lambda: L.Convolution3D(2, 4, 2, stride=2, pad=1, groups=2), (2, 3, 4, 4)
    ),
    'deconvolution': Setting(lambda: L.Deconvolution2D(3, 4, 3, stride=2, pad=1), (3, 4, 3)),
    'deconvolution, grouped': Setting(
        lambda: L.Deconvolution2D(4, 6, 3, groups=2, dilate=2), (4, 3, 3)
    ),
    'deconvolution, outsize': Setting(
        lambda: L.Deconvolution2D(3, 2, 3, stride=2, outsize=(8, 8)), (3, 3, 3)
    ),
    'deconvolution 1d': Setting(lambda: L.Deconvolution1D(3, 4, 3, stride=2), (3, 4)),
    'deconvolution 3d': Setting(lambda: L.Deconvolution3D(2, 3, 2, stride=2), (2, 2, 3, 2)),
    'depthwise convolution': Setting(lambda: L.DepthwiseConvolution2D(3, 2, 3, pad=1), (3, 5, 5)),
    'group normalization': Setting(lambda: L.GroupNormalization(2, 4), (4, 3, 3)),
    'layer normalization': Setting(lambda: L.LayerNormalization(6), (6,)),
    'embedding': Setting(lambda: L.EmbedID(7, 3), (), ids=7),
    'embedding, repeated ids': Setting(lambda: L.EmbedID(4, 3), (6,), ids=4),
    'embedding, ignored ids': Setting(lambda: L.EmbedID(4, 3, ignore_label=0), (2, 3), ids=4),
    'bias': Setting(lambda: L.Bias(1, (3,)), (3, 4)),
    'bias over all axes': Setting(lambda: L.Bias(1, (3, 4)), (3, 4)),
    'scale': Setting(lambda: L.Scale(1, (3,), bias_term=True), (3, 4, 2)),
    'scale of the last axis': Setting(lambda: L.Scale(2, (4,)), (3, 4)),
    'x + p': Setting(params(lambda link, x: x + link.p, p=(4,)), (3, 4)),
    'p + x': Setting(params(lambda link, x: link.p + x, p=(3, 1)), (3, 4)),
    'x - p': Setting(params(lambda link, x: x - link.p, p=(4,)), (3, 4)),
    'p - x': Setting(params(lambda link, x: link.p - x, p=(1, 4)), (3, 4)),
    'x * p': Setting(params(lambda link, x: x * link.p, p=(1, 3, 1)), (3, 4)),
    'p added and subtracted': Setting(
        params(lambda link, x: (x + link.p) * x - link.p, p=(4,)), (3, 4)
    ),
    'sum of three': Setting(
        params(lambda link, x: F.add(chainer.as_variable(x), link.p, link.q), p=(4,), q=(3, 1)),
        (3, 4),
    ),
    'lstm': Setting(lambda: L.LSTM(3, 4), (5, 3), call=over_time),
    'stateful gru': Setting(lambda: L.StatefulGRU(3, 4), (4, 3), call=over_time),
    'mlp convolution': Setting(lambda: L.MLPConvolution2D(3, (4, 2), 3), (3, 5, 5)),
    'inception': Setting(lambda: L.Inception(3, 2, 2, 3, 2, 2, 2), (3, 6, 6)),
    'highway': Setting(lambda: L.Highway(4), (4,)),
    'stateless lstm': Setting(lambda: L.StatelessLSTM(3, 4), (5, 3), call=lstm_steps),
    'stateless gru': Setting(lambda: L.StatelessGRU(3, 4), (4, 3), call=gru_steps),
    'outputs of every step': Setting(Tagger, (4, 3), call=tags_stacked_along_time),
    'outputs step by step': Setting(Tagger, (4, 3), call=tags_one_by_one),
    'steps of a transposed batch': Setting(
        lambda: L.Linear(3, 2), (4, 3), call=steps_of_a_transposed_batch
    ),
    'heads along axis 0': Setting(Attention, (3, 4), call=heads_along_axis_0),
    'heads by transposing': Setting(Attention, (3, 4), call=heads_by_transposing),
    'linear on every pixel': Setting(lambda: L.Linear(3, 2), (3, 4, 4), call=every_pixel),
    'convolution of frames': Setting(
        lambda: L.Convolution2D(2, 4, 3, groups=2), (4, 2, 5, 5), call=frames
    ),
    'deconvolution of frames': Setting(
        lambda: L.Deconvolution2D(2, 3, 2), (4, 2, 3, 3), call=frames
    ),
    'group normalization of frames': Setting(
        lambda: L.GroupNormalization(2, 4), (3, 4, 3, 3), call=frames
    ),
    'layer normalization of rows': Setting(lambda: L.LayerNormalization(4), (3, 4), call=frames),
    'scale of frames': Setting(lambda: L.Scale(1, (4,), bias_term=True), (3, 4, 2), call=frames),
    'embedding of rows': Setting(
        lambda: chainer.Sequential(
            L.EmbedID(7, 3),
            lambda h: F.reshape(h, (-1, 3)),
            L.Linear(3, 2),
            lambda h: F.reshape(h, (-1, 4, 2)),
        ),
        (4,),
        ids=7,
    ),  # fmt: skip
    'gradient penalty': Setting(Critic, (1, 4, 4), call=gradient_penalty),
    'prelu': Setting(lambda: L.PReLU((3,)), (3, 4)),
    'prelu with one slope': Setting(lambda: L.PReLU(()), (3, 4)),
    'peephole lstm': Setting(lambda: L.StatefulPeepholeLSTM(3, 4), (4, 3), call=over_time),
    'a scalar twice': Setting(
        params(
            lambda link, x: x * F.broadcast_to(link.p, x.shape) + F.broadcast_to(link.p, x.shape),
            p=(),
        ),
        (3, 4),
    ),
    'transposed weight': Setting(
        params(lambda link, x: F.linear(x, F.transpose(link.W)), W=(3, 2)), (3,)
    ),
    'forget': Setting(
        lambda: L.Linear(4, 3),
        (4,),
        call=lambda link, x: F.forget(lambda x: F.sin(link(x)), chainer.Variable(x)),
    ),
    'maxout': Setting(lambda: L.Maxout(4, 3, 2), (4,)),
}


def observed(link, run, **options):
    """Second moments by name after ``run()``, which calls backward; and the hook."""
    hook = SecondMomentHook(**options)
    hook.observe(link)
    link.cleargrads()
    with hook:
        run()
    return {name: hook.moment(param) for name, param in link.namedparams()}, hook


def by_loop(setting, link, x, weights):
    """Sum over samples of squared gradients, each from a backward pass of its own; and the sum."""
    squares = {name: 0 for name, _ in link.namedparams()}
    total = dict(squares)
    for z in range(len(x)):
        link.cleargrads()
        setting.loss(link, x[z : z + 1], weights[z : z + 1], len(x)).backward()
        for name, param in link.namedparams():
            g = 0 if param.grad is None else param.grad.astype(np.float64)
            squares[name] = squares[name] + np.square(g)
            total[name] = total[name] + g
    return squares, total


def assert_close(actual, expected, rtol, what=''):
    """Relative to the largest element: single elements may cancel."""
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(actual, np.float64) - expected).max() <= rtol * scale, what
