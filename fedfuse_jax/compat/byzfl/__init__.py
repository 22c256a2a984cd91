"""ByzFL's aggregators and pre-aggregators: its names, its call forms and its conventions (0.0.11), computed by ours.

    >>> import numpy as np
    >>> from fedfuse_jax.compat import byzfl
    >>> byzfl.Krum(1)(np.array([[1.0, 2.0], [4.0, 5.0], [4.5, 5.0], [1e9, np.nan]], np.float32))
    array([4., 5.], dtype=float32)

Every rule is called with `vectors`: an array `(n, d)`, or a list of n vectors, of NumPy, JAX or PyTorch. What comes
back is of the same library. NumPy's float64 is float64 whether or not JAX has `jax_enable_x64`, and its integers become
float64, but for `Krum`'s, which stay integers; JAX's own arrays are what JAX makes of them; all else becomes float32,
PyTorch's vectors too, as in ByzFL. On JAX arrays the rules work under `jit` and `vmap`, but for those whose class says
otherwise. The vectors themselves are never changed.

Everywhere, a client with NaN or infinities is one bad client: it is infinitely far from the others, NaN is the greatest
of values, and the result is NaN only where more clients are bad than the rule can bear.

Left out: `CAF` and `SMEA`, whose results are random (one power iteration from a random start).
"""

from fedfuse_jax.compat.byzfl.aggregators import (
    MDA,
    Average,
    CenteredClipping,
    GeometricMedian,
    Krum,
    Meamed,
    Median,
    MoNNA,
    MultiKrum,
    TrMean,
)
from fedfuse_jax.compat.byzfl.preaggregators import ARC, NNM, Bucketing, Clipping

__all__ = [
    "ARC",
    "MDA",
    "NNM",
    "Average",
    "Bucketing",
    "CenteredClipping",
    "Clipping",
    "GeometricMedian",
    "Krum",
    "Meamed",
    "Median",
    "MoNNA",
    "MultiKrum",
    "TrMean",
]
