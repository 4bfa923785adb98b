"""The function hook that forms second moments while ``loss.backward()`` runs."""

import dataclasses
import itertools

import chainer
import numpy as np

from vgc_chainer.second_moment import backprop
from vgc_chainer.second_moment.graph import read_graph
from vgc_chainer.second_moment.registry import UnsupportedFunctionError
from vgc_chainer.second_moment.terms import different_counts, total_square_sum
from vgc_chainer.timing import Timings

POLICIES = ('error', 'batch', 'dense')
_numbers = itertools.count()


@dataclasses.dataclass
class Coverage:
    """How the second moment of one parameter was formed in the last backward pass.

    Attributes:
        name: Path of the parameter in the model.
        functions: Labels of the functions that used it.
        rule: Name of the rule, or ``'batch'``, ``'dense'`` or ``'unused'``.
    """

    name: str
    functions: tuple = ()
    rule: str = 'unused'


class SecondMomentHook(chainer.FunctionHook):
    """Forms ``s = sum over samples of c_z^2`` for every observed parameter.

    The model is not touched. After ``loss.backward()`` :meth:`moment` gives s beside
    ``param.grad``. Like ``param.grad`` it adds up over several backward passes until the gradient
    is cleared, and it carries the square of the loss scale that the gradient carries.

    Args:
        unsupported: What to do with a parameter that is used by a function without rule, or in a
            way that its rule does not cover: ``'error'``, raise before any gradient is formed;
            ``'batch'``, count the whole batch as one sample, s = g^2; ``'dense'``, form no second
            moment and mark the parameter, so that it is sent uncompressed. A dict maps
            parameter paths or their beginnings to policies; the longest that fits counts, and
            ``''`` is the default.
        memory: Bytes that per-sample terms may take at a time.
        timings: :class:`~vgc_chainer.timing.Timings` that gets the time spent.

    Raises:
        ValueError: Unknown policy.
    """

    def __init__(self, unsupported='error', memory=2**28, timings=None):
        super().__init__()
        self.name = f'SecondMomentHook-{next(_numbers)}'
        self._policies = unsupported if isinstance(unsupported, dict) else {'': unsupported}
        for policy in self._policies.values():
            if policy not in POLICIES:
                raise ValueError(f'unsupported must be one of {POLICIES}, not {policy!r}')
        self.memory = int(memory)
        self._timings = timings or Timings()
        self._names = {}
        self._params = []
        self._moments = {}
        self._dense = set()
        self._coverage = {}
        self._passes = []
        self._attached = False

    # -- what a user calls

    def observe(self, model):
        """Observe the parameters of a link from now on, and those of no other."""
        self._params = [param for _, param in sorted(model.namedparams())]
        self._names = {id(param): name for name, param in sorted(model.namedparams())}
        self._moments = {k: s for k, s in self._moments.items() if k in self._names}
        self._dense &= set(self._names)

    def attach(self):
        """Start to observe backward passes of this thread."""
        if not self._attached:
            super().__enter__()
            backprop.install()
            self._attached = True

    def detach(self):
        """Stop to observe; leaves nothing behind."""
        if self._attached:
            self._attached = False
            backprop.uninstall()
            super().__exit__()

    def __enter__(self):
        self.attach()
        return self

    def __exit__(self, *_):
        self.detach()

    def moment(self, param):
        """Second moment of a parameter, of its shape, float32 or wider; None if there is none."""
        return self._moments.get(id(param))

    def is_dense(self, param):
        """Whether the parameter was met in a function without rule under policy ``'dense'``."""
        return id(param) in self._dense

    def policy(self, name):
        """Policy for the parameter of this path."""
        fitting = [prefix for prefix in self._policies if name.startswith(prefix)]
        return self._policies[max(fitting, key=len)] if fitting else 'error'

    def clear(self):
        """Forget all second moments."""
        self._moments.clear()
        self._dense.clear()

    def coverage(self):
        """List of :class:`Coverage`, one a parameter, for the last pass that used each."""
        return [
            self._coverage.get(id(param), Coverage(self._names[id(param)]))
            for param in self._params
        ]

    # -- called by .backprop and by Chainer

    def begin_pass(self, outputs):
        """Read the graph, apply the policies, prepare to collect terms."""
        observed = {id(param.node): param for param in self._params}
        current = _Pass(read_graph(outputs, observed) if observed else [])
        for key, uses in current.uses_of.items():
            if any(key in outer.params for outer in self._passes):
                raise UnsupportedFunctionError(_nested(self._names[key]))
            self._prepare(current, key, uses)
        for outer in self._passes:
            outer.params.update(current.params)
        self._passes.append(current)

    def backward_preprocess(self, function, in_data, out_grad):
        if not self._passes:
            return
        current = self._passes[-1]
        uses = current.uses_at.pop(function, None)
        if uses is None:
            return
        xp = chainer.backend.get_array_module(*out_grad)
        with self._timings.measure('second_moment', xp):
            for use in uses:
                if any(gy is not None for gy in out_grad):
                    current.terms[id(use.param)].append(use.term(in_data, out_grad))
                current.waiting[id(use.param)] -= 1
                if not current.waiting[id(use.param)]:
                    self._finish(current, use.param)

    def end_pass(self):
        """Square what is still waiting (functions that received no gradient never came)."""
        current = self._passes.pop()
        for key in list(current.terms):
            self._finish(current, current.params[key])
        for key, before in current.batch.items():
            param = current.params[key]
            if param.grad is not None:
                g = param.grad if before is None else param.grad - before
                g = g.astype(np.promote_types(g.dtype, np.float32), copy=False)
                self._add(current, param, g * g)

    def abort_pass(self):
        """A backward pass has raised: its terms are void."""
        self._passes.pop()

    # -- details

    def _prepare(self, current, key, uses):
        param, name = uses[0].param, self._names[key]
        current.fresh[key] = param.grad is None or (key in self._moments and not param.grad.any())
        unsupported = [use for use in uses if use.rule is None]
        rules = {use.rule.name for use in uses if use.rule is not None}
        rule = '+'.join(sorted(rules))
        counts = sorted({use.n_samples for use in uses})
        if unsupported or len(counts) > 1:
            rule = self.policy(name)
            if rule == 'error':
                if unsupported:
                    raise UnsupportedFunctionError(_explain(name, unsupported[0]))
                raise UnsupportedFunctionError(different_counts(name, counts))
            if rule == 'dense':
                self._dense.add(key)
            else:
                before = None if param.grad is None else param.grad.copy()
                current.batch[key] = before
        else:
            current.collect(key, uses)
        labels = tuple(dict.fromkeys(use.function.label for use in uses))
        self._coverage[key] = Coverage(name, labels, rule)

    def _finish(self, current, param):
        terms = current.terms.pop(id(param), None)
        if terms:
            s = total_square_sum(terms, self.memory, self._names[id(param)])
            self._add(current, param, s)

    def _add(self, current, param, s):
        key = id(param)
        old = None if current.fresh[key] else self._moments.get(key)
        self._moments[key] = s if old is None else old + s


