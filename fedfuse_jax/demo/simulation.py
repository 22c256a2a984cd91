"""The federation: digits dealt to clients unevenly, a small FedJAX model, rounds of training."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import fedjax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fedfuse_jax import stack_clients
from fedfuse_jax.demo.attacks import ATTACKS, NO_ATTACK, Attack, default_num_bad
from fedfuse_jax.demo.compression import Compression
from fedfuse_jax.demo.privacy import MAX_NORM
from fedfuse_jax.demo.rules import DEFAULT_RULES, RULES
from fedfuse_jax.fedjax import clipped_noisy_mean_aggregator, federated_averaging

NUM_CLASSES = 10
DIRICHLET_ALPHA = 0.3

# A median follows what most clients have in common, and few of these clients share a digit. Many
# local epochs and momentum on the server let the common part add up.
HIDDEN_UNITS = 128
BATCH_SIZE = 12
LOCAL_EPOCHS = 5
CLIENT_LEARNING_RATE = 0.2
SERVER_LEARNING_RATE = 1.0
SERVER_MOMENTUM = 0.9


@dataclass(frozen=True)
class Federation:
    """Who holds which digits, and who is bad.

    Attributes:
        clients: One `{"x": float32 (examples, 64), "y": int32 (examples,)}` per client.
        bad_clients: The indices of the bad ones.
        test: The held-out digits, in the same form as a client's.
        seed: What the digits, the model and the order of the batches are drawn from.
    """

    clients: list[dict[str, np.ndarray]]
    bad_clients: frozenset[int]
    test: dict[str, np.ndarray]
    seed: int


@dataclass(frozen=True)
class Scenario:
    """One training run: a rule of `RULES` and what the bad clients do."""

    name: str
    rule: str
    attack: Attack


@dataclass(frozen=True)
class Outcome:
    """What a model was after a round.

    Attributes:
        accuracy: Share of the test digits read right. Logits that are NaN read as digit 0, which
            is what `argmax` makes of them.
        finite: Whether every parameter was finite.
    """

    accuracy: float
    finite: bool


def scenarios(attack_name: str, rules: Sequence[str] = DEFAULT_RULES) -> list[Scenario]:
    """Lists the runs of the demo: the mean among good clients, then the rules under attack."""
    attack = ATTACKS[attack_name]
    return [
        Scenario("mean, no attack", "mean", NO_ATTACK),
        *(Scenario(rule, rule, attack) for rule in rules),
    ]


def make_federation(num_clients: int, seed: int, num_bad: int | None = None) -> Federation:
    """Deals scikit-learn's digits to clients and picks `num_bad` of them, a quarter by default, to be bad."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)  # 16 is the darkest ink
    labels = labels.astype(np.int32)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    generator = np.random.default_rng(seed)
    parts = _deal_by_label(train_y, num_clients, generator)
    bad = generator.choice(num_clients, default_num_bad(num_clients) if num_bad is None else num_bad, replace=False)
    return Federation(
        clients=[{"x": train_x[part], "y": train_y[part]} for part in parts],
        bad_clients=frozenset(bad.tolist()),
        test={"x": test_x, "y": test_y},
        seed=seed,
    )


def make_model() -> fedjax.Model:
    """Builds a FedJAX model with one hidden layer for 8 x 8 digits."""

    def forward(batch: Any) -> jax.Array:
        return hk.nets.MLP([HIDDEN_UNITS, NUM_CLASSES])(batch["x"])

    return fedjax.create_model_from_haiku(
        hk.transform(forward),
        sample_batch={"x": np.zeros((1, 64), np.float32), "y": np.zeros(1, np.int32)},
        train_loss=lambda batch, logits: fedjax.metrics.unreduced_cross_entropy_loss(batch["y"], logits),
        eval_metrics={"accuracy": fedjax.metrics.Accuracy()},
    )


def train(federation: Federation, model: fedjax.Model, scenario: Scenario, rounds: int) -> Iterator[Outcome]:
    """Runs the rounds of one scenario and yields the outcome of each."""
    attack, bad_clients = scenario.attack, federation.bad_clients
    clients = [
        examples | {"y": attack.corrupt_labels(examples["y"])} if index in bad_clients else examples
        for index, examples in enumerate(federation.clients)
    ]
    aggregator = _under_attack(RULES[scenario.rule].build(len(bad_clients)), attack, bad_clients)
    return _train_by(aggregator, replace(federation, clients=clients), model, rounds)


def train_privately(
    federation: Federation, model: fedjax.Model, noise_multiplier: float, rounds: int
) -> Iterator[Outcome]:
    """Runs the rounds with clipped updates and noise on their sum, every client good."""
    # The demo repeats. Where there is something to hide, the key is drawn from the operating system's randomness.
    key = jax.random.fold_in(jax.random.PRNGKey(federation.seed), 1)
    return _train_by(clipped_noisy_mean_aggregator(MAX_NORM, noise_multiplier, key), federation, model, rounds)


