"""Which combinations of parameters the quick tier runs. The full tier runs the others; none is left out of both."""

import itertools

import pytest


def tiered(quick, **axes):
    """Parametrizes over the product of the axes, each values by id; the quick tier takes those where ``quick`` is true.

    ``quick`` is given the position on each axis.
    """
    parameters = []
    for point in itertools.product(*(enumerate(axis.items()) for axis in axes.values())):
        positions, items = zip(*point, strict=True)
        names, values = zip(*items, strict=True)
        marks = () if quick(*positions) else (pytest.mark.full,)
        parameters.append(pytest.param(*values, id="-".join(names), marks=marks))
    return pytest.mark.parametrize(tuple(axes), parameters)


def checkerboard(**axes):
    """The quick tier takes every other combination: all pairs of three axes, where no axis has but one value."""
    return tiered(lambda *positions: sum(positions) % 2 == 0, **axes)


def by_id(values):
    """Cases, names or whatever says what it is, as an axis."""
    return {str(value): value for value in values}


def with_most_arguments(cases):
    """Positions of the cases that give their operation the most arguments that any of these does."""
    last = {case.row.label or case.row.operation: position for position, case in enumerate(cases)}
    return set(last.values())


def most_arguments_first(cases):
    """Over the cases; the quick tier takes those with the most arguments: rules go through the others on the way."""
    most = with_most_arguments(cases)
    return tiered(lambda position: position in most, case=by_id(cases))