class _Pass:
    """One backward pass that is under way."""

    def __init__(self, uses):
        self.params, self.uses_of = {}, {}
        for use in uses:
            self.params[id(use.param)] = use.param
            self.uses_of.setdefault(id(use.param), []).append(use)
        self.uses_at, self.waiting, self.terms = {}, {}, {}
        self.fresh, self.batch = {}, {}

    def collect(self, key, uses):
        """Collect the terms of these uses as their functions come by."""
        self.waiting[key] = len(uses)
        self.terms[key] = []
        for use in uses:
            self.uses_at.setdefault(use.function, []).append(use)


def format_coverage(coverage):
    """Coverage as a text table."""
    rows = [('parameter', 'rule', 'functions')]
    rows += [(c.name, c.rule, ', '.join(c.functions)) for c in coverage]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return '\n'.join(f'{n:{widths[0]}}  {r:{widths[1]}}  {f}'.rstrip() for n, r, f in rows)


def _explain(name, use):
    layer = name.rpartition('/')[0] or '/'
    return (
        f'parameter {name} of layer {layer} is used by function {use.function.label}, {use.why} '
        'there. Register a rule (vgc_chainer.second_moment.register), or choose '
        "unsupported='batch' or 'dense'"
    )


def _nested(name):
    return (
        f'parameter {name} is used inside a backward pass that runs within another one '
        '(chainer.functions.forget), and elsewhere, too: its uses cannot be added sample by sample'
    )
