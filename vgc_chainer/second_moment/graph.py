"""Reads the graph of a backward pass before it runs: who uses which parameter how.

A parameter reaches a function directly or through *transparent* functions that only rearrange,
cast or broadcast it (``L.Scale``, mixed precision, depthwise convolution). A rule may be applied
only where the other inputs depend on data: in ``W * scale`` axis 0 counts no samples.

What a sample is: axis 0 of the arrays that enter the graph. A reshape that folds further axes into
axis 0, (b, t, d) -> (b * t, d), leaves b samples of t rows each; functions that keep the length
of axis 0 keep that, too.
"""

import dataclasses

from chainer.functions.array.broadcast import BroadcastTo
from chainer.functions.array.cast import Cast
from chainer.functions.array.expand_dims import ExpandDims
from chainer.functions.array.reshape import Reshape
from chainer.functions.array.squeeze import Squeeze
from chainer.functions.array.transpose import Transpose
from chainer.functions.connection.linear import LinearFunction

from vgc_chainer.second_moment.registry import find_rule

_RESHAPES = (Reshape, ExpandDims, Squeeze)
_TRANSPARENT = (Cast, Transpose, BroadcastTo, *_RESHAPES)


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
        in_data, out_grad: While the rule runs, arrays: the function's inputs and output gradients.
    """

    function: object
    index: int
    param: object
    shape: tuple
    n_samples: int
    rule: object
    path: list
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
    uses, samples = [], {}
    functions = _functions_below(outputs)
    unfolded = _unfolded_samples(functions)
    for function in functions:
        counts = [_samples_of(x, observed, samples) for x in function.inputs]
        if function in unfolded and counts[0] is not None:
            counts[0] = min(counts[0], unfolded[function])
        known = [n for n in counts if n is not None]
        samples[function] = _samples_of_output(function, counts)
        if type(function) in _TRANSPARENT:
            continue
        for index, x in enumerate(function.inputs):
            if x.requires_grad:
                found = _parameter_behind(x, observed)
                if found is not None:
                    uses.append(_use(function, index, *found, known))
    return uses


def _use(function, index, param, path, known):
    rule = find_rule(function) if known else None
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
    return Use(function, index, param, shape, known[0] if known else 0, rule, path)


def _parameter_behind(x, observed):
    path = []
    while x.creator_node is not None:
        if type(x.creator_node) not in _TRANSPARENT:
            return None
        path.append(x.creator_node)
        x = x.creator_node.inputs[0]
    param = observed.get(id(x))
    return None if param is None else (param, path)


def _samples_of(x, observed, samples):
    """Number of samples in a variable; None if it depends on parameters alone."""
    if x.creator_node is not None:
        return samples[x.creator_node]
    if id(x) in observed:
        return None
    return x.shape[0] if x.shape else 1


def _samples_of_output(function, counts):
    known = [(x, n) for x, n in zip(function.inputs, counts) if n is not None]
    if not known:
        return None
    y = function.outputs[0]()
    if y is None or not y.shape:
        return 1
    rows = y.shape[0]
    fold = type(function) in _RESHAPES
    kept = [
        n for x, n in known if n and (rows % n == 0 if fold else x.shape and x.shape[0] == rows)
    ]
    return min(kept, default=rows)


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
