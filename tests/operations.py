"""The table of operations that drives the battery. To test a new operation, add a row.

A row names the operation's arguments by kind, and says what it is: linear in what, differentiable in what, sharded how.
A *case* is a row with some of its optional arguments given: the kernels take different paths for those.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle

import fedfuse_jax as ff
from fedfuse_jax import _core, _native, reference
from fedfuse_jax._primitives.centers import STEP_TOWARD_CLIENTS
from fedfuse_jax._primitives.distances import PAIRWISE_SQUARED_DISTANCES
from fedfuse_jax._primitives.linear import CLIENT_DOTS, WEIGHTED_SPREAD
from fedfuse_jax._primitives.mixing import MIX_CLIENTS
from fedfuse_jax._primitives.norms import CLIENT_NORMS
from fedfuse_jax._primitives.order_statistics import SELECTED_MEAN, SPREAD_TO_SELECTED
from fedfuse_jax._primitives.quantized import QUANTIZED_DOTS
from fedfuse_jax._primitives.sparse import SPARSE_DOTS, SPARSE_SPREAD


class Kind(enum.Enum):
    """What an argument is; this alone says how to sample and how to shard it."""

    STACKED = "a tree of client-stacked leaves"
    CLIENT = "one client's tree"
    TOTAL = "one tree, in the accumulator's dtype"
    CLIENTS = "a list of clients' trees"
    WEIGHTS = "a number per client"
    WHERE = "a truth value per client"
    MIXING = "rows of a number per client"
    TRIM = "an integer scalar"
    SCALAR = "a real scalar"
    BOUND = "a norm that about half of the clients exceed"
    KEY = "a raw Threefry key"
    STATE = "a server optimizer's state"
    RATES = "hyper-parameters in one vector"
    ENTRIES = "a row of numbers per client, as long as all leaves together"
    INDICES = "an integer for each of those, some out of range; every other row sorted"
    CODES = "a row of uint8 per client, as long as all leaves together"
    LEVELS = "a short row of small uint8 per client"
    FACTORS = "a number per client, in the leaves' dtype"
    VECTOR = "one vector of a fixed length"
    SHORT_VECTOR = "one vector as long as levels"


@dataclasses.dataclass(frozen=True)
class Row:
    """One operation. Callables take its arguments by name, as the public function does."""

    operation: str
    call: Callable[..., Any]
    definition: Callable[..., Any]
    oracle: Callable[..., Any]
    arguments: dict[str, Kind]
    variants: tuple[tuple[str, ...], ...] = ((),)  # which optional arguments are given
    linear: tuple[str, ...] = ()  # in each of them alone
    differentiable: tuple[str, ...] = ()
    random: bool = False
    public: bool = True
    out_dtype: bool = False
    order_statistic: bool = False
    takes_trees: bool = True
    coordinate_wise: bool = True  # each coordinate by itself: same bits however the parameters are cut or sharded
    withstands_overflow: bool = False  # where the result is in range, so are the steps to it
    collectives: tuple[str, ...] = ()  # those allowed when parameters are sharded
    label: str = ""

    @property
    def optional(self) -> set[str]:
        return {name for variant in self.variants for name in variant}


# --- Operations that users reach only through a derivative ------------------------------------------------------


def client_dots(updates: Any, others: Any, where: Any = None, shared: bool = False) -> Any:
    leaves, other_leaves = jax.tree.leaves(updates), jax.tree.leaves(others)
    dtype = reference.accumulator_dtype(*(leaf.dtype for leaf in leaves + other_leaves)).name
    operands = {"updates": leaves, "others": other_leaves, "where": where}
    return CLIENT_DOTS.bind(operands, (dtype,), shared=shared)[0]


def selected_mean(updates: Any, values: Any, trim_count: Any, where: Any = None) -> Any:
    leaves, structure = jax.tree.flatten(updates)
    dtypes = [reference.accumulator_dtype(leaf.dtype).name for leaf in leaves]
    operands = {"updates": leaves, "values": jax.tree.leaves(values), "where": where, "trim_count": trim_count}
    results = SELECTED_MEAN.bind(operands, dtypes, trim=-1, around_median=False)
    return structure.unflatten(results)


def spread_to_selected(updates: Any, cotangents: Any, trim_count: Any, where: Any = None) -> Any:
    leaves, structure = jax.tree.flatten(updates)
    dtypes = [leaf.dtype.name for leaf in leaves]
    operands = {"updates": leaves, "cotangents": jax.tree.leaves(cotangents), "where": where, "trim_count": trim_count}
    results = SPREAD_TO_SELECTED.bind(operands, dtypes, trim=-1, around_median=False)
    return structure.unflatten(results)


def num_byzantine_of(updates: Any) -> int:
    """As many as may be bad."""
    return (jax.tree.leaves(updates)[0].shape[0] - 1) // 2


def mean_nearest_median(updates: Any, values: Any, where: Any = None) -> Any:
    """`selected_mean` of those that the mean around the median keeps."""
    leaves, structure = jax.tree.flatten(updates)
    dtypes = [reference.accumulator_dtype(leaf.dtype).name for leaf in leaves]
    operands = {"updates": leaves, "values": jax.tree.leaves(values), "where": where, "trim_count": None}
    f = num_byzantine_of(updates)
    return structure.unflatten(SELECTED_MEAN.bind(operands, dtypes, trim=f, around_median=True))


def spread_nearest_median(updates: Any, cotangents: Any, where: Any = None) -> Any:
    leaves, structure = jax.tree.flatten(updates)
    dtypes = [leaf.dtype.name for leaf in leaves]
    operands = {"updates": leaves, "cotangents": jax.tree.leaves(cotangents), "where": where, "trim_count": None}
    f = num_byzantine_of(updates)
    return structure.unflatten(SPREAD_TO_SELECTED.bind(operands, dtypes, trim=f, around_median=True))


def difference_dots(updates: Any, others: Any, where: Any = None) -> Any:
    leaves = jax.tree.leaves(updates)
    operands = {"updates": leaves, "others": jax.tree.leaves(others), "where": where}
    dtype = reference.accumulator_dtype(*(leaf.dtype for leaf in leaves)).name
    return PAIRWISE_SQUARED_DISTANCES.bind(operands, (dtype,))[0]


def mix_clients(updates: Any, mixing: Any) -> Any:
    leaves, structure = jax.tree.flatten(updates)
    dtypes = [reference.accumulator_dtype(leaf.dtype).name for leaf in leaves]
    operands = {"updates": leaves, "mixing": mixing}
    return structure.unflatten(MIX_CLIENTS.bind(operands, dtypes))


def step_toward_clients(updates: Any, center: Any, weights: Any, where: Any = None) -> Any:
    leaves, structure = jax.tree.flatten(updates)
    dtypes = [reference.accumulator_dtype(leaf.dtype).name for leaf in leaves]
    operands = {"updates": leaves, "center": jax.tree.leaves(center), "weights": weights, "where": where}
    results = STEP_TOWARD_CLIENTS.bind(operands, [*dtypes, weights.dtype.name])
    return structure.unflatten(results[:-1]), results[-1]


def _spread_with(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a list of cotangents and of dtypes, as one of a tree whose results have the cotangents' dtypes."""

    def spread(weights: Any, cotangents: Any, where: Any = None) -> Any:
        leaves, structure = jax.tree.flatten(cotangents)
        return structure.unflatten(function(weights, leaves, where, [leaf.dtype.name for leaf in leaves]))

    return spread


