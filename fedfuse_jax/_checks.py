"""What every operation asks of its arguments, with errors that name operation, argument, got and needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import reference

PyTree = Any

# What kernels, and JAX without x64, hold an integer in.
LARGEST_INT32 = 2**31 - 1

FLOAT_DTYPES = ("float32", "bfloat16", "float16", "float64")


class Leaves(NamedTuple):
    """A pytree taken apart: its leaves as arrays, their paths for messages, and how to put it together."""

    arrays: list[Array]
    paths: list[str]
    treedef: Any

    def unflatten(self, arrays: Sequence[Array]) -> PyTree:
        return jax.tree.unflatten(self.treedef, arrays)


def describe(value: Any) -> str:
    """``float32[3,4]`` for an array, the type's name for anything else."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return f"{type(value).__name__} {value!r}"[:80]


def is_integer(array: Array | np.ndarray) -> bool:
    return array.dtype == object or jnp.issubdtype(array.dtype, jnp.integer)


def is_key_array(value: Any) -> bool:
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def as_given(operation: str, argument: str, value: Any, needed: str) -> Array | np.ndarray:
    """``value`` as an array: one of JAX's as it is, anything else on the host, where JAX cannot cut it to 32 bits.

    Keys, strings and other things that are not numbers are refused. Python integers beyond 64 bits stay objects.
    """
    if isinstance(value, Array):
        if is_key_array(value):
            raise TypeError(f"{operation}: {argument} is a PRNG key array ({describe(value)}); it needs {needed}.")
        return value
    nested = jax.tree.leaves(value) if isinstance(value, list | tuple) else [value]
    if any(isinstance(part, np.ma.MaskedArray) for part in nested):
        raise TypeError(
            f"{operation}: {argument} is a masked array ({describe(value)}), whose mask would be lost; it needs "
            f"{needed}: fill what is masked (numpy.ma.filled), or leave clients out by where."
        )
    try:
        if any(isinstance(part, Array) or hasattr(part, "__jax_array__") for part in nested):
            return jnp.asarray(jax.tree.map(_uncut, value))
        array = np.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        message = f"{operation}: {argument} is not an array (got {describe(value)}); it needs {needed}."
        raise TypeError(message) from error
    if array.dtype == object:
        is_number = all(isinstance(part, int) for part in array.flat) and array.size > 0
    else:
        is_number = jnp.issubdtype(array.dtype, np.number) or array.dtype == bool
    if not is_number:
        raise TypeError(f"{operation}: {argument} is not an array (got {describe(value)}); it needs {needed}.")
    return array


def as_jax(array: Array | np.ndarray) -> Array:
    """An array as JAX's. One that is JAX's already is not converted: a new result, for ``jax_debug_nans``."""
    if isinstance(array, Array) and not array.weak_type and array.dtype == jax.dtypes.canonicalize_dtype(array.dtype):
        return array
    return jnp.asarray(array)


def _uncut(number: Any) -> Any:
    """A float for an integer of the host that would be cut."""
    is_large = isinstance(number, int | np.integer) and not -LARGEST_INT32 <= number <= LARGEST_INT32
    return float(number) if is_large else number


def real_numbers(operation: str, argument: str, value: Any, needed: str) -> Array | np.ndarray:
    """``value`` as given, of any real dtype; :func:`in_dtype` makes floats of it."""
    array = as_given(operation, argument, value, needed)
    is_real = jnp.issubdtype(array.dtype, np.number) or array.dtype in (bool, object)
    if not is_real or jnp.issubdtype(array.dtype, np.complexfloating):
        raise TypeError(f"{operation}: {argument} has dtype {array.dtype}; it needs {needed}.")
    return array


def in_dtype(operation: str, argument: str, array: Array | np.ndarray, dtype: Any) -> Array:
    """Real numbers as JAX's in a floating ``dtype``, rounded once; infinite beyond its range."""
    if isinstance(array, Array):
        return array if array.dtype == dtype and not array.weak_type else array.astype(dtype)
    try:
        with np.errstate(over="ignore"):
            return jnp.asarray(array.astype(dtype))
    except OverflowError as error:
        raise ValueError(
            f"{operation}: {argument} holds an integer beyond the range of float64; it needs numbers within."
        ) from error


