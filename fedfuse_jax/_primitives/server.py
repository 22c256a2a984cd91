"""Server optimizers as primitives, and the same step composed of a mean and arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from fedfuse_jax import reference
from fedfuse_jax._core import Axis, BoundCall, MeshAxes, Operand, Operands, Operation, coordinates_of_leaves
from fedfuse_jax._primitives.linear import WEIGHTED_MEAN, linear_partitioned

SCALARS = ("learning_rate", "b1", "b2", "tau")


def mean_on_this_device(operands: Operands, dtypes: tuple[str, ...]) -> list[Array]:
    """The weighted mean of what this device has."""
    linear = {name: operands[name] for name in ("updates", "weights", "where")}
    return WEIGHTED_MEAN.bind(linear, dtypes, divide=True)


def _mean_of(operands: Operands, mean: Callable[[Operands, tuple[str, ...]], list[Array]]) -> list[Array]:
    """Δ by ``mean``, in the moments' dtypes."""
    deltas = mean(operands, tuple(reference.accumulator_dtype(leaf.dtype).name for leaf in operands["updates"]))
    return [delta.astype(first.dtype) for delta, first in zip(deltas, operands["first_moment"], strict=True)]


# Devices that judge apart must agree. What is finite here lies so far inside of the range of its dtype that the kernel,
# which may round differently, finds it finite too.
_MARGIN = 1 - 2.0**-20


def _judge(
    rule: str,
    operands: Operands,
    deltas: list[Array],
    batch_dims: int,
    over_parameters: Callable[[Array], Array],
    over_clients: Callable[[Array], Array] = lambda count: count,
) -> Array:
    """Whether the round counts: somebody takes part, and all that the step along ``deltas`` makes is finite.

    The last two arguments sum over devices that share a dimension.
    """
    bad: Array = jnp.zeros((), np.int32)
    for param, first, second, delta in _leaves(operands, deltas):
        wide = param.astype(first.dtype)
        scalars = [_spread(operands[name].astype(first.dtype), param.ndim) for name in SCALARS]
        new, *moments = reference.server_step(rule, wide, first, second, delta, *scalars)
        most = float(jnp.finfo(param.dtype).max) * _MARGIN
        most_of_moments = float(jnp.finfo(first.dtype).max) * _MARGIN
        fits = (jnp.abs(new) <= most) & (jnp.abs(new - wide) <= most_of_moments)
        for moment in moments:
            fits = fits & (jnp.abs(moment) <= most_of_moments)
        bad = bad + jnp.any(~fits, axis=tuple(range(batch_dims, fits.ndim))).astype(np.int32)
    good = over_parameters(bad) == 0
    if (where := operands["where"]) is not None:
        good = good & (over_clients(jnp.sum(where, axis=-1, dtype=np.int32)) > 0)
    return good


def _leaves(operands: Operands, deltas: list[Array]) -> Iterator[tuple[Array, ...]]:
    return zip(operands["params"], operands["first_moment"], operands["second_moment"], deltas, strict=True)


def _spread(value: Array, ndim: int) -> Array:
    """Reshapes ``(*batch,)`` to broadcast against a leaf."""
    return value.reshape(value.shape + (1,) * (ndim - value.ndim))


def compose_update(operands: Operands, rule: str, deltas: list[Array], good: Array) -> list[Array]:
    """The update along ``deltas``, by elementwise arithmetic, of the rounds that are good."""
    stepped = []
    for old in _leaves(operands, deltas):
        param, first, second, delta = old
        accepted = _spread(good, param.ndim)
        # Derivatives of what is not taken must be finite as well.
        harmless = zip((param, first, second, delta), (0, 0, 1, 0), strict=True)
        inputs = [jnp.where(accepted, x, jnp.asarray(instead, x.dtype)) for x, instead in harmless]
        scalars = [jnp.where(accepted, _spread(operands[name].astype(first.dtype), param.ndim), 0) for name in SCALARS]
        new = reference.server_step(rule, *inputs, *scalars)
        stepped.append([jnp.where(accepted, y, x) for y, x in zip(new, old[:3], strict=True)])
    step = reference.next_step(operands["step"], good)
    return [step, *(leaf for part in zip(*stepped, strict=True) for leaf in part)]


