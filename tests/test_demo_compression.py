"""`python -m fedfuse_jax.demo --compress`: what is sent and what arrives, that it trains, what it shows and refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

for module in ("fedjax", "sklearn", "matplotlib", "rich"):
    pytest.importorskip(module)

from fedfuse_jax.demo import __main__ as command_line  # noqa: E402
from fedfuse_jax.demo import report, simulation  # noqa: E402
from fedfuse_jax.demo.compression import COMPRESSIONS, UNCOMPRESSED, Compression  # noqa: E402
from fedfuse_jax.demo.simulation import Outcome  # noqa: E402

every_compression = pytest.mark.parametrize("name", COMPRESSIONS)


@pytest.fixture(scope="module")
def federation():
    return simulation.make_federation(num_clients=12, seed=0)


@pytest.fixture(scope="module")
def model():
    return simulation.make_model()


def rounds_of(compression, updates, weights, rounds):
    """The means that arrive when clients send the same updates in every round."""
    aggregator = simulation._compressed(compression, seed=0)
    state, means = aggregator.init(), []
    for _ in range(rounds):
        clients = ((index, update, weight) for index, (update, weight) in enumerate(zip(updates, weights, strict=True)))
        mean, state = aggregator.apply(clients, state)
        means.append(mean)
    return means, state


def make_updates(num_clients=4):
    generator = np.random.default_rng(0)
    return [
        {"w": jnp.asarray(generator.normal(size=(50, 20)), jnp.float32), "b": jnp.asarray(generator.normal(size=20))}
        for _ in range(num_clients)
    ]


def mean_of(updates, weights):
    return jax.tree.map(lambda *leaves: np.average(np.stack(leaves), axis=0, weights=weights), *updates)


WEIGHTS = [1, 2, 3, 4]


# What is sent


def test_bytes():
    """The model's 9610 numbers: 38 blocks of 256, each with a scale and a zero point of 4 bytes."""
    blocks = 38 * (4 + 4)
    assert UNCOMPRESSED.num_bytes(9610) == 4 * 9610
    assert COMPRESSIONS["topk"].num_bytes(9610) == 96 * (4 + 4)
    assert COMPRESSIONS["int8"].num_bytes(9610) == 9610 + blocks
    assert COMPRESSIONS["int4"].num_bytes(9610) == 9610 / 2 + blocks


def test_uncompressed_is_the_mean():
    (mean,), _ = rounds_of(UNCOMPRESSED, make_updates(), WEIGHTS, 1)
    jax.tree.map(
        lambda got, expected: np.testing.assert_allclose(got, expected, atol=1e-6),
        mean,
        mean_of(make_updates(), WEIGHTS),
    )


@pytest.mark.parametrize(("name", "levels"), [("int8", 255), ("int4", 15)])
def test_quantised_means_are_near_and_unbiased(name, levels):
    expected = mean_of(make_updates(), WEIGHTS)
    means, _ = rounds_of(COMPRESSIONS[name], make_updates(), WEIGHTS, 60)
    scale = 8 / levels  # normal numbers span less than 8
    errors = np.stack([np.asarray(mean["w"]) - expected["w"] for mean in means])
    assert np.abs(errors).max() < scale
    assert np.abs(errors.mean(axis=0)).max() < scale / 4
    assert len(np.unique(errors[:, 0, 0])) > 3  # other roundings in other rounds


def test_topk_sends_the_rest_later():
    updates = make_updates()
    means, residual = rounds_of(COMPRESSIONS["topk"], updates, WEIGHTS, 30)
    assert sum(np.count_nonzero(leaf) for leaf in means[0].values()) <= 4 * 10
    left = np.average(residual, axis=0, weights=WEIGHTS)
    arrived = np.concatenate([np.ravel(sum(mean[name] for mean in means)) for name in ("b", "w")])
    wanted = mean_of(updates, WEIGHTS)
    wanted = 30 * np.concatenate([np.ravel(wanted[name]) for name in ("b", "w")])
    np.testing.assert_allclose(arrived + left, wanted, atol=1e-3)


# The training


@every_compression
def test_learns(federation, model, name):
    last = list(simulation.train_compressed(federation, model, COMPRESSIONS[name], 6))[-1]
    assert last.finite
    assert last.accuracy > 0.7  # chance is 0.1


@pytest.mark.full
@every_compression
def test_same_seed_same_numbers(federation, model, name):
    first = list(simulation.train_compressed(federation, model, COMPRESSIONS[name], 2))
    assert first == list(simulation.train_compressed(federation, model, COMPRESSIONS[name], 2))


@pytest.mark.full
@every_compression
def test_the_whole_run_loses_little(model, name):
    federation = simulation.make_federation(command_line.DEFAULT_CLIENTS, seed=0)
    best, last = (
        list(simulation.train_compressed(federation, model, compression, 50))[-1].accuracy
        for compression in (UNCOMPRESSED, COMPRESSIONS[name])
    )
    assert best > 0.9
    assert last > best - 0.03


# What is shown


def test_table_has_bytes_and_accuracy(capsys):
    history = {
        "uncompressed": [Outcome(0.5, True), Outcome(0.967, True)],
        "int4": [Outcome(0.5, True), Outcome(0.95, True)],
    }
    report.print_compression_table(history, {"uncompressed": 4_000_000, "int4": 500_000}, 10, "headline")
    text = capsys.readouterr().out
    assert text.startswith("headline\n")
    assert re.search(r"uncompressed\W+4,000,000\W+80\.00\W+1\.0\W+96\.7%", text)
    assert re.search(r"int4\W+500,000\W+10\.00\W+8\.0\W+95\.0%\W+1\.7 points", text)


def test_command(tmp_path, capsys):
    picture = tmp_path / "picture.png"
    command_line.main(["--compress", "int8", "topk", "--rounds", "2", "--clients", "6", "--output", str(picture)])
    shown = capsys.readouterr()
    assert "6 clients send updates of 9610 numbers; 2 rounds, seed 0" in shown.out
    for name, number in (("uncompressed", "38,440"), ("int8", "9,914"), ("topk", "768")):
        assert re.search(rf"{name}\W+{number}\W+\d\.\d\d\W+\d+\.\d\W+\d+\.\d%", shown.out), name
    assert "int4" not in shown.out
    assert "6/6 rounds" in shown.err
    assert picture.read_bytes().startswith(b"\x89PNG")


@every_compression
def test_help_names_every_compression(name, capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    assert re.search(rf"{name} +{re.escape(COMPRESSIONS[name].description)}", capsys.readouterr().out)


def test_a_compression_is_one_row(federation, model, monkeypatch):
    half = Compression(
        "half precision",
        lambda key, num_params: (),
        lambda update, nothing: ((update.astype(jnp.float16),), nothing),
        UNCOMPRESSED.merge,
    )
    monkeypatch.setitem(COMPRESSIONS, "half", half)
    assert command_line._parse(["--compress", "half"]).compress == ["half"]
    assert half.num_bytes(10) == 20
    assert len(list(simulation.train_compressed(federation, model, half, 1))) == 1


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compress"], "argument --compress: expected at least one argument"),
        (["--compress", "zip"], "argument --compress: invalid choice: 'zip' (choose from"),
        (["--compress", "int8", "--attack", "nan"], "--attack is for bad clients; with --compress, all are good"),
        (["--compress", "int8", "--rules", "median"], "--rules is for bad clients; with --compress, all are good"),
    ],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command_line.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
