"""What the robust rules refuse, and how they say so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_errors import check_refused, refusal

import fedfuse_jax as ff

X = jnp.ones((7, 3))
D = jnp.zeros((7, 7))
KEY = jax.random.key(0)

TAKE_NUM_BYZANTINE = {
    "mean_around_median": lambda f: ff.mean_around_median(X, f),
    "krum": lambda f: ff.krum(X, f),
    "multi_krum": lambda f: ff.multi_krum(X, f),
    "bulyan": lambda f: ff.bulyan(X, f),
    "nearest_neighbor_mixing": lambda f: ff.nearest_neighbor_mixing(X, f),
    "krum_scores": lambda f: ff.krum_scores(D, f),
}
FEWEST_REFUSED = {
    "mean_around_median": 7,
    "krum": 5,
    "multi_krum": 5,
    "bulyan": 2,
    "nearest_neighbor_mixing": 7,
    "krum_scores": 5,
}


@pytest.mark.parametrize("operation", TAKE_NUM_BYZANTINE)
def test_num_byzantine(operation):
    call = TAKE_NUM_BYZANTINE[operation]
    for f in (-1, FEWEST_REFUSED[operation], 10**20):
        check_refused(lambda f=f: call(f), *refusal(ValueError, operation, "num_byzantine", str(f)))
    for f in (1.0, True, "1", None, jnp.int32(1)):
        check_refused(lambda f=f: call(f), *refusal(TypeError, operation, "num_byzantine", "Python integer"))
    call(FEWEST_REFUSED[operation] - 1)


TAKE_DISTANCES = {
    "krum": lambda d: ff.krum(X, 1, distances=d),
    "multi_krum": lambda d: ff.multi_krum(X, 1, distances=d),
    "bulyan": lambda d: ff.bulyan(X, 1, distances=d),
    "nearest_neighbor_mixing": lambda d: ff.nearest_neighbor_mixing(X, 1, distances=d),
    "krum_scores": lambda d: ff.krum_scores(d, 1),
}
BAD_DISTANCES = {
    "vector": (jnp.zeros(7), ValueError, "(7,)"),
    "oblong": (jnp.zeros((7, 6)), ValueError, "(7, 6)"),
    "integers": (jnp.zeros((7, 7), int), TypeError, "int32"),
    "key": (jax.random.split(KEY, 7), TypeError, "key"),
    "text": ("near", TypeError, "near"),
}


@pytest.mark.parametrize("operation", TAKE_DISTANCES)
@pytest.mark.parametrize("bad", BAD_DISTANCES)
def test_distances(operation, bad):
    distances, kind, *fragments = BAD_DISTANCES[bad]
    check_refused(
        lambda: TAKE_DISTANCES[operation](distances),
        *refusal(kind, operation, "distances", "squared distance", *fragments),
    )


def test_distances_of_others():
    check_refused(
        lambda: ff.krum(X, 1, distances=jnp.zeros((6, 6))),
        *refusal(ValueError, "krum", "distances", "(6, 6)", "(7, 7)"),
    )


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (8, ValueError), (-1, ValueError), (2.0, TypeError)])
def test_num_selected(value, kind):
    check_refused(lambda: ff.multi_krum(X, 1, value), *refusal(kind, "multi_krum", "num_selected", str(value)))


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (7, ValueError), ("2", TypeError)])
def test_num_neighbors(value, kind):
    check_refused(
        lambda: ff.krum_scores(D, 1, num_neighbors=value), *refusal(kind, "krum_scores", "num_neighbors", str(value))
    )


@pytest.mark.parametrize("operation", ["multi_krum", "geometric_median"])
@pytest.mark.parametrize(("weights", "kind"), [(np.ones(6), ValueError), (1.0, ValueError), ("equal", TypeError)])
def test_weights(operation, weights, kind):
    call = {"multi_krum": lambda: ff.multi_krum(X, 1, weights=weights)}.get(
        operation, lambda: ff.geometric_median(X, weights)
    )
    check_refused(call, *refusal(kind, operation, "weights", "(7,)"))


@pytest.mark.parametrize("operation", ["geometric_median", "centered_clipping"])
@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (1.5, TypeError), (None, TypeError)])
def test_num_iterations(operation, value, kind):
    call = {"geometric_median": lambda: ff.geometric_median(X, num_iterations=value)}.get(
        operation, lambda: ff.centered_clipping(X, jnp.zeros(3), 1.0, num_iterations=value)
    )
    check_refused(call, *refusal(kind, operation, "num_iterations"))


@pytest.mark.parametrize(("value", "kind"), [(-1.0, ValueError), (jnp.ones(2), ValueError), ("far", TypeError)])
def test_radius_and_smoothing(value, kind):
    check_refused(lambda: ff.centered_clipping(X, jnp.zeros(3), value), *refusal(kind, "centered_clipping", "radius"))
    check_refused(lambda: ff.geometric_median(X, smoothing=value), *refusal(kind, "geometric_median", "smoothing"))


@pytest.mark.parametrize(
    ("center", "kind", "argument"),
    [
        (jnp.zeros(4), ValueError, "center"),
        (jnp.zeros((7, 3)), ValueError, "center"),
        ({"x": jnp.zeros(3)}, ValueError, "center"),
        (jnp.zeros(3, int), TypeError, "center"),
        (None, ValueError, "center"),
    ],
)
def test_center(center, kind, argument):
    check_refused(lambda: ff.centered_clipping(X, center, 1.0), *refusal(kind, "centered_clipping", argument))


BAD_KEYS = {
    "several": (jax.random.split(KEY, 2), ValueError),
    "several raw": (jnp.zeros((3, 2), jnp.uint32), ValueError),
    "a seed": (0, TypeError),
    "floats": (jnp.zeros(2), TypeError),
    "text": ("key", TypeError),
    "None": (None, TypeError),
}


@pytest.mark.parametrize("bad", BAD_KEYS)
def test_key(bad):
    key, kind = BAD_KEYS[bad]
    check_refused(lambda: ff.bucketing(key, X, 2), *refusal(kind, "bucketing", "key", "JAX key"))


@pytest.mark.parametrize(("value", "kind"), [(0, ValueError), (-2, ValueError), (2.0, TypeError)])
def test_bucket_size(value, kind):
    check_refused(lambda: ff.bucketing(KEY, X, value), *refusal(kind, "bucketing", "bucket_size", str(value)))
