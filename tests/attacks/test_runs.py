"""Runs, SAE folders and sweep files of a stranger who means harm, attacked as caches are in test_caches.py."""

import pytest

ATTACKS = [("runs", 28, 70), ("saes", 24, 35), ("sweeps", 8, 20)]


@pytest.mark.parametrize(("tree", "n_attacks"), [(tree, few) for tree, few, _ in ATTACKS])
def test_a_run_of_a_stranger_harms_nobody(attacked, tree, n_attacks):
    assert attacked.faults(tree, 0, n_attacks) == []


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize(("tree", "n_attacks"), [(tree, many) for tree, _, many in ATTACKS])
def test_runs_of_many_strangers_harm_nobody(attacked, tree, n_attacks, seed):
    assert attacked.faults(tree, seed, n_attacks) == []
