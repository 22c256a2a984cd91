#!/usr/bin/env python3
"""Whether an installed wheel works: its kernels load, and one of them computes. Needs no test package."""

import jax.numpy as jnp

import fedfuse_jax as ff
from fedfuse_jax import _native

ff.show_versions()
kernels = _native.load("cpu")
assert not kernels.reason, kernels.reason
assert ff.coordinate_median(jnp.array([[1.0], [4.0], [2.0]])).tolist() == [2.0]
