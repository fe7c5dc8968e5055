"""Caches of a stranger who means harm: whoever uses them gets the right result or one line.

Whole trees are changed at random, from a seed. Meanwhile nothing outside may be written or removed, no code may run,
nothing that a terminal obeys is printed, and each command has 20 seconds and 2 GiB of memory. A result that is told as
a success is that of the sound tree, as far as seals and checksums can tell.
"""

import pytest

# what is attacked, and how often: once each use of it has come, and under the mark faults
ATTACKS = [("cache", 36), ("begun", 18), ("arrow", 8)]
MANY_ATTACKS = [("cache", 60), ("begun", 35), ("arrow", 15)]


@pytest.mark.parametrize(("tree", "n_attacks"), ATTACKS)
def test_a_cache_of_a_stranger_harms_nobody(attacked, tree, n_attacks):
    assert attacked.faults(tree, 0, n_attacks) == []


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(11))
@pytest.mark.parametrize(("tree", "n_attacks"), MANY_ATTACKS)
def test_caches_of_many_strangers_harm_nobody(attacked, tree, n_attacks, seed):
    assert attacked.faults(tree, seed, n_attacks) == []
