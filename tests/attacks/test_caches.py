"""Caches of a stranger who means harm: whoever uses them gets the right result or one line.

Whole trees are changed at random, from a seed. Meanwhile nothing outside may be written or removed, no code may run,
nothing that a terminal obeys is printed, and each command has 20 seconds and 2 GiB of memory. A result that is told as
a success is that of the sound tree, as far as seals and checksums can tell.
"""

import pytest

# what is attacked, how often: each use twice or more; and how often with each seed under the mark faults
ATTACKS = [("cache", 28, 60), ("begun", 16, 35), ("arrow", 8, 15)]


@pytest.mark.parametrize(("tree", "n_attacks"), [(tree, few) for tree, few, _ in ATTACKS])
def test_a_cache_of_a_stranger_harms_nobody(attacked, tree, n_attacks):
    assert attacked.faults(tree, 0, n_attacks) == []


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize(("tree", "n_attacks"), [(tree, many) for tree, _, many in ATTACKS])
def test_caches_of_many_strangers_harm_nobody(attacked, tree, n_attacks, seed):
    assert attacked.faults(tree, seed, n_attacks) == []
