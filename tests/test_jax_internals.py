"""What the package uses of JAX that JAX does not promise. CI runs this on the oldest and on the newest JAX."""

import importlib
import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import fedfuse_jax
from fedfuse_jax import _jax_internals as internals
from fedfuse_jax import _versions

pytestmark = pytest.mark.calls

PACKAGE = Path(fedfuse_jax.__file__).parent
NOT_PROMISED = re.compile(r"^\s*(?:from|import) (jax\.(?:_src|interpreters|extend|experimental)|jaxlib)\b", re.M)


def test_everything_it_lists_is_there():
    assert all(getattr(internals, name) is not None for name in internals.__all__)


def test_nobody_else_imports_such_things():
    offenders = {
        path.relative_to(PACKAGE).as_posix(): NOT_PROMISED.findall(path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "_jax_internals.py"
    }
    # jaxlib's version is public, and so is what show_versions reads of it.
    assert {name: found for name, found in offenders.items() if found} == {"_versions.py": ["jaxlib"]}


def test_varying_axes_inside_shard_map():
    mesh = jax.make_mesh((jax.device_count(),), ("a",), (AxisType.Auto,))
    seen = {}

    def body(x, y):
        seen["sharded"], seen["replicated"] = internals.varying_axes(x), internals.varying_axes(y)
        seen["marked"] = internals.varying_axes(internals.as_varying(y, frozenset("a")))
        return x

    jax.eval_shape(
        jax.shard_map(body, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a")), jnp.ones(4 * jax.device_count()), 1.0
    )
    assert seen == {"sharded": frozenset("a"), "replicated": frozenset(), "marked": frozenset("a")}


def test_resharded_changes_types_on_explicit_meshes_only():
    for kind in (AxisType.Explicit, AxisType.Auto):
        mesh = jax.make_mesh((jax.device_count(),), ("a",), (kind,))
        with jax.set_mesh(mesh):
            value = jax.device_put(jnp.ones(4 * jax.device_count()), NamedSharding(mesh, P()))
            spec = jax.typeof(internals.resharded(value, mesh, P("a"))).sharding.spec
            assert tuple(spec) == (("a",) if kind == AxisType.Explicit else (None,))
            assert internals.explicit_axes(mesh) == (frozenset("a") if kind == AxisType.Explicit else frozenset())


def test_zero_tangents_have_tangent_types():
    assert internals.zero_tangent(jnp.ones(3)).aval.dtype == jnp.float32
    assert internals.zero_tangent(jnp.ones(3, bool)).aval.dtype == jax.dtypes.float0


def test_a_newer_jax_gets_one_warning_and_the_newest_tested_none(monkeypatch):
    """Importing the package says it; a release of a line that was tested is nothing new."""
    major, minor = _versions.NEWEST_TESTED_JAX
    for version, num_warnings in ((f"{major}.{minor}.7", 0), ("0.8.0", 0), (f"{major}.{minor + 1}.0", 1), ("1.0.0", 1)):
        monkeypatch.setattr(jax, "__version__", version)
        monkeypatch.setattr(jax, "__version_info__", tuple(map(int, version.split("."))))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            importlib.reload(fedfuse_jax)
        messages = [str(warning.message) for warning in seen]
        assert len(messages) == num_warnings, messages
        assert all(f"JAX {version} is newer than {major}.{minor}" in message for message in messages)