def float_leaves(operation: str, argument: str, tree: PyTree) -> Leaves:
    """The leaves of ``tree``, all of a floating dtype the kernels know."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    if not with_paths:
        raise ValueError(f"{operation}: {argument} has no leaves; it needs a pytree of at least one array.")
    if isinstance(tree, list | tuple) and all(isinstance(leaf, int | float | complex) for _, leaf in with_paths):
        raise TypeError(
            f"{operation}: {argument} is {describe(tree)}, Python numbers alone; it needs arrays. A list or tuple is a "
            "pytree, each number of it a leaf: make an array of it by jnp.array, its rows padded to one length."
        )
    arrays, paths = [], []
    for path, leaf in with_paths:
        name = argument + jax.tree_util.keystr(path)
        needed = "floating-point arrays (" + ", ".join(FLOAT_DTYPES) + ")"
        array = as_given(operation, name, leaf, needed)
        if array.dtype.name not in FLOAT_DTYPES:
            hint = ""
            if is_integer(array) or array.dtype == bool:
                hint = " Take integer leaves (batch counters, say) out of the tree, or cast them."
            raise TypeError(f"{operation}: {name} has dtype {array.dtype}; it needs {needed}.{hint}")
        arrays.append(as_jax(array))
        paths.append(name)
    return Leaves(arrays, paths, treedef)


def client_stacked(operation: str, updates: PyTree, argument: str = "updates") -> tuple[Leaves, Any]:
    """The leaves of client-stacked updates, and the number of clients they agree on."""
    leaves = float_leaves(operation, argument, updates)
    for array, path in zip(leaves.arrays, leaves.paths, strict=True):
        if array.ndim == 0:
            raise ValueError(
                f"{operation}: {path} is a scalar ({describe(array)}); it needs a leading client axis, which "
                "stack_clients makes of a list of clients' trees."
            )
        if array.shape[0] != leaves.arrays[0].shape[0]:
            raise ValueError(
                f"{operation}: {path} has {array.shape[0]} clients ({describe(array)}), but {leaves.paths[0]} has "
                f"{leaves.arrays[0].shape[0]}; every leaf needs the same number of clients on its leading axis."
            )
    n_clients = leaves.arrays[0].shape[0]
    if n_clients == 0:
        raise ValueError(
            f"{operation}: {argument} has no clients ({describe(leaves.arrays[0])}); it needs one at least."
        )
    return leaves, n_clients


def client_stacked_like(
    operation: str, updates: PyTree, params: Leaves, argument: str = "updates"
) -> tuple[Leaves, Any]:
    """Client-stacked updates of ``params``: of the same structure, and of their shapes behind the clients."""
    leaves, n_clients = client_stacked(operation, updates, argument)
    if leaves.treedef != params.treedef:
        raise ValueError(
            f"{operation}: {argument} has the structure {leaves.treedef}; it needs that of params, {params.treedef}."
        )
    for array, param, path in zip(leaves.arrays, params.arrays, leaves.paths, strict=True):
        if array.shape[1:] != param.shape:
            needed = f"({n_clients}, {', '.join(map(str, param.shape))})"
            raise ValueError(
                f"{operation}: {path} has shape {array.shape}; it needs params' behind the clients, {needed}."
            )
    return leaves, n_clients


def for_jit(operation: str, argument: str, value: Any) -> Array:
    """Real numbers that may go into a ``jit``, which would cut the host's integers: those as floats."""
    array = real_numbers(operation, argument, value, "real numbers")
    if isinstance(array, Array):
        return array
    return in_dtype(operation, argument, array, jax.dtypes.canonicalize_dtype(np.float64))


def per_client(operation: str, argument: str, value: Any, n_clients: Any, dtype: Any) -> Array:
    """A real ``(n_clients,)`` vector, such as weights, in ``dtype``."""
    needed = f"real numbers of shape ({n_clients},), one per client"
    array = real_numbers(operation, argument, value, needed)
    if array.shape != (n_clients,):
        raise ValueError(f"{operation}: {argument} has shape {array.shape}; it needs {needed}.")
    return in_dtype(operation, argument, array, dtype)


def real_scalar(
    operation: str, argument: str, value: Any, dtype: Any, *, least: float | None = None, most: float = math.inf
) -> Array:
    """A real scalar in ``dtype``; with ``least``, one of the host has to lie in the range, and be no NaN."""
    array = real_numbers(operation, argument, value, "a real scalar")
    if array.shape != ():
        raise ValueError(f"{operation}: {argument} has shape {array.shape}; it needs a scalar.")
    if least is not None and isinstance(array, np.ndarray):
        _check_range(operation, argument, array.item(), least, most)
    return in_dtype(operation, argument, array, dtype)