weighted_spread = _spread_with(
    lambda weights, leaves, where, dtypes: WEIGHTED_SPREAD.bind(
        {"weights": weights, "cotangents": leaves, "where": where}, dtypes
    )
)
define_weighted_spread = _spread_with(
    lambda weights, leaves, where, dtypes: reference.weighted_spread(weights, leaves, where=where, dtypes=dtypes)
)


def _as_many_bad(function: Callable[..., Any], argument: str = "num_byzantine") -> Callable[..., Any]:
    """The function with as many bad clients as there may be."""

    def call(updates: Any, **others: Any) -> Any:
        return function(updates, **{argument: num_byzantine_of(updates)}, **others)

    return call


def client_norms(updates: Any, where: Any = None) -> Any:
    leaves = jax.tree.leaves(updates)
    dtype = reference.accumulator_dtype(*(leaf.dtype for leaf in leaves)).name
    return CLIENT_NORMS.bind({"updates": leaves, "where": where}, (dtype,))[0]


def server_row(operation: str, *rates: str) -> Row:
    """A server optimizer, its hyper-parameters taken from one vector."""

    def with_rates(function: Callable[..., Any]) -> Callable[..., Any]:
        def update(params: Any, state: Any, updates: Any, rates_of: Any, **options: Any) -> Any:
            named = {rate: rates_of[i] for i, rate in enumerate(rates)}
            return function(params, state, updates, **named, **options)

        return update

    return Row(
        operation,
        call=with_rates(getattr(ff, operation)),
        definition=with_rates(getattr(reference, operation)),
        oracle=with_rates(getattr(oracle, operation)),
        arguments={
            "params": Kind.CLIENT,
            "state": Kind.STATE,
            "updates": Kind.STACKED,
            "rates_of": Kind.RATES,
            "weights": Kind.WEIGHTS,
            "where": Kind.WHERE,
        },
        variants=((), ("weights", "where")),
        differentiable=("params", "updates", "rates_of"),
        coordinate_wise=False,
        collectives=("all-reduce",),
    )


