"""The generator of selection networks: by the 0-1 principle, what a network selects, and that pruning lost nothing.

A network of minima and maxima selects rank r of any values if it does so of all zeros and ones (Knuth, TAOCP 3,
5.3.4). A monotone network's output at rank r must be 1 exactly if more than n - 1 - r inputs are; up to 12 inputs all
2ⁿ of them are tried at once, one bit of a Python integer each, and beyond, random and sorted ones.
"""

import functools
import random
import sys
from pathlib import Path

import pytest
from scripts import load_script

GENERATOR = Path(__file__).parents[1] / "ffi" / "math" / "networks.py"

networks = load_script(GENERATOR)
EXHAUSTIVE = 12
trimmed_mean_networks = functools.cache(networks.trimmed_mean_networks)


def zero_one_inputs(size):
    """For each wire an integer of many bits; bit t is the wire's value in test t. And the number of tests."""
    if size <= EXHAUSTIVE:
        tests = 1 << size
        return [sum(1 << t for t in range(tests) if t >> wire & 1) for wire in range(size)], tests
    generator = random.Random(size)
    vectors = []
    for ones in range(size + 1):  # every number of ones, in many orders
        vector = [1] * ones + [0] * (size - ones)
        vectors += [vector, vector[::-1]]
        vectors += [generator.sample(vector, size) for _ in range(20)]
    return [int("".join(map(str, wire)), 2) for wire in zip(*vectors, strict=True)], len(vectors)


def run(network, values):
    """The outputs: minimum is `and`, maximum is `or`, all tests at once."""
    wires = list(values)
    for operation in network.operations:
        low, high = wires[operation.low], wires[operation.high]
        if operation.minimum:
            wires[operation.low] = low & high
        if operation.maximum:
            wires[operation.high] = low | high
    return wires[network.first_rank : network.first_rank + network.num_outputs]


def at_least(inputs, tests):
    """For each k, the tests in which k inputs or more are one."""
    counts = [(1 << tests) - 1] + [0] * len(inputs)
    for bits in inputs:
        for k in range(len(inputs), 0, -1):
            counts[k] |= counts[k - 1] & bits
    return counts


def rank(counts, size, r):
    """In which tests the value of rank r is one: at least size - r inputs are."""
    return counts[size - r]


@pytest.mark.parametrize("size", networks.SORT_SIZES)
def test_sort_networks(size):
    inputs, tests = zero_one_inputs(size)
    counts = at_least(inputs, tests)
    assert run(networks.sort_network(size), inputs) == [rank(counts, size, r) for r in range(size)]


@pytest.mark.parametrize("size", networks.MEDIAN_SIZES)
def test_median_networks(size):
    network = networks.median_network(size)
    inputs, tests = zero_one_inputs(size)
    counts = at_least(inputs, tests)
    assert run(network, inputs) == [rank(counts, size, r) for r in (size // 2 - 1, size // 2)]


def test_every_count_finds_a_trimmed_mean_network():
    sizes = [network.size for network in trimmed_mean_networks()]
    assert sizes == list(networks.TRIMMED_MEAN_SIZES)
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("which", range(len(networks.TRIMMED_MEAN_SIZES)), ids=lambda i: networks.TRIMMED_MEAN_SIZES[i])
def test_trimmed_mean_networks(which):
    """For each count a network serves: the kept outputs, as a collection, are the values of the kept ranks.

    They come in no order, so their multiset is compared: how many of them are one, in every test.
    """
    network = trimmed_mean_networks()[which]
    size = network.size
    smallest = networks.TRIMMED_MEAN_SIZES[which - 1] + 1 if which else networks.TRIMMED_MEAN_SIZES[0]
    for num_values in range(smallest, size + 1):
        inputs, tests = zero_one_inputs(num_values)
        low_pads = (size - num_values) // 2
        padded = [0] * low_pads + inputs + [(1 << tests) - 1] * (size - num_values - low_pads)
        outputs = run(network, padded)
        trim = int(networks.TRIM_FRACTION * num_values)
        first = trim + low_pads - network.first_rank
        kept = outputs[first : first + num_values - 2 * trim]
        assert len(kept) == num_values - 2 * trim
        counts = at_least(inputs, tests)
        wanted = [rank(counts, num_values, r) for r in range(trim, num_values - trim)]
        assert at_least(kept, tests) == at_least(wanted, tests), num_values


@pytest.mark.parametrize("size", [5, 10, 16, 32, 128])
def test_pruning_pays(size):
    """Networks that want less cost less; the counts are those that the project's performance notes give."""
    full = networks.sort_network(size).cost
    assert networks.median_network(size + size % 2).cost < full + (size % 2) * full
    if size == 128:
        assert networks.median_network(size).cost <= 2012
        assert full <= 2942


def test_no_operation_is_idle():
    """Each operation computes something, and each of its results is read."""
    for network in [networks.sort_network(12), networks.median_network(24), *trimmed_mean_networks()[:12]]:
        read = set(range(network.first_rank, network.first_rank + network.num_outputs))
        for operation in reversed(network.operations):
            wanted = (operation.low in read, operation.high in read)
            assert (operation.minimum, operation.maximum) == wanted
            assert any(wanted)
            read |= {operation.low, operation.high}


def test_the_header_is_a_function_of_the_definition(tmp_path):
    import subprocess

    output = tmp_path / "deep" / "networks.h"
    subprocess.run([sys.executable, GENERATOR, "--output", output], check=True)
    header = output.read_text()
    for family, count in (
        ("SortNetwork", len(networks.SORT_SIZES)),
        ("MedianNetwork", len(networks.MEDIAN_SIZES)),
        ("TrimmedMeanNetwork", len(networks.TRIMMED_MEAN_SIZES)),
    ):
        assert header.count(f"struct {family}<") == count
