"""Plants faults, one at a time, and asks whether the tests notice.

    python tools/mutants.py                     all of them
    python tools/mutants.py --layer python      without a compiler
    python tools/mutants.py --only 3 17         some of them, by number
    python tools/mutants.py --check             only whether every fault still finds its place
    python tools/mutants.py --trust             where the tests are known to pass without a fault

Each fault is a small text substitution in a copy of the tree, in which kernels are rebuilt where C++ changed (with
little optimisation: the faults are logical) and the tests that should notice are run until the first one does. Before,
they must have passed without the fault. The exit status is 1 if a fault survives, or finds its place no longer.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("fedfuse_jax", "ffi", "tests", "benchmarks", "tools", "CMakeLists.txt", "pyproject.toml")
TIMEOUT = 900  # seconds a fault may keep the tests busy: an endless loop counts as caught

LINEAR, ORDER = "linear", "order statistics"
PRIVATE, SERVER = "private", "server optimizers"
BYZANTINE, ADAPTERS, COMPRESSED = "byzantine", "adapters", "compressed"
LAUNCHES, THREADS, MEMORY = "launches", "threads", "memory"

# Which tests to ask: pytest's own words.
DEFINITIONS = ("tests/test_reference.py", "-k", "definitions or anything or scipy or 28 or trim_counts")
LINEAR_BATTERY = ("tests/test_battery.py", "-k", "(weighted or norms or finite_clients or stack or dots)")
ORDER_SIZES = ("tests/test_order_statistics.py",)
NETWORKS = ("tests/test_networks.py",)
NATIVE = ("tests/test_export.py", "-k", "too_small")
GEOMETRY = ("tests/test_cuda_build.py", "-k", "geometry")
SHARED_WORK = ("tests/test_executor.py",)
HUGE_PAGES = ("tests/test_pages.py",)
ERRORS = ("tests/test_errors.py",)
SENSITIVITY = ("tests/test_private.py", "-k", "one_client or lone or float64 or bound")
NOISE = ("tests/test_private.py", "-k", "noise or keys or adds_nothing or counters or generators")
ADAPTIVE = ("tests/test_private.py", "-k", "adaptive or finds")
ROUNDS = ("tests/test_server.py",)
FEDJAX_RULES, COMPAT = ("tests/test_fedjax_robust.py",), ("tests/test_compat.py",)
COMPAT_OPTIMIZERS = ("tests/test_compat_optimizers.py",)
FEDJAX_PRIVATE, FEDJAX_SERVER = ("tests/test_fedjax_private.py",), ("tests/test_fedjax_server.py",)


def sharding(*words: str) -> tuple[str, ...]:
    """Sharding tests of some operations."""
    return ("tests/test_sharding.py", "-k", " and ".join(words))


def properties(words: str) -> tuple[str, ...]:
    """Tests of what the robust rules promise."""
    return ("tests/test_robust_properties.py", "-k", words)


def battery(*words: str) -> tuple[str, ...]:
    """Battery tests of some names."""
    return ("tests/test_battery.py", "-k", " and ".join(words))


def compressed(word: str) -> tuple[str, ...]:
    """Tests of compressed updates that have a word in their names."""
    return ("tests/test_compressed.py", "-k", word)


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault: what is written in which file, what is to stand there instead, and why that is wrong."""

    family: str
    file: str
    original: str
    mutated: str
    why: str
    tests: tuple[str, ...]
    without_kernels: bool = False  # the definitions are to be tested through the public functions

    @property
    def compiled(self) -> bool:
        """Whether it takes a compiler."""
        return self.file.startswith("ffi/")


CORE_OPERATION = "fedfuse_jax/_core/operation.py"
CORE_REDUCTIONS = "fedfuse_jax/_core/reductions.py"
CORE_SHARDING = "fedfuse_jax/_core/sharding.py"
CENTERS_PRIMITIVES = "fedfuse_jax/_primitives/centers.py"
DISTANCES_PRIMITIVES = "fedfuse_jax/_primitives/distances.py"
LINEAR_PRIMITIVES = "fedfuse_jax/_primitives/linear.py"
NORMS_PRIMITIVES = "fedfuse_jax/_primitives/norms.py"
ORDER_STATISTICS_PRIMITIVES = "fedfuse_jax/_primitives/order_statistics.py"
PRIVATE_PRIMITIVES = "fedfuse_jax/_primitives/private.py"
QUANTIZED_PRIMITIVES = "fedfuse_jax/_primitives/quantized.py"
SERVER_PRIMITIVES = "fedfuse_jax/_primitives/server.py"
STREAMING_PRIMITIVES = "fedfuse_jax/_primitives/streaming.py"
CENTERS_OPERATIONS = "fedfuse_jax/centers.py"
DISTANCES_OPERATIONS = "fedfuse_jax/distances.py"
MIXING_OPERATIONS = "fedfuse_jax/mixing.py"
ORDER_STATISTICS_OPERATIONS = "fedfuse_jax/order_statistics.py"
CENTERS_DEFINITIONS = "fedfuse_jax/reference/centers.py"
COMMON_DEFINITIONS = "fedfuse_jax/reference/common.py"
DISTANCES_DEFINITIONS = "fedfuse_jax/reference/distances.py"
LINEAR_DEFINITIONS = "fedfuse_jax/reference/linear.py"
NORMS_DEFINITIONS = "fedfuse_jax/reference/norms.py"
ORDER_STATISTICS_DEFINITIONS = "fedfuse_jax/reference/order_statistics.py"
PRIVATE_DEFINITIONS = "fedfuse_jax/reference/private.py"
QUANTIZED_DEFINITIONS = "fedfuse_jax/reference/quantized.py"
ROTATION_DEFINITIONS = "fedfuse_jax/reference/rotation.py"
SERVER_DEFINITIONS = "fedfuse_jax/reference/server.py"
SPARSE_DEFINITIONS = "fedfuse_jax/reference/sparse.py"
STREAMING_DEFINITIONS = "fedfuse_jax/reference/streaming.py"
SELECTION_OPERATIONS = "fedfuse_jax/selection.py"
SERVER_OPERATIONS = "fedfuse_jax/server.py"
SPARSE_OPERATIONS = "fedfuse_jax/sparse.py"
LINEAR_KERNEL, LINEAR_TILES = "ffi/cpu/kernels/linear.cc", "ffi/cpu/linear.cc"
REDUCTIONS, STREAMING, READER = "ffi/cpu/reductions.cc", "ffi/cpu/streaming.cc", "ffi/contract/reader.cc"
ORDER_KERNEL, ORDER_TILES = "ffi/cpu/kernels/order_statistics_impl.h", "ffi/cpu/order_statistics.cc"
RADIX, NETWORK_TILE = "ffi/cpu/kernels/radix_select.h", "ffi/cpu/kernels/network_tile.h"
COMPRESSED_CONTRACT = "ffi/contract/compressed.cc"
COMPRESSED_TILES, CODES_KERNEL = "ffi/cpu/compressed.cc", "ffi/cpu/kernels/quantized.cc"
KEYS, GENERATOR = "ffi/math/ordered_keys.h", "ffi/math/networks.py"
PRIVATE_TILES, NOISE_KERNEL = "ffi/cpu/private.cc", "ffi/cpu/kernels/noise.cc"
CLIPPING, THREEFRY, NORMAL = "ffi/math/clipping.h", "ffi/math/threefry.h", "ffi/math/normal.h"
SERVER_TILES, SERVER_RULES = "ffi/cpu/server.cc", "ffi/math/server_rules.h"
EXECUTOR, TILES, SWEEPS = "ffi/cpu/executor.cc", "ffi/cpu/tiles.h", "ffi/cpu/kernels/sweeps.h"
FEDJAX_MEAN, FEDJAX_OPTIMIZERS = "fedfuse_jax/fedjax/private.py", "fedfuse_jax/fedjax/server_optimizers.py"
PRE_AGGREGATORS, STACKING = "fedfuse_jax/fedjax/pre_aggregators.py", "fedfuse_jax/fedjax/_stacking.py"
SELECTION, FLOWER = "fedfuse_jax/compat/_selection.py", "fedfuse_jax/compat/flower/aggregators.py"
FLOWER_SERVER, FORMS = "fedfuse_jax/compat/flower/optimizers.py", "fedfuse_jax/compat/flower/_forms.py"
BYZFL = "fedfuse_jax/compat/byzfl/aggregators.py"
LAUNCH, PAGES = "ffi/cuda/launch.h", "ffi/cpu/pages.cc"