def _jvp(call: BoundCall, primals: Operands, tangents: Operands) -> list[Array | None]:
    """The derivative of the composition, along the arguments that have a tangent."""
    is_none = lambda x: x is None  # noqa: E731
    leaves, structure = jax.tree.flatten(primals, is_leaf=is_none)
    slopes = jax.tree.leaves(tangents, is_leaf=is_none)
    moving = [i for i, slope in enumerate(slopes) if slope is not None]
    assert call.results is not None
    good = call.results[0] != primals["step"]

    def mean(operands: Operands, dtypes: tuple[str, ...]) -> list[Array]:
        linear = {name: operands[name] for name in ("updates", "weights", "where")}
        return call.bind(WEIGHTED_MEAN, linear, dtypes, divide=True)

    def compose(*moved: Array) -> list[Array]:
        merged = list(leaves)
        for i, value in zip(moving, moved, strict=True):
            merged[i] = value
        rule = reference.SERVER_RULES[call.layout.attribute("rule")]
        operands = jax.tree.unflatten(structure, merged)
        return compose_update(operands, rule, _mean_of(operands, mean), good)[1:]

    _, out = jax.jvp(compose, [leaves[i] for i in moving], [slopes[i] for i in moving])
    return [None, *(jnp.broadcast_to(t, x.shape) for t, x in zip(out, call.results[1:], strict=True))]


def _partitioned(call: BoundCall, operands: Operands, mesh_axes: dict[Axis, MeshAxes]) -> list[Array]:
    """Local means, one all-reduce of a number that says whether what they lead to is finite, local steps."""
    names = tuple(sorted({name for axis, used in mesh_axes.items() if axis.startswith("leaf") for name in used}))
    clients = mesh_axes.get("clients", ())
    if not names and not clients:
        return call.run_local(operands)

    def mean(operands: Operands, dtypes: tuple[str, ...]) -> list[Array]:
        linear = {name: operands[name] for name in ("updates", "weights", "where")}
        layout = call.layout._replace(out_dtypes=dtypes, attributes=(("divide", True),))
        return linear_partitioned(BoundCall(WEIGHTED_MEAN, layout, None), linear, mesh_axes)

    deltas = _mean_of(operands, mean)
    rule = reference.SERVER_RULES[call.layout.attribute("rule")]
    good = _judge(rule, operands, deltas, call.batch_dims, sum_over(names), sum_over(clients))
    # The mean is the update of one client, absent if it is not to be taken: the same kernel, and so the same bits.
    alone = {
        "updates": [call.over_clients(delta) for delta in deltas],
        "weights": jnp.ones((*good.shape, 1), reference.accumulator_dtype(*(delta.dtype for delta in deltas))),
        "where": good[..., None],
    }
    return call.run_local({**operands, **alone}, optional=("where",))


def sum_over(names: MeshAxes) -> Callable[[Array], Array]:
    """A sum over mesh axes; without any, the number itself."""
    return functools.partial(lax.psum, axis_name=names) if names else lambda count: count


class _State(NamedTuple):
    """A server optimizer's state, of flat moments."""

    step: Array
    first_moment: list[Array]
    second_moment: list[Array]


def _definition(
    *, step: Any, params: Any, first_moment: Any, second_moment: Any, updates: Any, out_dtypes: Any, rule: int,
    **others: Any,
) -> list[Array]:  # fmt: skip
    state = _State(step, first_moment, second_moment)
    new, after = reference.server_update(reference.SERVER_RULES[rule], params, state, updates, **others)
    return [after.step, *new, *after.first_moment, *after.second_moment]


def _workspace(sizes: Any, layout: Any) -> Any:
    """The mean, in the moments' dtypes, and whether the round counts; see ffi/contract/server.cc."""
    alignment = 64
    bytes_of_batch = alignment
    for leaf, of_leaf in enumerate(coordinates_of_leaves(sizes, layout.num_leaves)):
        itemsize = np.dtype(layout.out_dtypes[1 + layout.num_leaves + leaf]).itemsize
        bytes_of_batch = bytes_of_batch + of_leaf * itemsize + alignment
    for i in range(layout.batch_dims):
        bytes_of_batch = bytes_of_batch * sizes[f"batch{i}"]
    return bytes_of_batch


def _server_update(name: str) -> Operation:
    moved = (
        Operand("step"),
        Operand("params", per_leaf=True),
        Operand("first_moment", per_leaf=True),
        Operand("second_moment", per_leaf=True),
    )
    return Operation(
        name,
        operands=(
            *moved,
            Operand("updates", ("clients",), per_leaf=True),
            Operand("weights", ("clients",)),
            Operand("where", ("clients",), optional=True),
            *(Operand(scalar) for scalar in SCALARS),
        ),
        results=moved,
        definition=_definition,
        partitioned=_partitioned,
        jvp=_jvp,
        aliased=("step", "params", "first_moment", "second_moment"),
        workspace=_workspace,
    )


FEDAVGM = _server_update("fedavgm_weighted_update")


FEDADAGRAD = _server_update("fedadagrad_weighted_update")


FEDADAM = _server_update("fedadam_weighted_update")


FEDYOGI = _server_update("fedyogi_weighted_update")


RULE_OF = dict(zip((op.name for op in (FEDAVGM, FEDADAGRAD, FEDADAM, FEDYOGI)), reference.SERVER_RULES, strict=True))
