"""Runs, SAE folders and sweep files of a stranger who means harm, attacked as caches are in test_caches.py."""

import pytest

ATTACKS = [("runs", 55), ("saes", 16), ("sweeps", 8)]
MANY_ATTACKS = [("runs", 70), ("saes", 35), ("sweeps", 20)]


@pytest.mark.parametrize(("tree", "n_attacks"), ATTACKS)
def test_a_run_of_a_stranger_harms_nobody(attacked, tree, n_attacks):
    assert attacked.faults(tree, 0, n_attacks) == []


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(11))
@pytest.mark.parametrize(("tree", "n_attacks"), MANY_ATTACKS)
def test_runs_of_many_strangers_harm_nobody(attacked, tree, n_attacks, seed):
    assert attacked.faults(tree, seed, n_attacks) == []