MUTANTS = (
    # --- Linear operations: definitions -------------------------------------------------------------------------
    Mutant(LINEAR, LINEAR_DEFINITIONS, "terms = leaf.astype(dtype) * over_parameters(weights.astype(dtype), leaf)",
           "terms = (leaf * over_parameters(weights.astype(leaf.dtype), leaf)).astype(dtype)",
           "multiplies in the leaf's low precision", battery("dtypes", "weighted"), without_kernels=True),
    Mutant(LINEAR, LINEAR_DEFINITIONS, "terms = jnp.where(over_parameters(where, leaf), terms, 0)",
           "terms = terms * over_parameters(where, leaf)",
           "an absent client's NaN times zero is NaN", battery("(where_may or no_trace)"), without_kernels=True),
    Mutant(LINEAR, LINEAR_DEFINITIONS,
           "return jnp.sum(terms, axis=0).astype", "return jnp.sum(terms[:-1], axis=0).astype",
           "forgets the last client", DEFINITIONS),
    Mutant(LINEAR, LINEAR_DEFINITIONS, "jnp.sum(weights if where is None else jnp.where(where, weights, 0))",
           "jnp.sum(weights)", "divides by the weights of the absent too", DEFINITIONS),
    Mutant(LINEAR, COMMON_DEFINITIONS, "values[..., whole:]]", "values[..., whole + 1 :]]",
           "the pairwise sum drops a coordinate", battery("odd_sizes", "norms"), without_kernels=True),
    Mutant(LINEAR, LINEAR_DEFINITIONS, "return dots if where is None else jnp.where(where, dots, 0)", "return dots",
           "an absent client keeps its norm", DEFINITIONS),
    Mutant(LINEAR, NORMS_DEFINITIONS, "jnp.all(jnp.isfinite(leaf)", "jnp.all(~jnp.isnan(leaf)",
           "infinity passes for finite", DEFINITIONS),
    Mutant(LINEAR, NORMS_DEFINITIONS,
           "return jnp.all(jnp.stack(finite), axis=0)", "return jnp.any(jnp.stack(finite), axis=0)",
           "one good leaf excuses the others", DEFINITIONS),
    Mutant(LINEAR, STREAMING_DEFINITIONS, "weight.astype(leaf.dtype) * new.astype(leaf.dtype)",
           "(weight.astype(new.dtype) * new).astype(leaf.dtype)",
           "multiplies in the update's low precision", battery("dtypes", "accumulate"), without_kernels=True),
    Mutant(LINEAR, STREAMING_DEFINITIONS, "jnp.stack(leaves), *updates", "jnp.stack(leaves[::-1]), *updates",
           "stacks the clients backwards", DEFINITIONS),
    # --- Linear operations: rules -------------------------------------------------------------------------------
    Mutant(LINEAR, LINEAR_PRIMITIVES, "value = (value - drift)", "value = (value + drift)",
           "the quotient rule's wrong sign", battery("deriv", "weighted_mean")),
    Mutant(LINEAR, LINEAR_PRIMITIVES, "scale = weights / _masked(weights, where).sum(-1, keepdims=True)",
           "scale = weights / weights.sum(-1, keepdims=True)",
           "the mean's gradient divides by absent clients' weights", battery("(deriv or gradient)", "weighted_mean")),
    Mutant(LINEAR, LINEAR_DEFINITIONS, "products = jnp.where(over_parameters(where, stacked), products, 0)",
           "products = jnp.where(over_parameters(where, stacked), products, products)",
           "an absent client has a gradient", battery("absent", "weighted"), without_kernels=True),
    Mutant(LINEAR, NORMS_PRIMITIVES,
           "return [2 * dots]", "return [dots]", "half the derivative", battery("deriv", "norms")),
    Mutant(LINEAR, LINEAR_PRIMITIVES, '"weights": cotangent, "where": where}', '"weights": cotangent, "where": None}',
           "absent clients add to a shared operand's gradient", battery("(deriv or absent)", "shared_dots")),
    Mutant(LINEAR, STREAMING_PRIMITIVES, 'if tangents["weight"] is not None:', "if False:",
           "no derivative by the streaming weight", battery("deriv", "accumulate")),
    Mutant(LINEAR, LINEAR_PRIMITIVES, "sums, _masked(operands[\"weights\"], operands[\"where\"]).sum(-1)), names)",
           "sums, operands[\"weights\"].sum(-1)), names)",
           "sharded clients: absent ones weigh in", sharding("test_jit", "weighted_mean", "clients")),
    Mutant(LINEAR, CORE_SHARDING, "[jnp.where(counts(), reduction.summand(x), 0) for x in part]",
           "[reduction.summand(x) for x in part]",
           "a replicated leaf counts once a device", sharding("test_jit", "norms", "differently")),
    Mutant(LINEAR, CORE_OPERATION, "cotangent = jnp.sum(cotangent, axis=shared, keepdims=True)",
           "cotangent = jnp.mean(cotangent, axis=shared, keepdims=True)",
           "the gradient of what vmap shares is averaged", battery("gradient_of_a_vmap")),
    Mutant(LINEAR, CORE_OPERATION, "jnp.moveaxis(x, dim, 0)", "jnp.moveaxis(x, 0, dim)",
           "moves the wrong axis to the front", battery("test_vmap")),
    # --- Order statistics: definitions --------------------------------------------------------------------------
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS, "num_keys=2, is_stable=True", "num_keys=1, is_stable=True",
           "sorts by participation alone", DEFINITIONS),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS,
           "(~presence(where, leaf.shape[0]), leaf)", "(presence(where, leaf.shape[0]), leaf)",
           "the absent come first", DEFINITIONS),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS, "0, num_present - 2 * trim_count)", "0, num_present - trim_count)",
           "trims one end only", DEFINITIONS),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS,
           "(ranks >= first) &", "(ranks > first) &", "off by one rank", DEFINITIONS),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS, "jnp.where(trim_count < 0, 0,", "jnp.where(trim_count < -9, 0,",
           "a negative trim makes up clients", DEFINITIONS),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS, "return jnp.where(jnp.isfinite(mean), mean, scaled)",
           "return mean", "the mean of two great values overflows", DEFINITIONS),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS, "jnp.maximum(num_kept, 1).astype(dtype), jnp.nan)",
           "jnp.maximum(num_kept, 1).astype(dtype), 0)", "nobody's mean is zero", DEFINITIONS),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS, "jnp.sum(jnp.where(selected, values.astype(dtype), 0), axis=0)",
           "jnp.sum(jnp.where(selected, values, 0), axis=0).astype(dtype)", "adds up in the leaf's low precision",
           battery("dtypes", "(median or trimmed)"), without_kernels=True),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS,
           "int(trim_fraction * m)", "int(np.float32(trim_fraction) * np.float32(m))",
           "0.29 of 100 clients is 29 in float32", DEFINITIONS),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS, "return (num_present - 1) // 2", "return num_present // 2 - 1",
           "an odd count's median is a mean of three", DEFINITIONS),
    Mutant(ORDER, ORDER_STATISTICS_DEFINITIONS,
           "share = cotangent.astype(dtype) / jnp.maximum(num_kept, 1).astype(dtype)",
           "share = cotangent.astype(dtype)", "every kept client gets the whole cotangent", DEFINITIONS),
    # --- Order statistics: rules --------------------------------------------------------------------------------
    Mutant(ORDER, ORDER_STATISTICS_OPERATIONS, "counts[jnp.sum(where, dtype=jnp.int32)]", "counts[n_clients]",
           "a fraction of all clients, not of those who take part", ("tests/test_reference.py", "-k", "participants")),
    Mutant(ORDER, ORDER_STATISTICS_PRIMITIVES,
           'operands["where"],\n            "trim_count"', 'None,\n            "trim_count"',
           "derivatives forget who takes part", battery("absent", "(median or trimmed)")),
    Mutant(ORDER, ORDER_STATISTICS_OPERATIONS, "reference.median_trim_count(jnp.sum(where, dtype=jnp.int32))",
           "reference.median_trim_count(n_clients)", "the middle of all, not of those who take part",
           battery("where_may", "median")),
    Mutant(ORDER, ORDER_STATISTICS_OPERATIONS,
           "isinstance(n_clients, int) and 2 * k >=", "isinstance(n_clients, int) and 2 * k >",
           "a trim that leaves nobody is not refused", (*ERRORS, "-k", "trims")),
    Mutant(ORDER, ORDER_STATISTICS_PRIMITIVES, "return trim if trim_count is None else trim_count", "return trim",
           "the definition ignores a traced trim", battery("eager", "trimmed"), without_kernels=True),
    Mutant(ORDER, ORDER_STATISTICS_PRIMITIVES, 'definition=_order_definition,\n        whole_axes=("clients",),',
           "definition=_order_definition,", "every device takes the median of its own clients",
           sharding("test_jit", "median", "clients")),
    Mutant(ORDER, CORE_OPERATION,
           "mlir.register_lowering(self._inner, functools.partial(lower_kernel, self), platform=platform)", "pass",
           "kernels are never called", ("tests/test_compiled_text.py", "-k", "one_call_for")),
    # --- Linear operations: kernels -----------------------------------------------------------------------------
    Mutant(LINEAR, LINEAR_KERNEL, "add_product(&sum, weights[row], widened(rows[row] + column))",
           "add_product(&sum, weights[0], widened(rows[row] + column))",
           "every row of a sweep has the first one's weight", battery("odd_sizes", "weighted")),
    Mutant(LINEAR, LINEAR_KERNEL, "if (!is_first) sum = load_accumulators(out + column);", "",
           "each sweep starts anew", battery("(odd_sizes or many_clients)", "weighted")),
    Mutant(LINEAR, SWEEPS, "row += count;", "row += kMost;", "leaves out rows between two sweeps",
           battery("(odd_sizes or many_clients)", "weighted")),
    Mutant(LINEAR, LINEAR_KERNEL, "totals[row] = sums[row].total();", "totals[row] = sums[0].total();",
           "every row has the first one's squares", battery("(odd_sizes or many_clients)", "squared_norms")),
    Mutant(LINEAR, TILES, "std::min(columns_[leaf], coordinates_[leaf] - begin)", "columns_[leaf]",
           "the last tile of a leaf reaches into the next row", battery("odd_sizes", "weighted")),
    Mutant(LINEAR, LINEAR_KERNEL, "is_first ? 0 : rest", "0", "the last columns forget earlier rows",
           battery("odd_sizes", "weighted")),
    Mutant(LINEAR, LINEAR_KERNEL, "if (num_rows == 0)", "if (num_rows < 0)", "nobody's sum is whatever was there",
           battery("where_may", "weighted")),
    Mutant(LINEAR, LINEAR_KERNEL, "out[column] /= by", "out[column] *= by", "multiplies by the total weight",
           battery("eager", "weighted_mean")),
    Mutant(LINEAR, LINEAR_KERNEL, "doubles(a.parts[part], half) *", "doubles(a.parts[part], 0) *",
           "the upper half of a vector is squared as the lower", battery("odd_sizes", "norms")),
    Mutant(LINEAR, LINEAR_KERNEL, "Tail(row + column, columns - column)", "Tail(row + column, columns - column - 1)",
           "the last coordinate may be NaN", battery("not_finite", "finite_clients")),
    Mutant(LINEAR, LINEAR_TILES, "if (!is_present(problem.where,", "if (is_present(problem.where,",
           "the weights of the wrong clients", battery("eager", "weighted")),
    Mutant(LINEAR, LINEAR_TILES, "total += weight", "total = weight", "divides by the last weight",
           battery("eager", "weighted_mean")),
    Mutant(LINEAR, REDUCTIONS, "is_present(problem.where, shape, tile.batch, client)",
           "is_present(problem.where, shape, 0, client)", "all of a batch share one participation",
           battery("vmap", "norms")),
    Mutant(LINEAR, REDUCTIONS, "shared_is_widened = problem.shared", "shared_is_widened = true",
           "all clients' low-precision operands are the first one's", battery("dtypes", "dots")),
    Mutant(LINEAR, REDUCTIONS, "if (problem.squares)", "if (updates.data == others.data)",
           "takes one buffer twice for squares", battery("one_array")),
    Mutant(LINEAR, REDUCTIONS, "double sum = 0;", "float sum = 0;", "adds up blocks in single precision",
           ("tests/test_reference.py", "-k", "digits")),
    Mutant(LINEAR, STREAMING, "tile_data(problem.clients[client][tile.leaf], problem.shape, tile)",
           "tile_data(problem.clients[piece.first_client][tile.leaf], problem.shape, tile)",
           "stacks one client several times", battery("eager", "stack")),
    Mutant(LINEAR, TILES, "std::min(clients_of(whole.columns), clients_ - first_client)", "1",
           "rows behind the first of a piece are never written", battery("eager", "stack")),
    Mutant(LINEAR, TILES, "within / pieces_of_row * clients_of(whole.columns)", "within / pieces_of_row",
           "pieces of several rows overlap", battery("rows_cut", "stack")),
    Mutant(LINEAR, READER, "own != 1 && own != size", "own > size", "accepts a batch that is too small", NATIVE),
    # --- Order statistics: kernels ------------------------------------------------------------------------------
    Mutant(ORDER, ORDER_TILES, "(static_cast<std::int64_t>(num_rows)) < 1",
           "(static_cast<std::int64_t>(num_rows)) < -9",
           "a trim that leaves nobody is carried out", (*ERRORS, "-k", "leaves_nobody")),
    Mutant(ORDER, ORDER_TILES, "ranks.trim < 0 || rows.size() <", "ranks.trim < 0 && rows.size() <",
           "an absent client's gradient is whatever was there",
           battery("(absent or eager or where)", "(median or spread)")),
    Mutant(ORDER, ORDER_TILES, "std::numeric_limits<float>::quiet_NaN()", "0.0f", "a silent zero model",
           battery("where_may", "median")),
    Mutant(ORDER, ORDER_KERNEL, "skip -= bits_as<Lane>(key_of_rank(rank) == low)", "skip = Vector<Lane>{}",
           "ties at the lower end are all kept", battery("ties", "(spread or selected)")),
    Mutant(ORDER, ORDER_KERNEL, "to_take[group + i] = first_ranks[i] + count -",
           "to_take[group + i] = first_ranks[i] + count - 1 -",
           "one who ties at the upper end is lost", ("tests/test_order_statistics.py", "-k", "follow")),
    Mutant(ORDER, ORDER_KERNEL, "sums[vector][part] / static_cast<Accumulator>(count)", "sums[vector][part]",
           "a sum of tangents instead of their mean", battery("eager", "selected_mean")),
    Mutant(ORDER, ORDER_KERNEL, "return tiles_[column / kColumns % places_]", "return tiles_[0]",
           "the tile at work is overwritten by the next one", (*ORDER_SIZES, "-k", "apart")),
    Mutant(ORDER, ORDER_KERNEL, "copies_->take_after(tile_, copied_, row)",
           "copies_->take_after(tile_, copied_ + 1, row)", "rows of the next tile are left out",
           (*ORDER_SIZES, "-k", "apart")),
    Mutant(ORDER, NETWORK_TILE, "const int rows = (vector + 1) *", "const int rows = vector *",
           "a network's last vector has no rows of the next tile copied", (*ORDER_SIZES, "-k", "apart")),
    Mutant(ORDER, RADIX, "remaining >= zeros", "remaining > zeros", "off by one rank at every bit", ORDER_SIZES),
    Mutant(ORDER, RADIX, "(std::uint32_t{1} << rest) - 1", "(std::uint32_t{1} << rest) - 2",
           "a row of the last block is no candidate", ORDER_SIZES),
    Mutant(ORDER, RADIX, "result->below[column] = below[lane];", "result->below[column] = below[lane] + 1;",
           "counts one too many below", ORDER_SIZES),
    Mutant(ORDER, NETWORK_TILE, "num_rows - 2 * trim <= 2", "num_rows - 2 * trim <= 3",
           "three kept values from a network of two", ORDER_SIZES),
    Mutant(ORDER, NETWORK_TILE, "input < low_pads_ ? low_pad_ : high_pad_", "low_pad_",
           "all pads below: every rank shifts", ORDER_SIZES),
    Mutant(ORDER, KEYS, "static constexpr Integer kNegativeInfinity = -0x7f800001;",
           "static constexpr Integer kNegativeInfinity = -0x7fc00001;", "some negative NaNs count as the least value",
           battery("not_finite", "median")),
    Mutant(ORDER, GENERATOR, "larger, smaller[distance:]", "larger[1:], smaller[distance:]",
           "comparators between the wrong wires", NETWORKS),
    Mutant(ORDER, GENERATOR, "wants[low] = wants[high] = Want.VALUE", "wants[low] = Want.VALUE",
           "prunes what is needed", NETWORKS),
    # --- Private sums: definitions ------------------------------------------------------------------------------
    Mutant(PRIVATE, PRIVATE_DEFINITIONS, "kept = jnp.isfinite(norms) & presence(where, norms.shape[0])",
           "kept = presence(where, norms.shape[0])", "a client of NaN takes all with it", SENSITIVITY,
           without_kernels=True),
    Mutant(PRIVATE, NORMS_DEFINITIONS, "leaf = leaf.astype(dtype).reshape(leaf.shape[0], math.prod(leaf.shape[1:]))\n"
           "        return leaf if where is None else jnp.where(where[:, None], leaf, 0)",
           "return leaf.astype(dtype).reshape(leaf.shape[0], math.prod(leaf.shape[1:]))",
           "an absent client has a norm", battery("(where or absent)", "client_norms"), without_kernels=True),
    Mutant(PRIVATE, NORMS_DEFINITIONS, "exponent = jnp.clip(jnp.frexp(largest)[1] - 1,",
           "exponent = jnp.clip(0 * jnp.frexp(largest)[1],",
           "squares overflow", SENSITIVITY, without_kernels=True),
    Mutant(PRIVATE, PRIVATE_DEFINITIONS, "coefficients = or_nan(max_norm >= 0, coefficients)", "",
           "a negative bound turns the update round", SENSITIVITY, without_kernels=True),
    Mutant(PRIVATE, PRIVATE_DEFINITIONS, "return [key] if num_leaves == 1 else", "return",
           "a tree of one leaf splits its key", NOISE),
    Mutant(PRIVATE, PRIVATE_DEFINITIONS, "(norms <= clip_norm) & present", "(norms < clip_norm) & present",
           "a norm that just fits is clipped", ADAPTIVE),
    Mutant(PRIVATE, PRIVATE_DEFINITIONS, "count / jnp.maximum(num_present, 1)", "count / norms.shape[0]",
           "a share of all, not of those who take part", ADAPTIVE),
    Mutant(PRIVATE, PRIVATE_DEFINITIONS, "jnp.exp(-learning_rate * (share - target_quantile))",
           "jnp.exp(learning_rate * (share - target_quantile))", "the bound runs away", ADAPTIVE),
    # --- Private sums: rules ------------------------------------------------------------------------------------
    Mutant(PRIVATE, PRIVATE_PRIMITIVES, '"stddev": jnp.where(first, operands["stddev"], 0)}',
           '"stddev": operands["stddev"]}', "every device of clients adds noise", NOISE),
    Mutant(PRIVATE, PRIVATE_PRIMITIVES, "origin = origin * np.uint32(own)", "origin = origin * np.uint32(0)",
           "every device makes the first one's noise", NOISE),
    Mutant(PRIVATE, PRIVATE_PRIMITIVES, "may_merge = not names", "may_merge = True", "a sharded axis counts as whole",
           NOISE),
    Mutant(PRIVATE, PRIVATE_PRIMITIVES, "for part, of_factor in ((norm_slope, -factor / safe_norms),",
           "for part, of_factor in ((norm_slope, factor / safe_norms),", "the clip factor's derivative, wrong sign",
           battery("deriv", "clipped_weighted")),
    Mutant(PRIVATE, PRIVATE_PRIMITIVES, "where = finite if where is None else finite & where", "",
           "a NaN client's gradient is NaN", ("tests/test_private.py", "-k", "spoils")),
    Mutant(PRIVATE, PRIVATE_PRIMITIVES, "if clip and parameters and \"given_norms\" not in optional:",
           "if False:", "every device clips by its own norm", sharding("test_jit", "clipped_weighted")),
    Mutant(PRIVATE, CORE_REDUCTIONS, "jnp.where(large, norms / scale, 0) ** 2", "jnp.where(large, norms, 0) ** 2",
           "devices add squares that overflow", ("tests/test_private.py", "-k", "sharded_norms")),
    # --- Private sums: kernels ----------------------------------------------------------------------------------
    Mutant(PRIVATE, PRIVATE_TILES, "if (clip.kept == 0) continue;", "", "a client of NaN takes all with it",
           SENSITIVITY),
    Mutant(PRIVATE, PRIVATE_TILES, "kernels.scale(copy, &scales[row], count, copy);", "",
           "a huge client is 2^64 times too long", SENSITIVITY),
    Mutant(PRIVATE, PRIVATE_TILES, "*partial = sum_scaled_squares(", "sum_scaled_squares(",
           "a float64 norm overflows", SENSITIVITY),
    Mutant(PRIVATE, PRIVATE_TILES, "+ 2 * tile.leaf;", ";", "all leaves have the first one's key", NOISE),
    Mutant(PRIVATE, PRIVATE_TILES, "run - index % run", "run", "runs of a block go on too long",
           ("tests/test_private.py", "-k", "own_coordinates")),
    Mutant(PRIVATE, CLIPPING, "if (!(root - root == 0)) return {0, 0, 0};", "", "an infinite norm is clipped to NaN",
           SENSITIVITY),
    Mutant(PRIVATE, CLIPPING, "if (shift > 0 || (shift == 0 && root_fraction <= bound_fraction)) return {1, 0, 1};", "",
           "short updates are made longer", SENSITIVITY),
    Mutant(PRIVATE, THREEFRY, "threefry_group<17, 29, 16, 24>(x0, x1, k[2], k[0] + 2u);",
           "threefry_group<17, 29, 16, 23>(x0, x1, k[2], k[0] + 2u);", "another generator", NOISE),
    Mutant(PRIVATE, NOISE_KERNEL, "generate(key, lanes, counter + column, &normals);",
           "generate(key, lanes, counter, &normals);", "the same few normals again and again", NOISE),
    Mutant(PRIVATE, NORMAL, "p = is_tail ? q : p;", "", "the tails are cut off", NOISE),
    Mutant(PRIVATE, NORMAL, "(bits >> 9) | 0x3f800000u", "(bits & 0x007fffffu) | 0x3f800000u",
           "other bits of the word", NOISE),
    # --- Sharing work among threads -----------------------------------------------------------------------------
    Mutant(THREADS, EXECUTOR, "ranges[thread].end = work.tasks * (thread + 1) / threads;",
           "ranges[thread].end = work.tasks * (thread + 1) / threads + 1;", "neighbours both do a task", SHARED_WORK),
    Mutant(THREADS, EXECUTOR, "ranges[thread].end = work.tasks * (thread + 1) / threads;",
           "ranges[thread].end = work.tasks / threads * (thread + 1);", "what is left over is forgotten", SHARED_WORK),
    Mutant(THREADS, EXECUTOR, "range = 0; range < ranges; ++range", "range = 0; range + 1 < ranges; ++range",
           "a thread that comes late leaves its tasks to nobody", SHARED_WORK),
    Mutant(THREADS, EXECUTOR, "(thread + range) % ranges", "range", "all threads begin with the same tasks",
           SHARED_WORK),
    Mutant(THREADS, EXECUTOR, "if (!failed_) error = attempt([&] { stage.work.run(task); });",
           "error = attempt([&] { stage.work.run(task); });", "tasks go on after a failure", SHARED_WORK),
    Mutant(THREADS, EXECUTOR, "if (stage.work.finish && !failed_)", "if (stage.work.finish)",
           "what failed is finished all the same", SHARED_WORK),
    Mutant(THREADS, EXECUTOR, "        begin(index + 1);\n", "        if (!failed_) begin(index + 1);\n",
           "after a failure the next stage is waited for in vain", SHARED_WORK),
    Mutant(THREADS, EXECUTOR, "if (stage > 0) wait_for(stage);", "", "sums begin before norms are known", SHARED_WORK),
    # --- Memory -------------------------------------------------------------------------------------------------
    Mutant(MEMORY, PAGES, "span.begin < spans->back().end + kPage", "span.begin <= spans->back().end + kPage",
           "somebody else's page counts as ours", HUGE_PAGES),
    Mutant(MEMORY, PAGES, "std::max(spans->back().end, span.end)", "span.end",
           "a result without elements cuts off the one it lies in", HUGE_PAGES),
    Mutant(MEMORY, PAGES, "(span.begin + kHugePage - 1) / kHugePage * kHugePage", "span.begin / kHugePage * kHugePage",
           "the first page begins before the results", HUGE_PAGES),
    Mutant(MEMORY, PAGES, "return a.begin < b.begin;", "return false;",
           "neighbours are only found in the order of the leaves", HUGE_PAGES),
    Mutant(MEMORY, PAGES, "there < kSmallPages / 2", "there < kSmallPages", "pages nearly there are made anew",
           HUGE_PAGES),
    Mutant(MEMORY, PAGES, "for (const Span& begun : begun_pages(span)) advise(begun, kCollapse);", "",
           "the allocator's few bytes keep huge pages away", HUGE_PAGES),
    Mutant(MEMORY, PAGES, "threads > kMostThreadsToWait || ", "", "many threads wait for one", HUGE_PAGES),
    # --- Server optimizers --------------------------------------------------------------------------------------
    Mutant(SERVER, SERVER_DEFINITIONS, "first = b1 * first + delta\n", "first = b1 * first + (1 - b1) * delta\n",
           "momentum with damping", battery("eager", "fedavgm"), without_kernels=True),
    Mutant(SERVER, SERVER_DEFINITIONS, "jnp.sqrt(jnp.where(nothing, 1, second))) + tau",
           "jnp.sqrt(jnp.where(nothing, 1, second + tau)))", "tau under the root",
           battery("eager", "fedadam"), without_kernels=True),
    Mutant(SERVER, SERVER_DEFINITIONS,
           "jnp.sign(second - square)", "jnp.sign(square - second)", "Yogi the wrong way round",
           battery("eager", "fedyogi"), without_kernels=True),
    Mutant(SERVER, SERVER_DEFINITIONS, 'first = b1 * first + (1 - b1) * delta', 'first = b1 * first + delta',
           "Adam without damping", battery("eager", "fedadam"), without_kernels=True),
    Mutant(SERVER, SERVER_DEFINITIONS, "for x in jax.tree.leaves(stepped)]", "for x in jax.tree.leaves(stepped)[:1]]",
           "only the first leaf is asked", ROUNDS, without_kernels=True),
    Mutant(SERVER, SERVER_DEFINITIONS, "type(state)(next_step(state.step, good)", "type(state)(state.step + 1",
           "a bad round counts", ROUNDS, without_kernels=True),
    Mutant(SERVER, SERVER_PRIMITIVES, "good = over_parameters(bad) == 0", "good = bad == 0",
           "a device does not hear of the others", ROUNDS),
    Mutant(SERVER, SERVER_PRIMITIVES, "for x, instead in harmless]", "for x, _ in harmless]",
           "a bad round's gradient is NaN", ROUNDS),
    Mutant(SERVER, SERVER_PRIMITIVES, "fits = fits & (jnp.abs(moment) <= most_of_moments)", "pass",
           "no device sees a square overflow", ROUNDS),
    Mutant(SERVER, SERVER_DEFINITIONS, "step = jnp.where(stays, 0, learning_rate",
           "step = (learning_rate", "0 / 0 in the definition",
           ROUNDS, without_kernels=True),
    Mutant(SERVER, SERVER_DEFINITIONS, "jnp.sqrt(jnp.where(nothing, 1, second))", "jnp.sqrt(second)",
           "a gradient at nothing is NaN", ROUNDS, without_kernels=True),
    Mutant(SERVER, SERVER_OPERATIONS, "like(root * root)", "like(root)", "the second moment starts from tau",
           ("tests/test_server.py", "-k", "paper")),
    Mutant(SERVER, SERVER_TILES, "if (!somebody) problem.accepted[batch] = 0;", "", "a round of nobody counts",
           ("tests/test_battery.py", "-k", "no_coordinates and fedadam or where_may and fedadam")),
    Mutant(SERVER, SERVER_TILES, "if (!fine) __atomic_store_n(accepted, 0, __ATOMIC_RELAXED);",
           "static_cast<void>(fine);", "NaN goes into the model", ROUNDS),
    Mutant(SERVER, SERVER_TILES, "if (problem->accepted[tile.batch] == 0) {", "if (problem->accepted[0] == 0) {",
           "all of a batch share the first one's fate", ("tests/test_server.py", "-k", "judged")),
    Mutant(SERVER, SERVER_TILES, "next_step(*old, problem.accepted[batch])", "next_step(*old, 1)",
           "a bad round counts", ROUNDS),
    Mutant(SERVER, SERVER_TILES, "if (from != to) std::memcpy(to, from, tile.columns * bytes_of(old.type));",
           "static_cast<void>(from != to);", "a result with memory of its own misses a bad round",
           ("tests/test_server.py", "-k", "their_own")),
    Mutant(SERVER, SERVER_TILES, "problem->shape, tile);\n    } else {", "problem->shape, tile);\n    } if (true) {",
           "a bad round is stepped after all", ROUNDS),
    Mutant(SERVER, SERVER_RULES, "rates.b2 * second + (1 - rates.b2) * square", "rates.b2 * (second + square)",
           "Adam's second moment is off", battery("eager", "fedadam")),
    Mutant(SERVER, SERVER_RULES, "second > square ? second - step : second < square ? second + step",
           "second > square ? second - step : second < square ? second - step", "Yogi never grows",
           battery("eager", "fedyogi")),
    Mutant(SERVER, SERVER_TILES, "return static_cast<Real>(65520);", "return static_cast<Real>(65536);",
           "a parameter overflows as it is rounded", ROUNDS),
    Mutant(SERVER, SERVER_RULES, "divisor == 0 ? 0 : rates", "divisor < 0 ? 0 : rates", "0 / 0", ROUNDS),
    Mutant(SERVER, SERVER_RULES, " & (updated.second - updated.second == 0)", "", "an infinite moment passes", ROUNDS),
    Mutant(SERVER, SERVER_RULES, "square_root(second) + rates.tau;", "square_root(second + rates.tau);",
           "tau under the root", battery("eager", "fedadagrad")),
    # --- Byzantine-robust rules: definitions --------------------------------------------------------------------
    Mutant(BYZANTINE, ORDER_STATISTICS_DEFINITIONS, "slides = _sum_is_less(lost, gained, a[None], b[None]) | reached",
           "slides = _sum_is_less(lost, gained, a[None], b[None])", "an infinite median keeps what is finite",
           properties("every_allowed or infinite_median"), without_kernels=True),
    Mutant(BYZANTINE, ORDER_STATISTICS_DEFINITIONS,
           "return (left < right) | ((left == right) & (left_rest < right_rest))",
           "return left < right", "a sum that rounds alike ties", properties("nearly_tie"), without_kernels=True),
    Mutant(BYZANTINE, DISTANCES_DEFINITIONS, "squares = jnp.where(jnp.isnan(squares), jnp.inf, squares)", "pass",
           "NaN for a distance", properties("far_from_everyone"), without_kernels=True),
    Mutant(BYZANTINE, CENTERS_DEFINITIONS,
           "weighted_sum(touched(steps, weights), weights", "weighted_sum(steps, weights",
           "a client of weight 0 is touched", properties("bad_clients"), without_kernels=True),
    # --- Byzantine-robust rules: rules --------------------------------------------------------------------------
    Mutant(BYZANTINE, SELECTION_OPERATIONS, "dtype=jnp.int32) - num_byzantine - 2",
           "dtype=jnp.int32) - num_byzantine - 1",
           "one neighbour more than the paper's", properties("every_allowed and krum")),
    Mutant(BYZANTINE, DISTANCES_OPERATIONS, "& ~jnp.eye(n_clients, dtype=bool)\n    return jnp.where(pairs & ~",
           "\n    return jnp.where(pairs & ~", "a client is its own neighbour", properties("every_allowed and krum")),
    Mutant(BYZANTINE, SELECTION_OPERATIONS, "return jnp.isfinite(scores) & (ranks < wanted)", "return (ranks < wanted)",
           "a client of infinite score is chosen", properties("never_chosen")),
    Mutant(BYZANTINE, SELECTION_OPERATIONS, "(step < num_present - 2 * f)", "(step <= num_present - 2 * f)",
           "one pick too many", properties("bulyan and where_is")),
    Mutant(BYZANTINE, SELECTION_OPERATIONS, "return left & ~picked", "return left", "the same client is picked again",
           properties("every_allowed and bulyan")),
    Mutant(BYZANTINE, MIXING_OPERATIONS, "to_all = jnp.where(itself, -1,", "to_all = jnp.where(itself, 0,",
           "a duplicate comes before itself", properties("duplicates")),
    Mutant(BYZANTINE, MIXING_OPERATIONS, "shuffled[jnp.argsort(~active[shuffled], stable=True)]", "shuffled",
           "absent clients take room in buckets", properties("buckets_of_those")),
    Mutant(BYZANTINE, DISTANCES_PRIMITIVES,
           "diagonal - cotangent}", "cotangent - diagonal}", "the gradient's wrong sign",
           battery("deriv", "distances")),
    Mutant(BYZANTINE, CENTERS_OPERATIONS, "shares = jnp.where(clipped,", "shares = jnp.where(finite,",
           "differences within the radius are stretched to it", properties("every_allowed and clipping")),
    Mutant(BYZANTINE, CENTERS_OPERATIONS, "shares = reference.or_nan(limit >= 0, shares)", "pass",
           "a traced radius of NaN clips nobody", properties("traced_radius")),
    Mutant(BYZANTINE, CENTERS_PRIMITIVES, "jnp.where(counts(), distances, 0)", "distances",
           "a replicated leaf counts once a device", sharding("test_jit", "step_toward", "differently")),
    Mutant(BYZANTINE, CENTERS_PRIMITIVES, "products -= dots(own_tangents",
           "products -= 0 * dots(own_tangents", "distances from a point that does not move",
           battery("deriv", "step_toward")),
    # --- Byzantine-robust rules: kernels ------------------------------------------------------------------------
    Mutant(BYZANTINE, "ffi/math/around_median.h", "(left < right) |", "(left <= right) |", "of two as near the greater",
           battery("ties", "mean_around_median")),
    Mutant(BYZANTINE, ORDER_KERNEL, "const Sum half = overflows ?", "const Sum half = false ? ",
           "the sum of two great values overflows", battery("overflow", "mean_around_median")),
    Mutant(BYZANTINE, "ffi/cpu/distances.cc", "if (coefficient == 0) continue;", "", "zero times NaN",
           battery("not_finite", "mix_clients")),
    Mutant(BYZANTINE, "ffi/cpu/distances.cc", "segment < problem.segments; ++segment) {\n          sum",
           "segment < 1; ++segment) {\n          sum", "the first segment alone",
           battery("run_after_run", "distances")),
    Mutant(BYZANTINE, "ffi/cpu/distances.cc", "  second += first;\n", "", "groups of clients meet the wrong ones",
           ("tests/test_robust_properties.py", "-k", "every_group")),
    Mutant(BYZANTINE, LINEAR_KERNEL, "if (column < end) {\n        add(end - column);", "if (column < end) {",
           "the last columns are dropped", battery("odd_sizes", "distances")),
    # --- Adapters -----------------------------------------------------------------------------------------------
    Mutant(ADAPTERS, PRE_AGGREGATORS, "return mixed, _finite(updates, where), state", "return mixed, where, state",
           "rows of nobody take part after mixing", FEDJAX_RULES),
    Mutant(ADAPTERS, PRE_AGGREGATORS, "bucket_size < num_clients, later", "bucket_size < num_clients, key",
           "the same buckets in every round", FEDJAX_RULES),
    Mutant(ADAPTERS, PRE_AGGREGATORS, "return finite if where is None else finite & where", "return finite",
           "rows of nobody come back after a second pre-aggregator", FEDJAX_RULES),
    Mutant(ADAPTERS, "fedfuse_jax/fedjax/order_statistics.py",
           "trim_count = jnp.maximum(trim_count - jnp.sum(~where, dtype=jnp.int32), 0)", "pass",
           "whoever has been found out is trimmed once more", FEDJAX_RULES),
    Mutant(ADAPTERS, "fedfuse_jax/fedjax/robust.py",
           "jnp.zeros(leaf.shape[1:], leaf.dtype)", "jnp.ones(leaf.shape[1:], leaf.dtype)",
           "centered clipping begins at 1", FEDJAX_RULES),
    Mutant(ADAPTERS, STACKING, "return _with_dtypes_of(result, updates), (*after, state)",
           "return _with_dtypes_of(result, updates), (*before, state)",
           "pre-aggregators forget their states", FEDJAX_RULES),
    Mutant(ADAPTERS, FEDJAX_MEAN, "return mean, later", "return mean, rng",
           "the same noise in every round", FEDJAX_PRIVATE),
    Mutant(ADAPTERS, FEDJAX_MEAN, "noise_multiplier * max_norm * weight", "noise_multiplier * max_norm",
           "noise of a sum on a mean", FEDJAX_PRIVATE),
    Mutant(ADAPTERS, FEDJAX_MEAN, "num_clients if expected_clients is None else expected_clients", "num_clients",
           "the divisor tells how many came", FEDJAX_PRIVATE),
    Mutant(ADAPTERS, FEDJAX_OPTIMIZERS, "return _mirrored(state), params", "return state, params",
           "momentum turns round in every round", FEDJAX_SERVER),
    Mutant(ADAPTERS, FEDJAX_OPTIMIZERS, "-jnp.asarray(scalars[", "jnp.asarray(scalars[",
           "ascends", FEDJAX_SERVER),
    Mutant(ADAPTERS, FEDJAX_OPTIMIZERS, "_descend(deltas, weights, opt_state", "_descend(deltas, None, opt_state",
           "forgets the numbers of examples", FEDJAX_SERVER),
    Mutant(ADAPTERS, "fedfuse_jax/fedjax/averaging.py", "if aggregator is None and isinstance(server_optimizer",
           "if isinstance(server_optimizer", "leaves the aggregator out", FEDJAX_SERVER),
    Mutant(ADAPTERS, SELECTION, "jnp.where(jnp.isfinite(scores), weights, jnp.nan)", "weights",
           "too many bad clients, and no NaN", COMPAT),
    Mutant(ADAPTERS, BYZFL, "neighbor_scores(vectors, self.f, n - self.f - 1)",
           "neighbor_scores(vectors, self.f, 1)", "one neighbour", COMPAT),
    Mutant(ADAPTERS, BYZFL, "reshape(num_subsets, f)[::-1]", "reshape(num_subsets, f)",
           "of several subsets the last, not the first", COMPAT),
    Mutant(ADAPTERS, "fedfuse_jax/compat/byzfl/preaggregators.py",
           "int(2 * self.f / n * (n - self.f)) - 1]", "int(2 * self.f / n * (n - self.f))]",
           "clips to the least norm that is clipped", COMPAT),
    Mutant(ADAPTERS, FLOWER, "neighbor_scores(updates, f, max(1, n - f - 2))",
           "neighbor_scores(updates, f, n - f - 2)", "no neighbour where Flower has one", COMPAT),
    Mutant(ADAPTERS, FLOWER, "where = lowest(*self._scores_and_count(updates))\n        return",
           "where = None\n        return",
           "Bulyan without a selection", COMPAT),
    Mutant(ADAPTERS, FLOWER, "return weighted_mean(updates, num_examples)", "return weighted_mean(updates)",
           "FedAvg counts everybody alike", COMPAT),
    Mutant(ADAPTERS, FORMS, "np.asarray(array).astype(other.dtype)", "np.asarray(array)",
           "lists of arrays come back in float32", COMPAT_OPTIMIZERS),
    Mutant(ADAPTERS, FLOWER_SERVER, "_of_host(init_server_state(params, tau=0.0))",
           "_of_host(init_server_state(params))",
           "the paper's second moment, not Flower's", COMPAT_OPTIMIZERS),
    Mutant(ADAPTERS, FLOWER_SERVER, "jnp.expm1((step + 2)", "jnp.expm1((step + 1)",
           "Adam's own bias correction, not Flower's", COMPAT_OPTIMIZERS),
    Mutant(ADAPTERS, FLOWER_SERVER, "-jnp.expm1((step + 2) * jnp.log(beta))", "1 - beta ** (step + 2)",
           "the bias correction cancels", COMPAT_OPTIMIZERS),
    Mutant(ADAPTERS, FLOWER_SERVER, "weighted_mean(sent.arrays, num_examples)", "weighted_mean(sent.arrays)",
           "a server optimizer counts everybody alike", COMPAT_OPTIMIZERS),
    Mutant(ADAPTERS, FLOWER_SERVER, "[(mean - param)[None] for", "[mean[None] for",
           "models are taken for differences", COMPAT_OPTIMIZERS),
    Mutant(ADAPTERS, FLOWER_SERVER, "if isinstance(models, list) and not models:", "if False:",
           "a round without replies is an error", COMPAT_OPTIMIZERS),
    Mutant(ADAPTERS, FLOWER_SERVER, "(params, state, delta, learning_rate=self.eta, **betas, tau=self.tau)",
           "(params, state, delta, learning_rate=self.eta, **betas)", "FedYogi's tau is not used", COMPAT_OPTIMIZERS),
    Mutant(ADAPTERS, "fedfuse_jax/_checks.py", "if array.shape[1:] != param.shape:", "if False:",
           "models of another shape are spread over the parameters", COMPAT_OPTIMIZERS),
    # --- Compressed updates: definitions ------------------------------------------------------------------------
    Mutant(COMPRESSED, SPARSE_DEFINITIONS,
           "targets = jnp.where(_heard(indices, num_params, where), indices, num_params)",
           "targets = indices", "a negative index counts from the end", DEFINITIONS),
    Mutant(COMPRESSED, SPARSE_DEFINITIONS,
           "return inside if where is None else inside & where[:, None]", "return inside",
           "absent clients' entries are added", DEFINITIONS),
    Mutant(COMPRESSED, QUANTIZED_DEFINITIONS, "halves = [codes & 15, codes >> 4]", "halves = [codes >> 4, codes & 15]",
           "the high half comes first", DEFINITIONS),
    Mutant(COMPRESSED, SPARSE_DEFINITIONS, "lax.stop_gradient(jnp.abs(or_nan(~jnp.isnan(flat), flat)))",
           "lax.stop_gradient(jnp.abs(jnp.nan_to_num(flat)))", "NaN is the least magnitude", compressed("topk")),
    Mutant(COMPRESSED, SPARSE_DEFINITIONS, "return flat[chosen], chosen, unravel(flat.at[chosen].set(0))",
           "return flat[chosen], chosen, unravel(flat)", "what was sent is sent again", compressed("topk")),
    Mutant(COMPRESSED, QUANTIZED_DEFINITIONS, "scales = (greatest / 2 - least / 2) / (top / 2)",
           "scales = (greatest - least) / top",
           "the range of a block overflows", compressed("beyond")),
    Mutant(COMPRESSED, QUANTIZED_DEFINITIONS, "scales = or_nan(finite, safe)", "scales = safe",
           "NaN becomes a silent zero", compressed("poisons")),
    Mutant(COMPRESSED, QUANTIZED_DEFINITIONS,
           "< positions - below)", "< 0.5)", "rounds at random, but not without bias",
           compressed("unbiased")),
    Mutant(COMPRESSED, ROTATION_DEFINITIONS, "return result / math.sqrt(size)", "return result",
           "the rotation stretches", compressed("rotation")),
    # --- Compressed updates: rules ------------------------------------------------------------------------------
    Mutant(COMPRESSED, SPARSE_OPERATIONS, "array = np.where((array >= 0) & (array < num_params), array, -1)",
           "array = np.asarray(array)", "64-bit indices are cut to other indices", compressed("integer_dtype")),
    Mutant(COMPRESSED, QUANTIZED_PRIMITIVES, "drift = _over_coordinates(-drifts.sum(-2)",
           "drift = _over_coordinates(drifts.sum(-2)", "the zero points' derivative has the wrong sign",
           compressed("derivatives")),
    Mutant(COMPRESSED, QUANTIZED_PRIMITIVES, "return present(functools.reduce(jnp.multiply, map(present, factors)))",
           "return functools.reduce(jnp.multiply, map(present, factors))",
           "a NaN cotangent reaches an absent client", battery("absent", "quantized")),
    Mutant(COMPRESSED, CORE_SHARDING, "return [lax.psum(part, names) if names else part for", "return [part for",
           "sharded clients are not summed", sharding("test_jit", "quantized")),
    # --- Compressed updates: kernels ----------------------------------------------------------------------------
    Mutant(COMPRESSED, COMPRESSED_TILES, "descents |= indices[i] > indices[i + 1];",
           "descents |= indices[i] > indices[i + 1] + 1;", "takes rows for sorted that are not",
           compressed("sparse_sum_of_many")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "const std::int64_t last = std::min(first + kStretch, count - 1);",
           "const std::int64_t last = std::min(first + kStretch, count - 2);", "does not look at the last index",
           compressed("last_index")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "if (index < *previous || index >= end) return false;",
           "if (index >= end) return false;", "takes rows for sorted that are not, while it adds them",
           compressed("almost_sorted")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "if (stretch.next != stretch.stop) in_order_ = false;", "(void)stretch;",
           "forgets what lies behind an index that is too great", compressed("almost_sorted")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "(piece == 0 && !is_sorted(indices, start)) ||", "",
           "overlooks entries among those before the first coordinate", compressed("almost_sorted")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "(piece + 1 == pieces_ && !is_sorted(indices + stop, shape.entries - stop))",
           "false", "overlooks entries among those beyond the last coordinate", compressed("almost_sorted")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "return static_cast<std::uint32_t>(index) < end;", "return index < 1 << 30;",
           "an index out of range is not ignored", compressed("sparse_sum_of_many")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "static_cast<std::uint32_t>(indices[i]) - origin < count;",
           "static_cast<std::uint32_t>(indices[i]) - origin < count - 1;", "nobody picks a range's last coordinate",
           compressed("sparse_sum_of_many")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "end = begin_of(first_tile + tiles_of_pick_);",
           "end = begin_of(first_tile + 1);", "picks for its first tile only",
           compressed("sparse_sum_of_many")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "const bool counts = present && indices[i] >= 0",
           "const bool counts = indices[i] >= 0", "an absent client has a gradient", battery("absent", "topk")),
    Mutant(COMPRESSED, COMPRESSED_TILES, "(block + 1) * shape.block_size) - begin;",
           "(block + 1) * shape.block_size + 1) - begin;", "a block takes its neighbour's first coordinate",
           compressed("every_layout")),
    Mutant(COMPRESSED, CODES_KERNEL, "return kSigned ? (halves ^ 8) - 8 : halves;", "return halves;",
           "signed halves lose their sign", compressed("every_layout")),
    Mutant(COMPRESSED, CODES_KERNEL, "if (kPacked && begin % 2 != 0 && columns > 0) {\n      sweep_some",
           "if (false) {\n      sweep_some", "a block that begins in the middle of a byte is off by one",
           compressed("every_layout")),
    Mutant(COMPRESSED, COMPRESSED_CONTRACT, "shape.bytes == (needed + per_byte - 1) / per_byte", "shape.bytes > 0",
           "codes that are too short are read past their end",
           ("tests/test_export.py", "-k", "too_few")),
    # --- Launches on a GPU --------------------------------------------------------------------------------------
    Mutant(LAUNCHES, LAUNCH, "std::copy_n(leaves, this->num_leaves, few.leaves)", "std::copy_n(leaves, 1, few.leaves)",
           "a small table has one leaf only", GEOMETRY),
    Mutant(LAUNCHES, LAUNCH, "if (p->num_leaves == P::kCapacity ||", "if (p->num_leaves > P::kCapacity ||",
           "a table takes a leaf too many", GEOMETRY),
    Mutant(LAUNCHES, LAUNCH, "|| p->tiles > std::numeric_limits<std::uint32_t>::max())", ")",
           "a table has more tiles than it can number", GEOMETRY),
    Mutant(LAUNCHES, LAUNCH, "p.leaves[middle].first_tile) <= index)", "p.leaves[middle].first_tile) < index)",
           "a leaf's first tile is looked for in the leaf before", GEOMETRY),
    Mutant(LAUNCHES, LAUNCH, "if ((mapped >> axis & 1u) != 0) {", "if ((mapped >> (axis + 1) & 1u) != 0) {",
           "looks whether another axis is mapped", GEOMETRY),
    Mutant(LAUNCHES, LAUNCH, "if (shape.coordinates[leaf] == 0 || !belongs(leaf))", "if (!belongs(leaf))",
           "an empty leaf takes a place in a table", GEOMETRY),
)  # fmt: skip


