"""Which rule forms the per-sample terms of which function."""

from vgc_chainer.errors import VgcError

_RULES = {}


class UnsupportedFunctionError(VgcError, NotImplementedError):
    """A parameter is used in a way whose per-sample contributions are not known."""


class Rule:
    """A registered rule: the function that forms terms, and when it holds."""

    def __init__(self, form, name, broadcasts, applies):
        self.form = form
        self.name = name
        self.broadcasts = broadcasts
        self.applies = applies


def register(*function_classes, name=None, broadcasts=False, applies=None):
    """Decorator: the rule for parameters that are inputs of these function classes.

    The decorated function takes a :class:`~vgc_chainer.second_moment.graph.Use` and returns a
    :class:`~vgc_chainer.second_moment.terms.Term` whose contributions have the shape of that
    input of the function.

    Args:
        function_classes: Subclasses of ``chainer.FunctionNode``, or of the old
            ``chainer.Function``.
        name: Name in the coverage report; by default the decorated function's.
        broadcasts: The rule accepts an input that was broadcast from a smaller parameter, and sums
            each sample's contribution over the broadcast axes.
        applies: Predicate ``(function, index, shape of the parameter as it enters) -> bool`` that
            says whether the rule holds.
    """

    def decorate(form):
        rule = Rule(form, name or form.__name__, broadcasts, applies)
        for cls in function_classes:
            _RULES[cls] = rule
        return form

    return decorate


def find_rule(function):
    """Rule for a function node, or None."""
    rule = _RULES.get(type(function))
    if rule is None and hasattr(function, 'function'):  # adapter of an old-style Function
        rule = _RULES.get(type(function.function))
    return rule
