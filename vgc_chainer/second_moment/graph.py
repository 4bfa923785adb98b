"""Reads the graph of a backward pass before it runs: who uses which parameter how.

A parameter reaches a function directly or through *transparent* functions that only rearrange,
cast or broadcast it (``L.Scale``, mixed precision, depthwise convolution). A rule may be applied
only where the other inputs depend on data: in ``W * scale`` axis 0 counts no samples.

What a sample is: axis 0 of the arrays that enter the graph. :class:`Samples` follows them:

- a reshape that folds further axes into axis 0, (b, t, d) -> (b * t, d), leaves b samples of t
  rows each, and functions that keep the length of axis 0 keep that, too;
- where axis 0 is transposed away, or where results of the same samples are concatenated or
  stacked along axis 0 (the steps of a recurrent layer, the heads of an attention), it no longer
  counts samples until an axis of their number is in front again. Parameters used in between are
  refused;
- a concatenation of independent batches counts all of their samples; a slice, those in it.

What depends on data and then serves as a weight (an entry of ``W`` in ``F.linear(x, W)`` that is
itself a result), or is broadcast along axis 0 (a table of positions that is added to every
sample), belongs to all samples: parameters in it are refused, too.
"""

import dataclasses
import itertools

import chainer
import numpy as np
from chainer.functions.array.broadcast import BroadcastTo
from chainer.functions.array.cast import Cast
from chainer.functions.array.concat import Concat
from chainer.functions.array.expand_dims import ExpandDims
from chainer.functions.array.moveaxis import Moveaxis
from chainer.functions.array.reshape import Reshape
from chainer.functions.array.rollaxis import Rollaxis
from chainer.functions.array.squeeze import Squeeze
from chainer.functions.array.stack import Stack
from chainer.functions.array.swapaxes import Swapaxes
from chainer.functions.array.transpose import Transpose
from chainer.functions.connection.convolution_2d import Convolution2DFunction
from chainer.functions.connection.convolution_nd import ConvolutionND
from chainer.functions.connection.deconvolution_2d import Deconvolution2DFunction
from chainer.functions.connection.deconvolution_nd import DeconvolutionND
from chainer.functions.connection.embed_id import EmbedIDFunction
from chainer.functions.connection.linear import LinearFunction, LinearGradData
from chainer.functions.math.basic_math import Add, Div, Mul, MultiAdd, Sub

from vgc_chainer.second_moment.registry import find_rule

_RESHAPES = (Reshape, ExpandDims, Squeeze)
_TRANSPARENT = (Cast, Transpose, BroadcastTo, *_RESHAPES)
_REARRANGE = {
    Transpose: lambda f, x: np.transpose(x, f.axes),
    Swapaxes: lambda f, x: np.swapaxes(x, f.axis1, f.axis2),
    Moveaxis: lambda f, x: np.moveaxis(x, f.source, f.destination),
    Rollaxis: lambda f, x: np.rollaxis(x, f.axis, f.start),
}
_BROADCASTING = (BroadcastTo, Add, MultiAdd, Sub, Mul, Div)
_WEIGHTS = {  # inputs that all samples share
    LinearFunction: (1, 2),
    LinearGradData: (0,),
    Convolution2DFunction: (1, 2),
    ConvolutionND: (1, 2),
    Deconvolution2DFunction: (1, 2),
    DeconvolutionND: (1, 2),
    EmbedIDFunction: (1,),
}


@dataclasses.dataclass(frozen=True)
class Samples:
    """Where the samples of a variable are.

    Attributes:
        n: Their number.
        axis: 0, if they follow each other along axis 0, each with as many rows; another axis, if
            they were transposed there; None, if that is not known.
    """

    n: int
    axis: object = 0


@dataclasses.dataclass
class Use:
    """One input of one function that is a parameter.

    Attributes:
        function: The function node.
        index: Which of its inputs.
        param: The parameter behind it.
        shape: Shape in which the parameter enters the function, before any broadcasting.
        n_samples: Number of samples in this use.
        rule: The registered rule, or None.
        why: Why there is no rule.
        in_data, out_grad: While the rule runs, arrays: the function's inputs and output gradients.
    """

    function: object
    index: int
    param: object
    shape: tuple
    n_samples: int
    rule: object
    path: list
    why: str = ''
    in_data: tuple = None
    out_grad: tuple = None

    def term(self, in_data, out_grad):
        """The term of this use, in the shape of the parameter."""
        self.in_data = in_data
        self.out_grad = out_grad
        try:
            term = self.rule.form(self)
        finally:
            self.in_data = self.out_grad = None
        if term.n_samples > self.n_samples and term.n_samples % self.n_samples == 0:
            term = term.folded(self.n_samples)  # formed row by row
        for function in self.path:  # from the function back to the parameter
            if isinstance(function, _RESHAPES):
                term = term.reshaped(function.inputs[0].shape)
            elif isinstance(function, Transpose):
                axes = function.axes
                term = term.transposed(
                    tuple(reversed(range(len(term.shape))))
                    if axes is None
                    else [axis % len(term.shape) for axis in axes]
                )
        return term


