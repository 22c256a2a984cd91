"""What an operation says of itself: its operands and results, and the named axes along which they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

# A kernel decodes the batch with a table of this many axes; see ffi/contract/buffers.h.
MAX_BATCH_DIMS = 8


# An axis of an operand, by what it means: "clients", "batch0", or "leaf2.axis1" for a parameter axis.
Axis = str


# The mesh axes that an axis is sharded over.
MeshAxes = tuple[str, ...]


class Operand(NamedTuple):
    """One operand or result: its leading named axes, and whether there is one per leaf of the tree.

    An operand per leaf has the leaf's parameter axes after its named ones.
    """

    name: str
    axes: tuple[Axis, ...] = ()
    per_leaf: bool = False
    optional: bool = False


class Layout(NamedTuple):
    """The static part of a bound operation: how its flat operands are to be read."""

    num_leaves: int
    batch_dims: int
    optional: tuple[str, ...]  # the optional operands that are there
    out_dtypes: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...]

    def attribute(self, name: str) -> Any:
        return dict(self.attributes)[name]


# Operands by name: a list for one per leaf, an array for a single one, None for an optional one left out.
Operands = dict[str, Any]


class Declaration:
    """Operands, results and their axes, and how flat lists of arrays are read by them."""

    def __init__(
        self,
        name: str,
        operands: Sequence[Operand] | Callable[..., Sequence[Operand]],
        results: Sequence[Operand] | Callable[..., Sequence[Operand]],
        new_axes: Callable[..., Mapping[Axis, int | Axis]] | None,
    ):
        self.name = name
        self._operands, self._results, self._new_axes = operands, results, new_axes

    def operands(self, attributes: tuple[tuple[str, Any], ...]) -> Sequence[Operand]:
        return self._operands(**dict(attributes)) if callable(self._operands) else self._operands

    def results(self, attributes: tuple[tuple[str, Any], ...]) -> Sequence[Operand]:
        return self._results(**dict(attributes)) if callable(self._results) else self._results

    def present_operands(self, layout: Layout) -> list[Operand]:
        declared = self.operands(layout.attributes)
        return [spec for spec in declared if not spec.optional or spec.name in layout.optional]

    def flatten(self, operands: Operands, layout: Layout) -> list[Any]:
        flat: list[Any] = []
        for spec in self.present_operands(layout):
            value = operands[spec.name]
            flat.extend(value if spec.per_leaf else [value])
        return flat

    def unflatten(self, flat: Sequence[Any], layout: Layout) -> Operands:
        operands: Operands = {spec.name: None for spec in self.operands(layout.attributes)}
        position = 0
        for spec in self.present_operands(layout):
            if spec.per_leaf:
                operands[spec.name] = list(flat[position : position + layout.num_leaves])
                position += layout.num_leaves
            else:
                operands[spec.name] = flat[position]
                position += 1
        return operands

    def axes(self, ndims: Sequence[int], layout: Layout) -> tuple[list[tuple[Axis, ...]], list[tuple[Axis, ...]]]:
        """The named axes of every flat operand and result, given the operands' numbers of dimensions."""
        batch = tuple(f"batch{i}" for i in range(layout.batch_dims))
        parameters: dict[int, tuple[Axis, ...]] = {}
        operand_axes: list[tuple[Axis, ...]] = []
        for spec in self.present_operands(layout):
            if not spec.per_leaf:
                operand_axes.append(batch + spec.axes)
                continue
            for leaf in range(layout.num_leaves):
                ndim = ndims[len(operand_axes)] - layout.batch_dims - len(spec.axes)
                parameters.setdefault(leaf, tuple(f"leaf{leaf}.axis{i}" for i in range(ndim)))
                operand_axes.append(batch + spec.axes + parameters[leaf])
        result_axes: list[tuple[Axis, ...]] = []
        for spec in self.results(layout.attributes):
            if spec.per_leaf:
                result_axes.extend(batch + spec.axes + parameters[leaf] for leaf in range(layout.num_leaves))
            else:
                result_axes.append(batch + spec.axes)
        return operand_axes, result_axes

    def sizes(self, avals: Sequence[Any], operand_axes: Sequence[tuple[Axis, ...]], layout: Layout) -> dict[Axis, Any]:
        """The size of every axis. Operands must agree, but for batch axes, where size 1 means shared."""
        new_axes = dict(self._new_axes(**dict(layout.attributes))) if self._new_axes else {}
        sizes: dict[Axis, Any] = {axis: size for axis, size in new_axes.items() if not isinstance(size, str)}
        for aval, axes in zip(avals, operand_axes, strict=True):
            if len(aval.shape) != len(axes):
                raise ValueError(f"{self.name}: an operand of shape {aval.shape} does not have the axes {axes}.")
            for axis, size in zip(axes, aval.shape, strict=True):
                known = sizes.setdefault(axis, size)
                if axis.startswith("batch") and is_one(known):
                    sizes[axis] = size
                elif not (axis.startswith("batch") and is_one(size)) and known != size:
                    raise ValueError(f"{self.name}: axis {axis} has size {size} in one operand and {known} in another.")
        sizes.update({axis: sizes[model] for axis, model in new_axes.items() if isinstance(model, str)})
        return sizes


def leaf_of(axis: Axis) -> int | None:
    """Which leaf a parameter axis is of."""
    leaf, dot, _ = axis.partition(".")
    return int(leaf.removeprefix("leaf")) if dot else None


def coordinates_of_leaves(sizes: Mapping[Axis, Any], num_leaves: int) -> list[Any]:
    """How many coordinates each leaf has, by one pass over the sizes of all axes."""
    coordinates: list[Any] = [1] * num_leaves
    for axis, size in sizes.items():
        if (leaf := leaf_of(axis)) is not None:
            coordinates[leaf] = coordinates[leaf] * size
    return coordinates


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