def sparse_spread(indices: Any, weights: Any, vector: Any, where: Any = None) -> Any:
    operands = {"indices": indices, "weights": weights, "vector": vector, "where": where}
    return SPARSE_SPREAD.bind(operands, (vector.dtype.name,))[0]


def sparse_dots(values: Any, indices: Any, vector: Any, where: Any = None) -> Any:
    operands = {"values": values, "indices": indices, "vector": vector, "where": where}
    return SPARSE_DOTS.bind(operands, (vector.dtype.name,))[0]


def quantized_dots(codes: Any, zero_points: Any, vector: Any, where: Any = None) -> Any:
    """Of 8-bit codes, as many as the vector is long; one zero point a client."""
    zero_points = zero_points.astype(vector.dtype)[:, None]
    operands = {"codes": codes[:, None], "zero_points": zero_points, "vector": vector[None], "where": where}
    bits = {"num_bits": 8, "num_params": -1, "block_size": 0}
    return QUANTIZED_DOTS.bind(operands, (vector.dtype.name,), **bits)[0][:, 0]


def in_float64(operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The oracle of a sum over coordinates: it may be stricter with the kernel, which sums in float64."""
    return functools.partial(function, kernel=_native.has_kernel(operation, "cpu"))


# How many coordinates sparse updates have: a few times what a task takes on at least.
NUM_PARAMS = 3001
NUM_LEVELS = 37

# --- The table --------------------------------------------------------------------------------------------------

ROWS = (
    Row(
        "weighted_sum",
        call=ff.weighted_sum,
        definition=reference.weighted_sum,
        oracle=oracle.weighted_sum,
        arguments={"updates": Kind.STACKED, "weights": Kind.WEIGHTS, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("updates", "weights"),
        differentiable=("updates", "weights"),
        out_dtype=True,
    ),
    Row(
        "weighted_mean",
        call=ff.weighted_mean,
        definition=reference.weighted_mean,
        oracle=oracle.weighted_mean,
        arguments={"updates": Kind.STACKED, "weights": Kind.WEIGHTS, "where": Kind.WHERE},
        variants=((), ("weights",), ("weights", "where")),
        linear=("updates",),
        differentiable=("updates", "weights"),
        out_dtype=True,
    ),
    Row(
        "weighted_spread",
        call=weighted_spread,
        definition=define_weighted_spread,
        oracle=oracle.weighted_spread,
        arguments={"weights": Kind.WEIGHTS, "cotangents": Kind.TOTAL, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("weights", "cotangents"),
        differentiable=("weights", "cotangents"),
        public=False,
    ),
    Row(
        "squared_norms",
        call=ff.squared_norms,
        definition=reference.squared_norms,
        oracle=in_float64("squared_norms", oracle.squared_norms),
        arguments={"updates": Kind.STACKED, "where": Kind.WHERE},
        variants=((), ("where",)),
        differentiable=("updates",),
        coordinate_wise=False,
        withstands_overflow=True,
        collectives=("all-reduce",),
    ),
    Row(
        "finite_clients",
        call=ff.finite_clients,
        definition=reference.finite_clients,
        oracle=oracle.finite_clients,
        arguments={"updates": Kind.STACKED},
        coordinate_wise=False,
        withstands_overflow=True,
        collectives=("all-reduce",),
    ),
    Row(
        "accumulate_weighted",
        call=ff.accumulate_weighted,
        definition=reference.accumulate_weighted,
        oracle=oracle.accumulate_weighted,
        arguments={"total": Kind.TOTAL, "update": Kind.CLIENT, "weight": Kind.SCALAR},
        linear=(),
        differentiable=("total", "update", "weight"),
    ),
    Row(
        "stack_clients",
        call=ff.stack_clients,
        definition=reference.stack_clients,
        oracle=oracle.stack_clients,
        arguments={"updates": Kind.CLIENTS},
        linear=("updates",),
        differentiable=("updates",),
        withstands_overflow=True,
    ),
    Row(
        "coordinate_median",
        call=ff.coordinate_median,
        definition=reference.coordinate_median,
        oracle=oracle.coordinate_median,
        arguments={"updates": Kind.STACKED, "where": Kind.WHERE},
        variants=((), ("where",)),
        differentiable=("updates",),
        out_dtype=True,
        order_statistic=True,
        withstands_overflow=True,
    ),
    Row(
        "trimmed_mean",
        call=ff.trimmed_mean,
        definition=reference.trimmed_mean,
        oracle=oracle.trimmed_mean,
        arguments={"updates": Kind.STACKED, "trim_count": Kind.TRIM, "where": Kind.WHERE},
        variants=((), ("where",), ("trim_count",), ("trim_count", "where")),
        differentiable=("updates",),
        out_dtype=True,
        order_statistic=True,
        withstands_overflow=True,
    ),
    Row(
        "client_dots",
        call=client_dots,
        definition=reference.client_dots,
        oracle=in_float64("client_dots", oracle.client_dots),
        arguments={"updates": Kind.STACKED, "others": Kind.STACKED, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("updates", "others"),
        differentiable=("updates", "others"),
        public=False,
        coordinate_wise=False,
        collectives=("all-reduce",),
    ),
    Row(
        "client_dots",
        label="shared_dots",
        call=functools.partial(client_dots, shared=True),
        definition=functools.partial(reference.client_dots, shared=True),
        oracle=functools.partial(in_float64("client_dots", oracle.client_dots), shared=True),
        arguments={"updates": Kind.STACKED, "others": Kind.TOTAL, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("updates", "others"),
        differentiable=("updates", "others"),
        public=False,
        coordinate_wise=False,
        collectives=("all-reduce",),
    ),
    Row(
        "selected_mean",
        call=selected_mean,
        definition=reference.selected_mean,
        oracle=oracle.selected_mean,
        arguments={"updates": Kind.STACKED, "values": Kind.STACKED, "trim_count": Kind.TRIM, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("values",),
        differentiable=("values",),
        public=False,
    ),
    Row(
        "spread_to_selected",
        call=spread_to_selected,
        definition=reference.spread_to_selected,
        oracle=oracle.spread_to_selected,
        arguments={"updates": Kind.STACKED, "cotangents": Kind.TOTAL, "trim_count": Kind.TRIM, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("cotangents",),
        differentiable=("cotangents",),
        public=False,
        withstands_overflow=True,
    ),
    Row(
        "client_norms",
        call=client_norms,
        definition=reference.client_norms,
        oracle=in_float64("client_norms", oracle.client_norms),
        arguments={"updates": Kind.STACKED, "where": Kind.WHERE},
        variants=((), ("where",)),
        differentiable=("updates",),
        public=False,
        coordinate_wise=False,
        withstands_overflow=True,
        collectives=("all-reduce",),
    ),
    Row(
        "clipped_weighted_sum",
        call=functools.partial(ff.clipped_weighted_sum, return_norms=True),
        definition=functools.partial(reference.clipped_weighted_sum, return_norms=True),
        oracle=functools.partial(in_float64("clipped_weighted_sum", oracle.clipped_weighted_sum), return_norms=True),
        arguments={"updates": Kind.STACKED, "weights": Kind.WEIGHTS, "max_norm": Kind.BOUND, "where": Kind.WHERE},
        variants=((), ("where",)),
        differentiable=("updates", "weights", "max_norm"),
        coordinate_wise=False,
        withstands_overflow=True,
        collectives=("all-reduce",),
    ),
    Row(
        "noisy_weighted_sum",
        call=ff.noisy_weighted_sum,
        definition=reference.noisy_weighted_sum,
        oracle=oracle.noisy_weighted_sum,
        arguments={
            "key": Kind.KEY,
            "updates": Kind.STACKED,
            "weights": Kind.WEIGHTS,
            "stddev": Kind.SCALAR,
            "where": Kind.WHERE,
        },
        variants=((), ("where",)),
        differentiable=("updates", "weights", "stddev"),
        random=True,
        coordinate_wise=False,
    ),
    Row(
        "clipped_noisy_weighted_sum",
        call=ff.clipped_noisy_weighted_sum,
        definition=reference.clipped_noisy_weighted_sum,
        oracle=in_float64("clipped_noisy_weighted_sum", oracle.clipped_noisy_weighted_sum),
        arguments={
            "key": Kind.KEY,
            "updates": Kind.STACKED,
            "weights": Kind.WEIGHTS,
            "max_norm": Kind.BOUND,
            "stddev": Kind.SCALAR,
            "where": Kind.WHERE,
        },
        variants=((), ("where",)),
        differentiable=("updates", "weights", "max_norm", "stddev"),
        random=True,
        coordinate_wise=False,
        withstands_overflow=True,
        collectives=("all-reduce",),
    ),
    server_row("fedavgm_weighted_update", "learning_rate", "momentum"),
    server_row("fedadagrad_weighted_update", "learning_rate", "b1", "tau"),
    server_row("fedadam_weighted_update", "learning_rate", "b1", "b2", "tau"),
    server_row("fedyogi_weighted_update", "learning_rate", "b1", "b2", "tau"),
    Row(
        "mean_around_median",
        call=_as_many_bad(ff.mean_around_median),
        definition=_as_many_bad(reference.mean_around_median),
        oracle=_as_many_bad(oracle.mean_around_median),
        arguments={"updates": Kind.STACKED, "where": Kind.WHERE},
        variants=((), ("where",)),
        differentiable=("updates",),
        out_dtype=True,
        order_statistic=True,
        withstands_overflow=True,
    ),
    Row(
        "selected_mean",
        label="mean_nearest_median",
        call=mean_nearest_median,
        definition=_as_many_bad(functools.partial(reference.selected_mean, around_median=True), "trim_count"),
        oracle=_as_many_bad(functools.partial(oracle.selected_mean, choose=oracle.nearest_median), "trim_count"),
        arguments={"updates": Kind.STACKED, "values": Kind.STACKED, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("values",),
        differentiable=("values",),
        public=False,
    ),
    Row(
        "spread_to_selected",
        label="spread_nearest_median",
        call=spread_nearest_median,
        definition=_as_many_bad(functools.partial(reference.spread_to_selected, around_median=True), "trim_count"),
        oracle=_as_many_bad(functools.partial(oracle.spread_to_selected, choose=oracle.nearest_median), "trim_count"),
        arguments={"updates": Kind.STACKED, "cotangents": Kind.TOTAL, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("cotangents",),
        differentiable=("cotangents",),
        public=False,
        withstands_overflow=True,
    ),
    Row(
        "pairwise_squared_distances",
        call=ff.pairwise_squared_distances,
        definition=reference.pairwise_squared_distances,
        oracle=in_float64("pairwise_squared_distances", oracle.pairwise_squared_distances),
        arguments={"updates": Kind.STACKED},
        differentiable=("updates",),
        coordinate_wise=False,
        withstands_overflow=True,
        collectives=("all-reduce",),
    ),
    Row(  # the distances of absent clients are infinite, and finite differences of these make no sense
        "pairwise_squared_distances",
        label="distances_of_some",
        call=ff.pairwise_squared_distances,
        definition=reference.pairwise_squared_distances,
        oracle=in_float64("pairwise_squared_distances", oracle.pairwise_squared_distances),
        arguments={"updates": Kind.STACKED, "where": Kind.WHERE},
        coordinate_wise=False,
        withstands_overflow=True,
        collectives=("all-reduce",),
    ),
    Row(
        "pairwise_squared_distances",
        label="difference_dots",
        call=difference_dots,
        definition=reference.difference_dots,
        oracle=in_float64("pairwise_squared_distances", oracle.difference_dots),
        arguments={"updates": Kind.STACKED, "others": Kind.STACKED, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("updates", "others"),
        differentiable=("updates", "others"),
        public=False,
        coordinate_wise=False,
        collectives=("all-reduce",),
    ),
    Row(
        "mix_clients",
        call=mix_clients,
        definition=reference.mix_clients,
        oracle=oracle.mix_clients,
        arguments={"updates": Kind.STACKED, "mixing": Kind.MIXING},
        linear=("updates", "mixing"),
        differentiable=("updates", "mixing"),
        public=False,
    ),
    Row(
        "step_toward_clients",
        call=step_toward_clients,
        definition=reference.step_toward_clients,
        oracle=in_float64("step_toward_clients", oracle.step_toward_clients),
        arguments={"updates": Kind.STACKED, "center": Kind.TOTAL, "weights": Kind.WEIGHTS, "where": Kind.WHERE},
        variants=((), ("where",)),
        differentiable=("updates", "center", "weights"),
        public=False,
        coordinate_wise=False,
        collectives=("all-reduce",),
    ),
    Row(
        "topk_sparse_weighted_sum",
        call=functools.partial(ff.topk_sparse_weighted_sum, num_params=NUM_PARAMS),
        definition=functools.partial(reference.topk_sparse_weighted_sum, num_params=NUM_PARAMS),
        oracle=functools.partial(oracle.topk_sparse_weighted_sum, num_params=NUM_PARAMS),
        arguments={"values": Kind.ENTRIES, "indices": Kind.INDICES, "weights": Kind.WEIGHTS, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("values", "weights"),
        differentiable=("values", "weights"),
        takes_trees=False,
    ),
    Row(
        "sparse_spread",
        call=sparse_spread,
        definition=reference.sparse_spread,
        oracle=oracle.sparse_spread,
        arguments={"indices": Kind.INDICES, "weights": Kind.WEIGHTS, "vector": Kind.VECTOR, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("weights", "vector"),
        differentiable=("weights", "vector"),
        public=False,
        takes_trees=False,
    ),
    Row(
        "sparse_dots",
        call=sparse_dots,
        definition=reference.sparse_dots,
        oracle=oracle.sparse_dots,
        arguments={"values": Kind.ENTRIES, "indices": Kind.INDICES, "vector": Kind.VECTOR, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("values", "vector"),
        differentiable=("values", "vector"),
        public=False,
        takes_trees=False,
    ),
    Row(
        "quantized_weighted_sum",
        call=ff.quantized_weighted_sum,
        definition=reference.quantized_weighted_sum,
        oracle=oracle.quantized_weighted_sum,
        arguments={
            "codes": Kind.CODES,
            "scales": Kind.FACTORS,
            "zero_points": Kind.FACTORS,
            "weights": Kind.WEIGHTS,
            "where": Kind.WHERE,
        },
        variants=((), ("where",)),
        linear=("scales", "weights"),
        differentiable=("scales", "zero_points", "weights"),
        takes_trees=False,
    ),
    Row(
        "quantized_weighted_sum",
        label="quantized_weighted_sum_4_bits",
        call=functools.partial(ff.quantized_weighted_sum, num_bits=4),
        definition=functools.partial(reference.quantized_weighted_sum, num_bits=4),
        oracle=functools.partial(oracle.quantized_weighted_sum, num_bits=4),
        arguments={
            "codes": Kind.CODES,
            "scales": Kind.FACTORS,
            "zero_points": Kind.FACTORS,
            "weights": Kind.WEIGHTS,
            "where": Kind.WHERE,
        },
        variants=(("where",),),
        linear=("scales", "weights"),
        differentiable=("scales", "zero_points", "weights"),
        takes_trees=False,
    ),
    Row(
        "quantized_dots",
        call=quantized_dots,
        definition=reference.quantized_dots,
        oracle=oracle.quantized_dots,
        arguments={"codes": Kind.LEVELS, "zero_points": Kind.FACTORS, "vector": Kind.SHORT_VECTOR, "where": Kind.WHERE},
        variants=((), ("where",)),
        linear=("vector",),
        differentiable=("zero_points", "vector"),
        public=False,
        takes_trees=False,
    ),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row and the arguments given, in a fixed order, so that transformations may count them."""

    row: Row
    variant: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.row.arguments if name not in self.row.optional or name in self.variant)

    def __str__(self) -> str:
        return "-".join((self.row.label or self.row.operation, *self.variant))

    def call(self, *values: Any, **options: Any) -> Any:
        return self.row.call(**dict(zip(self.names, values, strict=True)), **options)

    def definition(self, *values: Any, **options: Any) -> Any:
        return self.row.definition(**dict(zip(self.names, values, strict=True)), **options)

    def expect(self, *values: Any, **options: Any) -> Any:
        return self.row.oracle(**dict(zip(self.names, values, strict=True)), **options)

    def check(self, got: Any, values: Any, **options: Any) -> None:
        oracle.assert_matches(got, self.expect(*values, **options), str(self))

    def sample(self, problem: Problem) -> tuple[Any, ...]:
        """The arguments, in NumPy."""
        return tuple(sample(self.row.arguments[name], name, problem, self) for name in self.names)

    def split(self, values: Any, wanted: tuple[str, ...]) -> tuple[tuple[Any, ...], Callable[..., Any]]:
        """The wanted arguments, and a function that puts others in their place."""
        positions = [self.names.index(name) for name in wanted]

        def with_these(*replacements: Any) -> list[Any]:
            merged = list(values)
            for position, replacement in zip(positions, replacements, strict=True):
                merged[position] = replacement
            return merged

        return tuple(values[position] for position in positions), with_these

    @property
    def differentiable(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name in self.row.differentiable)