def read_graph(outputs, observed):
    """All uses of observed parameters below the roots of a backward pass.

    Args:
        outputs: Variable nodes from which the pass starts.
        observed: Parameters by ``id`` of their variable node.

    Returns:
        List of :class:`Use`. A use without rule has ``rule=None``.
    """
    functions = _functions_below(outputs)
    unfolded = _unfolded_samples(functions)
    known = {}
    for function in functions:
        known[function] = []
        for x in function.inputs:
            samples = _samples_of(x, observed, known)
            if samples is not None:
                known[function].append((x, samples))
        if function in unfolded and known[function]:
            x, samples = known[function][0]
            known[function][0] = x, Samples(min(samples.n, unfolded[function]))
    shared = _functions_before_weights(functions) | _functions_before_broadcasts(known)
    uses = []
    for function in functions:
        if type(function) in _TRANSPARENT:
            continue
        for index, x in enumerate(function.inputs):
            if x.requires_grad:
                found = _parameter_behind(x, observed)
                if found is not None:
                    data = [] if function in shared else known[function]
                    uses.append(_use(function, index, *found, data))
    return uses


def _use(function, index, param, path, data):
    rule, samples, why = find_rule(function), Samples(0), ''
    if not data:
        rule, why = None, 'whose other inputs do not depend on data, sample by sample,'
    elif rule is None:
        why = 'which has no rule for second moments'
    else:
        samples = data[0][1]
        y = next((y for y in (ref() for ref in function.outputs) if y is not None), None)
        if rule.broadcasts and y is not None:
            samples = _samples_of_output(function, data, y.shape)
        if samples.axis != 0:
            rule, why = None, 'where axis 0 of the data does not count samples,'
    shape = function.inputs[index].shape
    broadcasts = [position for position, f in enumerate(path) if isinstance(f, BroadcastTo)]
    if broadcasts:
        shape = path[broadcasts[0]].inputs[0].shape
        # The rule sums over what was broadcast right before the function, casts apart.
        right_before = all(isinstance(f, Cast) for f in path[: broadcasts[0]])
        if len(broadcasts) > 1 or not right_before or not (rule and rule.broadcasts):
            rule = None
    if rule is not None and rule.applies is not None and not rule.applies(function, index, shape):
        rule = None
    if rule is None and not why:
        why = 'whose rule for second moments does not cover this use'
    return Use(function, index, param, shape, samples.n, rule, path, why)


def _parameter_behind(x, observed):
    path = []
    while x.creator_node is not None:
        if type(x.creator_node) not in _TRANSPARENT:
            return None
        path.append(x.creator_node)
        x = x.creator_node.inputs[0]
    param = observed.get(id(x))
    return None if param is None else (param, path)


def _samples_of(x, observed, known):
    """:class:`Samples` of a variable; None if it depends on parameters alone."""
    if x.creator_node is not None:
        return _samples_of_output(x.creator_node, known[x.creator_node], x.shape)
    if id(x) in observed or isinstance(x.get_variable_or_none(), chainer.Parameter):
        return None
    return Samples(x.shape[0] if x.shape else 1)


def _samples_of_output(function, known, shape):
    """Samples of an output of this shape.

    Args:
        known: ``(input, Samples)`` of the inputs that depend on data.
    """
    if not known:
        return None
    if not shape:
        return Samples(1)
    rows = shape[0]
    away = [(x, s) for x, s in known if s.axis != 0]
    if type(function) in _REARRANGE:
        x, s = known[0]
        return _rearranged(function, x, s)
    if away:
        x, s = away[0]
        if rows == s.n and (s.axis is None or len(shape) < len(x.shape)):
            return Samples(rows)
        return s if len(shape) == len(x.shape) else _nowhere(s.n)
    if type(function) in _RESHAPES:
        n = known[0][1].n
        if n and rows % n == 0:
            return Samples(n)
        return Samples(n, 1) if shape[:2] == (1, n) else _nowhere(n)
    if type(function) is Concat and function.axis % len(shape) == 0 and len(known) > 1:
        return _concatenated(known)
    if type(function) is Stack and function.axis % len(shape) == 0:
        x, s = known[0]
        if not _same_origin(known):
            return Samples(rows)
        return Samples(s.n, 1) if x.shape[:1] == (s.n,) else _nowhere(s.n)
    kept = [s.n for x, s in known if x.shape and x.shape[0] == rows and s.n]
    if kept:
        return Samples(min(kept))
    x, s = known[0]
    if x.shape and (len(shape) < len(x.shape) or x.shape[0] != s.n):
        return _nowhere(s.n)  # single rows of samples, or sums over samples
    return Samples(rows)