def bounded_scalar(
    operation: str, argument: str, value: Any, dtype: Any, *, least: float = 0.0, most: float = math.inf
) -> Array:
    """A real scalar in the range; a traced one is whatever it will be."""
    return real_scalar(operation, argument, value, dtype, least=least, most=most)


def _check_range(operation: str, argument: str, value: Any, least: float, most: float) -> None:
    if not least <= value <= most:
        bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        if (least, most) == (-math.inf, math.inf):
            bounds = "a number"
        raise ValueError(f"{operation}: {argument} is {value}; it needs to be {bounds}.")


def int32_scalar(operation: str, argument: str, value: Any) -> Array:
    """One int32, or an integer of the host that fits."""
    needed = "an int32 scalar"
    array = as_given(operation, argument, value, needed)
    of_host = isinstance(array, np.ndarray) and is_integer(array)
    if not of_host and array.dtype != np.int32:
        raise TypeError(f"{operation}: {argument} has dtype {array.dtype}; it needs {needed}.")
    if array.shape != ():
        raise ValueError(f"{operation}: {argument} has shape {array.shape}; it needs {needed}.")
    if of_host and not -LARGEST_INT32 <= array.item() <= LARGEST_INT32:
        raise ValueError(f"{operation}: {argument} is {array}; it needs {needed}.")
    return jnp.asarray(array, np.int32)


def random_key(operation: str, key: Any) -> Array:
    """One JAX key, typed; raw ``uint32[2]`` is Threefry's."""
    needed = "one JAX key: jax.random.key(seed), or raw uint32[2]"
    if is_key_array(key):
        if key.shape != ():
            raise ValueError(f"{operation}: key has shape {key.shape}; it needs {needed}.")
        return key
    if not hasattr(key, "dtype") or key.dtype != np.uint32:
        raise TypeError(f"{operation}: key is {describe(key)}; it needs {needed}.")
    if key.shape == (2,):
        return jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
    default = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    if key.shape != default.shape:
        raise ValueError(f"{operation}: key is {describe(key)}; it needs {needed}.")
    return jax.random.wrap_key_data(jnp.asarray(key))


def participation(operation: str, where: Any, n_clients: Any) -> Array | None:
    """``where`` as a bool ``(n_clients,)`` array, or ``None`` for everybody."""
    if where is None:
        return None
    needed = f"bool of shape ({n_clients},), True for the clients that take part"
    array = as_given(operation, "where", where, needed)
    if array.dtype != bool:
        raise TypeError(f"{operation}: where has dtype {array.dtype}; it needs {needed}.")
    if array.shape != (n_clients,):
        raise ValueError(f"{operation}: where has shape {array.shape}; it needs {needed}.")
    return jnp.asarray(array)


def mesh_axes(operation: str, axis_name: Any) -> tuple[Any, ...] | None:
    """The axes that the caller's ``shard_map`` has bound and the parameters are sharded over; ``None`` for none."""
    if axis_name is None:
        return None
    names = tuple(axis_name) if isinstance(axis_name, list | tuple) else (axis_name,)
    bound = internals.bound_axes()
    needed = "it needs the name, or a tuple of names, of mesh axes that a shard_map around it binds (here: "
    needed += (", ".join(map(repr, bound)) or "none") + ")"
    for name in names:
        # A number would be an axis of the array.
        if name in bound and not isinstance(name, int):
            continue
        kind = ValueError if isinstance(name, str) else TypeError
        raise kind(f"{operation}: axis_name is {axis_name!r}; {needed}.")
    if len(set(names)) != len(names):
        raise ValueError(f"{operation}: axis_name is {axis_name!r}, which names an axis twice; {needed}.")
    return names or None


def result_dtypes(operation: str, arrays: Sequence[Array], out_dtype: Any) -> tuple[str, ...]:
    """The dtype of each leaf's result: float32 (float64 for float64 leaves), or ``out_dtype`` for all."""
    if out_dtype is None:
        return tuple(reference.accumulator_dtype(array.dtype).name for array in arrays)
    try:
        dtype = jax.dtypes.canonicalize_dtype(out_dtype)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{operation}: out_dtype is {out_dtype!r}; it needs one of {FLOAT_DTYPES}.") from error
    if dtype.name not in FLOAT_DTYPES:
        raise TypeError(f"{operation}: out_dtype is {dtype.name}; it needs one of {FLOAT_DTYPES}.")
    return (dtype.name,) * len(arrays)


