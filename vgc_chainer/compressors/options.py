"""Checks of hyperparameters: each returns the value or names the parameter that is wrong."""

import math


def positive(name, value):
    """A finite number > 0."""
    value = float(value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f'{name} must be a finite number > 0, not {value}')
    return value


def fraction(name, value):
    """A number in (0, 1]."""
    value = float(value)
    if not 0 < value <= 1:
        raise ValueError(f'{name} must be in (0, 1], not {value}')
    return value


def integer(name, value, low, high):
    """An integer in low..high."""
    if isinstance(value, bool) or int(value) != value or not low <= value <= high:
        raise ValueError(f'{name} must be an integer in {low}..{high}, not {value}')
    return int(value)


def choice(name, value, *allowed):
    """One of `allowed`."""
    if value not in allowed:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, allowed))}, not {value!r}')
    return value