# --- Planting and asking ----------------------------------------------------------------------------------------


def places(mutant: Mutant, tree: Path) -> int:
    """How often the fault's original text stands in its file; it should be once."""
    return (tree / mutant.file).read_text().count(mutant.original)


def copy_tree(into: Path) -> None:
    """The parts of the repository that tests and build need; kernels that are there already come along."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, into / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        elif source.exists():
            shutil.copy2(source, into / name)


def build(tree: Path, directory: Path) -> subprocess.CompletedProcess[str]:
    """Builds the CPU module into the tree; the second time, only what changed."""
    if not (directory / "CMakeCache.txt").exists():
        configure = ["cmake", "-S", tree, "-B", directory, f"-DPython_EXECUTABLE={sys.executable}",
                     "-DCMAKE_BUILD_TYPE=Mutants", "-DCMAKE_CXX_FLAGS=-O1 -DNDEBUG"]  # fmt: skip
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        done = subprocess.run(configure, capture_output=True, text=True)
        if done.returncode:
            return done
    jobs = str(os.cpu_count() or 1)
    done = subprocess.run(["cmake", "--build", directory, "-j", jobs], capture_output=True, text=True)
    for module in directory.glob("_cpu*.so"):
        # Not over the old one, which the tests may have mapped.
        (tree / "fedfuse_jax" / module.name).unlink(missing_ok=True)
        shutil.copy2(module, tree / "fedfuse_jax" / module.name)
    return done


def run_tests(mutant: Mutant, tree: Path) -> str:
    """``caught``, ``survived``, or what went wrong with the asking itself."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    if mutant.without_kernels:
        environment["FEDFUSE_DISABLE_KERNELS"] = "1"
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:doctest",
               "-o", "addopts=", *mutant.tests]  # fmt: skip
    asked = False
    for tier in ("not full", "full"):  # what the quick tier lets pass must be caught by the full one
        try:
            done = subprocess.run(
                [*command, "-m", tier], cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return "caught"
        # 1: a test failed. Below 0: the process died of a signal. 5: this tier has none of the tests.
        if done.returncode == 1 or done.returncode < 0:
            return "caught"
        if done.returncode not in (0, 5):
            return f"not asked: {done.stdout[-300:]}"
        asked = asked or done.returncode == 0
    return "survived" if asked else f"not asked: {done.stdout[-300:]}"


def broken_tests(mutants: list[Mutant], tree: Path) -> list[str]:
    """The selections of tests that do not pass as things are, and so would catch anything."""
    selections = {(mutant.tests, mutant.without_kernels): mutant for mutant in mutants}
    return [" ".join(mutant.tests) for mutant in selections.values() if run_tests(mutant, tree) != "survived"]


def ask(mutant: Mutant, tree: Path, build_directory: Path) -> str:
    """Plants the fault, asks, and takes it out again."""
    path = tree / mutant.file
    original = path.read_text()
    if original.count(mutant.original) != 1:
        return f"its place is there {original.count(mutant.original)} times"
    path.write_text(original.replace(mutant.original, mutant.mutated))
    try:
        needs_build = mutant.compiled and mutant.tests != NETWORKS
        if needs_build and build(tree, build_directory).returncode:
            return "does not compile"
        return run_tests(mutant, tree)
    finally:
        path.write_text(original)


def main() -> int:
    """Plants what the command line asks for and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=("python", "kernels"), help="faults in Python only, or in C++ only")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="the numbers of the faults to plant")
    parser.add_argument("--trust", action="store_true", help="do not run the tests without the fault first")
    parser.add_argument("--check", action="store_true", help="only look whether every fault finds its place")
    options = parser.parse_args()

    chosen = [
        (number, mutant)
        for number, mutant in enumerate(MUTANTS)
        if (options.layer is None or mutant.compiled == (options.layer == "kernels"))
        and (options.only is None or number in options.only)
    ]
    if options.check:
        lost = [(number, mutant) for number, mutant in chosen if places(mutant, ROOT) != 1]
        for number, mutant in lost:
            print(f"{number:3}  {places(mutant, ROOT)} places  {mutant.file}: {mutant.original}")
        print(f"{len(chosen) - len(lost)} of {len(chosen)} faults find their place.")
        return 1 if lost else 0

    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        tree, build_directory = Path(directory, "tree"), Path(directory, "build")
        tree.mkdir()
        copy_tree(tree)
        if any(mutant.compiled for _, mutant in chosen):
            print("building the kernels, without a fault ...", flush=True)
            done = build(tree, build_directory)
            if done.returncode:
                print(done.stdout[-2000:], done.stderr[-2000:])
                return 1
        if not options.trust:
            print("running the tests without a fault ...", flush=True)
            broken = broken_tests([mutant for _, mutant in chosen], tree)
            if broken:
                print("These fail without any fault:", *broken, sep="\n  ")
                return 1
        compiled_before = False
        for position, (number, mutant) in enumerate(chosen):
            if compiled_before and not mutant.compiled:
                build(tree, build_directory)  # the last fault is still in the module
            started = time.monotonic()
            outcome = ask(mutant, tree, build_directory)
            compiled_before = mutant.compiled
            outcomes[outcome] += 1
            seconds = time.monotonic() - started
            print(
                f"[{position + 1:2}/{len(chosen)}] {number:3}  {outcome:9} {seconds:4.0f} s  {mutant.family:16} "
                f"{mutant.file}: {mutant.why}",
                flush=True,
            )
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    return 0 if set(outcomes) <= {"caught"} else 1


if __name__ == "__main__":
    sys.exit(main())