def _nowhere(n):
    return Samples(n, 0 if n == 1 else None)


def _rearranged(function, x, samples):
    if samples.axis is None:
        axis = None
    else:
        numbered = np.empty(range(1, len(x.shape) + 1), bool)  # axis i has length i + 1
        axis = _REARRANGE[type(function)](function, numbered).shape.index(samples.axis + 1)
    if axis and samples.axis == 0 and x.shape[0] != samples.n:
        axis = None
    return _nowhere(samples.n) if axis is None else Samples(samples.n, axis)


def _concatenated(known):
    """Batches one after the other, or several results of one batch."""
    n = sum(s.n for _, s in known)
    rows = {x.shape[0] // s.n for x, s in known if s.n}
    if _same_origin(known):
        return _nowhere(min(s.n for _, s in known))
    return Samples(n) if len(rows) == 1 else _nowhere(n)


def _same_origin(known):
    """Whether any two of these variables were made from the same data."""
    below = [_data_below(x) for x, _ in known]
    return any(a & b for a, b in itertools.combinations(below, 2))


def _data_below(x):
    """Variables from which x was made, itself included, apart from parameters."""
    seen, stack = set(), [x]
    while stack:
        x = stack.pop()
        if id(x) not in seen and not isinstance(x.get_variable_or_none(), chainer.Parameter):
            seen.add(id(x))
            stack.extend(() if x.creator_node is None else x.creator_node.inputs)
    return seen


def _functions_before_weights(functions):
    marked = set()
    stack = [
        function.inputs[index].creator_node
        for function in functions
        for index in _WEIGHTS.get(type(function), ())
        if index < len(function.inputs)
    ]
    while stack:
        function = stack.pop()
        if function is not None and function not in marked:
            marked.add(function)
            stack.extend(x.creator_node for x in function.inputs)
    return marked


def _functions_before_broadcasts(known):
    """Functions whose rows are given to every sample, up to where rows were samples."""
    marked, stack = set(), []
    for function, data in known.items():
        if isinstance(function, _BROADCASTING):
            y = next((y for y in (ref() for ref in function.outputs) if y is not None), None)
            for x, s in data:
                if y is not None and x.shape and x.shape[0] == s.n and s.axis == 0:
                    if len(x.shape) < len(y.shape) or x.shape[0] < y.shape[0]:
                        stack.append((x.creator_node, s.n))
    while stack:
        function, n = stack.pop()
        if function is not None and function not in marked and known[function]:
            if known[function][0][1].n == n:
                marked.add(function)
                stack.extend((x.creator_node, n) for x, _ in known[function])
    return marked


def _unfolded_samples(functions):
    """Samples of linear layers over several batch axes that were applied to a plain array.

    ``F.linear(x, W, n_batch_axes=2)`` folds an array before the graph begins; that it unfolds its
    output is all that can be seen.
    """
    unfolded = {}
    for function in functions:
        linear = function.inputs[0].creator_node
        if type(function) is Reshape and type(linear) is LinearFunction:
            y = function.outputs[0]()
            rows = function.inputs[0].shape[0]
            if linear.inputs[0].creator_node is None and y is not None and y.shape:
                if y.shape[0] and rows % y.shape[0] == 0:
                    unfolded[linear] = y.shape[0]
    return unfolded


def _functions_below(outputs):
    """Function nodes of the graph, inputs before those who use them."""
    stack = [y.creator_node for y in outputs if y.creator_node is not None]
    seen = set(stack)
    stack = list(seen)
    while stack:
        function = stack.pop()
        for x in function.inputs:
            creator = x.creator_node
            if creator is not None and creator not in seen:
                seen.add(creator)
                stack.append(creator)
    return sorted(seen, key=lambda function: function.rank)