def tree_accumulator(arrays: Sequence[Array]) -> np.dtype:
    """The dtype of what belongs to the whole tree (weights, norms)."""
    return reference.accumulator_dtype(*(array.dtype for array in arrays))


def accumulator_of(*numbers: Any) -> np.dtype:
    """The dtype that a sum of arrays, or of numbers of the host, is kept in."""
    dtypes = [jax.dtypes.canonicalize_dtype(x.dtype) for x in numbers if hasattr(x, "dtype") and not is_key_array(x)]
    return reference.accumulator_dtype(*(dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)))


def python_bool(operation: str, argument: str, value: Any) -> bool:
    """``True`` or ``False``, Python's or NumPy's; what is merely true or false is refused."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{operation}: {argument} is {describe(value)}; it needs to be True or False.")
    return bool(value)


def python_int(operation: str, argument: str, value: Any, minimum: int) -> int:
    """A Python or NumPy integer of at least ``minimum``, which kernels can hold; traced values are refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise TypeError(f"{operation}: {argument} is {describe(value)}; it needs a Python integer.")
    if value < minimum:
        raise ValueError(f"{operation}: {argument} is {value}; it needs to be at least {minimum}.")
    if value > LARGEST_INT32:
        raise ValueError(f"{operation}: {argument} is {value}; it needs to be at most {LARGEST_INT32}.")
    return int(value)


def python_number(
    operation: str,
    argument: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    needed: str = "a Python number",
) -> float:
    """A Python or NumPy real number, in the range if there is one; traced values are refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{operation}: {argument} is {describe(value)}; it needs {needed}.")
    if (least, most) != (-math.inf, math.inf):
        _check_range(operation, argument, value, least, most)
    try:
        return float(value)
    except OverflowError as error:
        message = f"{operation}: {argument} is an integer beyond the range of float64; it needs {needed} within."
        raise ValueError(message) from error


def distance_matrix(operation: str, distances: Any, n_clients: Any = None) -> Array:
    """Real squared distances, ``(n_clients, n_clients)``; without ``n_clients``, of any number but none."""
    count = "n_clients" if n_clients is None else n_clients
    needed = f"floating-point numbers of shape ({count}, {count}), the squared distance of every two clients"
    array = as_given(operation, "distances", distances, needed)
    if array.dtype.name not in FLOAT_DTYPES:
        raise TypeError(f"{operation}: distances has dtype {array.dtype}; it needs {needed}.")
    square = array.ndim == 2 and array.shape[0] == array.shape[1] and array.shape[0] != 0
    if not square or (n_clients is not None and array.shape[0] != n_clients):
        raise ValueError(f"{operation}: distances has shape {array.shape}; it needs {needed}.")
    array = jnp.asarray(array)
    return array.astype(reference.accumulator_dtype(array.dtype))


def matrix_per_client(
    operation: str, argument: str, value: Any, n_clients: Any, kind: Any, needed: str
) -> Array | np.ndarray:
    """A ``(n_clients, any)`` array as given, its dtype of a ``kind`` such as ``jnp.integer``, called ``needed``."""
    array = as_given(operation, argument, value, needed)
    if not jnp.issubdtype(array.dtype, kind):
        raise TypeError(f"{operation}: {argument} has dtype {array.dtype}; it needs {needed}.")
    if array.ndim != 2 or (n_clients is not None and array.shape[0] != n_clients):
        raise ValueError(f"{operation}: {argument} has shape {array.shape}; it needs {needed}.")
    if array.shape[0] == 0:
        raise ValueError(f"{operation}: {argument} has no clients ({describe(array)}); it needs one at least.")
    return array


def supported_float(operation: str, argument: str, array: Array | np.ndarray) -> None:
    """Refuses the floating dtypes that no kernel knows."""
    if array.dtype.name not in FLOAT_DTYPES:
        raise TypeError(f"{operation}: {argument} has dtype {array.dtype}; it needs one of {FLOAT_DTYPES}.")