def train_compressed(
    federation: Federation, model: fedjax.Model, compression: Compression, rounds: int
) -> Iterator[Outcome]:
    """Runs the rounds with what a compression makes of the updates, every client good."""
    return _train_by(_compressed(compression, federation.seed), federation, model, rounds)


def num_params(model: fedjax.Model) -> int:
    """How many numbers an update has."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(model.init, jax.random.PRNGKey(0))))


def _train_by(
    aggregator: fedjax.aggregators.Aggregator, federation: Federation, model: fedjax.Model, rounds: int
) -> Iterator[Outcome]:
    """Runs the rounds of FedJAX's federated averaging and yields the outcome of each."""
    clients = [fedjax.ClientDataset(examples) for examples in federation.clients]
    algorithm = federated_averaging(
        fedjax.model_grad(model),
        client_optimizer=fedjax.optimizers.sgd(CLIENT_LEARNING_RATE),
        server_optimizer=fedjax.optimizers.sgd(SERVER_LEARNING_RATE, momentum=SERVER_MOMENTUM),
        client_batch_hparams=fedjax.ShuffleRepeatBatchHParams(
            batch_size=BATCH_SIZE, num_epochs=LOCAL_EPOCHS, seed=federation.seed
        ),
        aggregator=aggregator,
    )
    model_key, rounds_key = jax.random.split(jax.random.PRNGKey(federation.seed))
    state = algorithm.init(model.init(model_key))
    for round_key in jax.random.split(rounds_key, rounds):
        client_keys = jax.random.split(round_key, len(clients))
        state, _ = algorithm.apply(state, list(zip(range(len(clients)), clients, client_keys, strict=True)))
        metrics = fedjax.evaluate_model(model, state.params, [federation.test])
        yield Outcome(
            accuracy=float(metrics["accuracy"]),
            finite=all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params)),
        )


def _deal_by_label(labels: np.ndarray, num_clients: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Deals equally many examples to each client, by label shares it draws from a Dirichlet.

    The scheme of Hsu et al. 2019. No client is left without examples, and the rules that ignore
    how many a client has lose nothing by it.
    """
    pools = [generator.permutation(np.flatnonzero(labels == label)).tolist() for label in range(NUM_CLASSES)]
    parts = []
    for _ in range(num_clients):
        shares = generator.dirichlet(np.full(NUM_CLASSES, DIRICHLET_ALPHA))
        part: list[int] = []
        while len(part) < len(labels) // num_clients:
            sizes = np.array([len(pool) for pool in pools])
            # Labels that are used up fall away; when none of the client's is left, any will do.
            weights = np.where(sizes > 0, shares, 0)
            if weights.sum() == 0:
                weights = sizes
            part.append(pools[generator.choice(NUM_CLASSES, p=weights / weights.sum())].pop())
        parts.append(np.array(part))
    return parts


def _under_attack(
    aggregator: fedjax.aggregators.Aggregator, attack: Attack, bad_clients: Collection[int]
) -> fedjax.aggregators.Aggregator:
    """Puts the bad clients between the training and an aggregator."""

    def apply(clients_params_and_weights: Any, state: Any) -> tuple[Any, Any]:
        agreed = None
        if attack.collude is not None:
            clients_params_and_weights = list(clients_params_and_weights)
            good = [update for client_id, update, _ in clients_params_and_weights if client_id not in bad_clients]
            agreed = jax.tree.map(attack.collude, stack_clients(good))

        def corrupted(update: Any) -> Any:
            return jax.tree.map(attack.corrupt_update, update) if agreed is None else agreed

        sent = (
            (client_id, corrupted(update) if client_id in bad_clients else update, weight)
            for client_id, update, weight in clients_params_and_weights
        )
        return aggregator.apply(sent, state)

    return fedjax.aggregators.Aggregator(aggregator.init, apply)


def _compressed(compression: Compression, seed: int) -> fedjax.aggregators.Aggregator:
    """The mean of what comes through; its state is what the clients remember, who come in one order each round."""

    def apply(clients_params_and_weights: Any, state: Any) -> tuple[Any, Any]:
        _, updates, weights = zip(*clients_params_and_weights, strict=True)
        flat, unravel = ravel_pytree(updates[0])
        if state is None:
            keys = jax.random.split(jax.random.PRNGKey(seed), len(updates))
            state = jax.vmap(lambda key: compression.start(key, flat.size))(keys)
        mean, state = _send_and_merge(stack_clients(list(updates)), jnp.asarray(weights), state, compression)
        return unravel(mean), state

    return fedjax.aggregators.Aggregator(lambda: None, apply)


@partial(jax.jit, static_argnames="compression")
def _send_and_merge(updates: Any, weights: Any, memory: Any, compression: Compression) -> tuple[Any, Any]:
    flat = jax.vmap(lambda update: ravel_pytree(update)[0])(updates)
    messages, memory = jax.vmap(compression.send)(flat, memory)
    return compression.merge(messages, weights / weights.sum(), flat.shape[1]), memory