CASES = [Case(row, variant) for row in ROWS for variant in row.variants]


def has_kernel(operation: str) -> bool:
    return _native.has_kernel(operation, "cpu")


def all_kernels_built() -> bool:
    return all(map(has_kernel, _core.OPERATIONS))


# --- Sampling ---------------------------------------------------------------------------------------------------

DTYPES = ("float32", "bfloat16", "float16", "float64")
MIXED = ("float32", "bfloat16", "float16")
USUAL = (("kernel", (4, 3)), ("bias", ()), ("empty", (0,)))


@dataclasses.dataclass(frozen=True)
class Problem:
    """How large, of which dtype, and what kind of numbers."""

    n_clients: int = 5
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = USUAL
    dtype: str = "float32"  # or "mixed"
    values: str = "normal"  # or "apart": no two close; "tied": few different; "wild": NaN and inf; "huge"
    seed: int = 0

    def dtype_of(self, leaf: int) -> np.dtype:
        return jnp.dtype(MIXED[leaf % len(MIXED)] if self.dtype == "mixed" else self.dtype)


def one_array(*shape: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return (("x", shape),)


def numbers(kind: str, generator: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Numbers of the asked for kind along the first axis, the clients'."""
    normal = generator.standard_normal(shape)
    if kind == "apart":  # by .6 at least, in every coordinate: a finite difference changes no order
        ranks = np.broadcast_to(np.arange(shape[0]).reshape((-1,) + (1,) * (len(shape) - 1)), shape)
        return (generator.permuted(ranks, axis=0) - shape[0] / 2 + 0.2 * np.tanh(normal)).astype(dtype)
    if kind == "tied":
        return generator.integers(-1, 3, shape).astype(dtype) * np.where(normal < 0, -1, 1).astype(dtype)
    if kind == "wild":
        specials = np.array([np.nan, np.copysign(np.nan, -1), np.inf, -np.inf, 0.0, -0.0])
        return np.where(generator.random(shape) < 0.4, generator.choice(specials, shape), normal).astype(dtype)
    if kind == "huge":
        return (np.sign(normal) * float(jnp.finfo(dtype).max) * generator.uniform(0.6, 1, shape)).astype(dtype)
    return normal.astype(dtype)


def participation(generator: np.random.Generator, n_clients: int) -> np.ndarray:
    """About two thirds take part; one at least, and not everybody if there are several."""
    where = generator.random(n_clients) < 0.7
    order = generator.permutation(n_clients)
    where[order[: max(1, n_clients // 2)]] = True
    where[order[-1]] &= n_clients == 1
    return where


def sample(kind: Kind, name: str, problem: Problem, case: Case) -> Any:
    """One argument. The same name and problem give the same numbers."""
    generator = np.random.default_rng([problem.seed, *name.encode()])
    n_clients = problem.n_clients
    accumulator = oracle.accumulator_of(*(np.empty(0, problem.dtype_of(i)) for i in range(len(problem.shapes))))
    if kind is Kind.WEIGHTS:  # every fourth one negative
        signs = np.where(np.arange(n_clients) % 4 == 3, -1, 1)
        return (signs * generator.uniform(0.5, 2, n_clients)).astype(accumulator)
    if kind is Kind.MIXING:  # one row more than there are clients, and a third of the coefficients 0
        coefficients = generator.uniform(-1, 1, (n_clients + 1, n_clients))
        return np.where(generator.random(coefficients.shape) < 1 / 3, 0, coefficients).astype(accumulator)
    if kind is Kind.WHERE:
        return participation(generator, n_clients)
    if kind is Kind.TRIM:
        where_generator = np.random.default_rng([problem.seed, *b"where"])
        present = participation(where_generator, n_clients).sum() if "where" in case.names else n_clients
        return np.int32(min(1, (present - 1) // 2))
    if kind is Kind.SCALAR:
        return accumulator(generator.uniform(0.5, 2))
    if kind is Kind.BOUND:
        return accumulator(generator.uniform(2, 5))
    if kind is Kind.KEY:
        return generator.integers(0, 2**32, 2, np.uint32)
    if kind is Kind.RATES:
        return generator.uniform(0.1, 0.9, 4).astype(accumulator)
    if kind is Kind.STATE:
        usual = dataclasses.replace(problem, values="normal")
        first, second = (sample(Kind.TOTAL, f"{name} {moment}", usual, case) for moment in ("first", "second"))
        return ff.ServerState(np.int32(problem.seed), first, jax.tree.map(lambda x: x * x + x.dtype.type(0.5), second))
    if kind is Kind.CLIENTS:
        stacked = sample(Kind.STACKED, name, problem, case)
        return [jax.tree.map(lambda leaf, i=i: leaf[i, ...], stacked) for i in range(n_clients)]
    size = sum(int(np.prod(shape)) for _, shape in problem.shapes)
    dtype = problem.dtype_of(0)
    if kind is Kind.ENTRIES:
        return numbers(problem.values, generator, (n_clients, size), dtype)
    if kind is Kind.FACTORS:
        return numbers(problem.values, generator, (n_clients,), dtype)
    if kind in (Kind.VECTOR, Kind.SHORT_VECTOR):
        length = NUM_PARAMS if kind is Kind.VECTOR else NUM_LEVELS
        return numbers(problem.values, generator, (1, length), accumulator)[0]
    if kind is Kind.INDICES:
        indices = generator.integers(-NUM_PARAMS // 20, NUM_PARAMS + NUM_PARAMS // 20, (n_clients, size), np.int32)
        indices[::2] = np.sort(indices[::2])
        return indices
    if kind is Kind.CODES:
        return generator.integers(0, 256, (n_clients, size), np.uint8)
    if kind is Kind.LEVELS:
        return generator.integers(0, 8, (n_clients, NUM_LEVELS), np.uint8)
    tree = {}
    for leaf, (leaf_name, shape) in enumerate(problem.shapes):
        dtype = problem.dtype_of(leaf)
        if kind is Kind.TOTAL:
            dtype = np.dtype(oracle.accumulator_of(np.empty(0, dtype)))
        if kind is Kind.STACKED:
            tree[leaf_name] = numbers(problem.values, generator, (n_clients, *shape), dtype)
        else:
            tree[leaf_name] = numbers(problem.values, generator, (1, *shape), dtype)[0]
    return tree


def to_jax(values: Any) -> Any:
    return jax.tree.map(jnp.asarray, values)
