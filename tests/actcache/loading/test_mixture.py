import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from support import naive_loader
from support.tiny_caches import HOOKS, harvest_tiny, write_texts

from actcache.errors import CacheMismatch, ConfigError
from actcache.loading.loader import Loader
from actcache.loading.mixture import Mixture

COMMON = {"seed": 3, "group_chunks": 2}


@pytest.fixture(scope="module")
def other_cache(tiny_model, tmp_path_factory):
    """Other text, another codec, one hook fewer."""
    out = tmp_path_factory.mktemp("other")
    texts = write_texts(out / "texts.jsonl", n_documents=25)
    return harvest_tiny(tiny_model, texts, out / "cache", codec="int8", hook_names=HOOKS[:2])


def as_pairs(batches) -> list[tuple[int, int]]:
    return [pair for batch in batches for pair in zip(batch.cache.tolist(), batch.row.tolist(), strict=True)]


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("shares", [(1, 1), (0.3, 0.7), (5, 1), (Fraction(1, 3), 2)], ids=str)
@pytest.mark.parametrize("batch_tokens", [61, 250])
def test_a_mixture_is_that_of_the_definition(tiny_cache, other_cache, shares, batch_tokens, epochs):
    caches = [tiny_cache, other_cache]
    streams = [naive_loader.served_rows(cache, HOOKS[:2], epochs=epochs, **COMMON)[0] for cache in caches]
    expected = naive_loader.mixed_rows(streams, shares, batch_tokens)
    settings = {"batch_tokens": batch_tokens, "epochs": epochs, **COMMON}
    with Mixture(list(zip(caches, shares, strict=True)), HOOKS[:2], **settings) as mixture:
        batches = list(mixture)
        assert [batch.step for batch in batches] == list(range(mixture.n_steps))
    assert as_pairs(batches) == list(zip(*(part.tolist() for part in expected), strict=True))
    x = [{hook: naive_loader.activations(cache, hook) for hook in HOOKS[:2]} for cache in caches]
    for batch in batches[:: 1 + len(batches) // 20]:
        for hook in HOOKS[:2]:
            pairs = zip(batch.cache.tolist(), batch.row.tolist(), strict=True)
            assert torch.equal(batch.x[hook], torch.stack([x[cache][hook][row] for cache, row in pairs]))


def test_every_batch_has_its_shares(tiny_cache, other_cache):
    caches = [(tiny_cache, 0.7), (other_cache, 0.3)]
    batches = list(Mixture(caches, HOOKS[0], batch_tokens=100, **COMMON))
    assert len(batches) > 20
    given = 0
    for step, batch in enumerate(batches[:-1], start=1):
        given += int((batch.cache == 0).sum())
        due = Fraction(0.7) / (Fraction(0.7) + Fraction(0.3)) * 100 * step
        assert due - 1 < given < due + 1
        assert 69 <= int((batch.cache == 0).sum()) <= 71
        assert 34 <= int((batch.cache[:50] == 0).sum()) <= 36, "half a batch has its share too"


def test_one_cache_is_its_loader(tiny_cache):
    pairs = as_pairs(Mixture([(tiny_cache, 3.5)], HOOKS[0], batch_tokens=100, epochs=2))
    assert pairs == [(0, row) for batch in Loader(tiny_cache, HOOKS[0], epochs=2) for row in batch.row.tolist()]


SETTINGS = {
    **COMMON,
    "batch_tokens": 150,
    "epochs": 2,
    "positions": slice(2, None, 2),
    "max_norm_ratio": 1.3,
    "token_fields": ("id", "document", "sequence", "position"),
    "limit": 1501,
}


def same(one, other) -> bool:
    names = ("row", "cache", "token_id", "document", "sequence", "position")
    return torch.equal(one.x[HOOKS[0]], other.x[HOOKS[0]]) and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in names
    )


def test_resume_at_every_step_with_filters_and_fields(tiny_cache, other_cache):
    caches = [(tiny_cache, 2), (other_cache, 1)]
    whole = list(Mixture(caches, HOOKS[0], **SETTINGS))
    assert [len(batch.row) for batch in whole] == [150] * 10 + [1]
    for step in range(len(whole) + 1):
        with Mixture(caches, HOOKS[0], start_step=step, **SETTINGS) as resumed:
            batches = list(resumed)
        assert len(batches) == len(whole) - step
        assert all(same(one, other) for one, other in zip(batches, whole[step:], strict=True))


def test_filters_and_fields_are_those_of_each_cache(tiny_cache, other_cache):
    caches = [tiny_cache, other_cache]
    mixture = Mixture([(cache, 1) for cache in caches], HOOKS[0], **SETTINGS)
    for number, cache in enumerate(caches):
        filters = {"positions": SETTINGS["positions"], "max_norm_ratio": SETTINGS["max_norm_ratio"]}
        rows, dropped = naive_loader.served_rows(cache, HOOKS[:1], **filters)
        assert (mixture.n_rows[number], mixture.dropped[number]) == (len(rows), dropped)
    fields = [naive_loader.token_fields(cache) for cache in caches]
    for batch in mixture:
        pairs = list(zip(batch.cache.tolist(), batch.row.tolist(), strict=True))
        for attribute, name in {"token_id": "id", "document": "document", "position": "position"}.items():
            assert getattr(batch, attribute).tolist() == [fields[cache][name][row] for cache, row in pairs]


@pytest.mark.parametrize(("world_size", "batch_tokens"), [(2, 150), (3, 151), (7, 3)])
def test_ranks_concatenated_equal_one_rank(tiny_cache, other_cache, world_size, batch_tokens):
    caches = [(tiny_cache, 2), (other_cache, 1)]
    settings = {**SETTINGS, "batch_tokens": batch_tokens, "limit": 10 * batch_tokens + 1}
    whole = list(Mixture(caches, HOOKS[0], **settings))
    ranks = [list(Mixture(caches, HOOKS[0], rank=r, world_size=world_size, **settings)) for r in range(world_size)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for name in ("row", "cache", "token_id", "document", "sequence", "position"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
        assert torch.equal(torch.cat([part.x[HOOKS[0]] for part in parts]), batch.x[HOOKS[0]])


def test_what_a_caller_holds_is_never_overwritten(tiny_cache, other_cache):
    mixture = Mixture([(tiny_cache, 1), (other_cache, 1)], HOOKS[0], batch_tokens=64)
    held = [batch.x[HOOKS[0]][3:9] for batch in mixture]
    again = Mixture([(tiny_cache, 1), (other_cache, 1)], HOOKS[0], batch_tokens=64)
    assert all(torch.equal(kept, batch.x[HOOKS[0]][3:9]) for kept, batch in zip(held, again, strict=True))
    assert len({rows.data_ptr() for rows in held}) == len(held) > 10


def test_bad_shares_are_refused(tiny_cache):
    for shares in [(), (1, 0), (1, -2), (1, float("inf")), (1, float("nan"))]:
        with pytest.raises(ConfigError, match="share above 0"):
            Mixture([(tiny_cache, share) for share in shares], HOOKS[0])
    with pytest.raises(ConfigError, match="worth a row of a batch of 8"):
        Mixture([(tiny_cache, 1), (tiny_cache, 8)], HOOKS[0], batch_tokens=8)


@pytest.mark.parametrize("bad", [{"batch_tokens": 0}, {"epochs": 0}, {"rank": 1}, {"limit": -1}], ids=str)
def test_bad_arguments_are_named(tiny_cache, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Mixture([(tiny_cache, 1)], HOOKS[0], **bad)


def test_hooks_that_differ_are_refused(tiny_model, tiny_texts, tiny_cache, other_cache, tmp_path):
    with pytest.raises(CacheMismatch, match=HOOKS[0]):
        Mixture([(tiny_cache, 1), (other_cache, 1)], HOOKS)
    float32 = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", dtype="float32", hook_names=HOOKS[:1])
    with pytest.raises(ConfigError, match=r"wide in bfloat16 in .* wide in float32"):
        Mixture([(tiny_cache, 1), (float32, 1)], HOOKS[0])


def test_a_mixture_reads_no_further_than_it_serves(tiny_cache, other_cache):
    mixture = Mixture([(tiny_cache, 1), (other_cache, 1)], HOOKS[0], batch_tokens=100, limit=100, **COMMON)
    assert len(as_pairs(itertools.islice(mixture, 1))) == 100
    assert [stream.order.n_stream_rows for stream in mixture._streams] == [50, 50]
    assert np.all([stream.order.following(0, 0) is None for stream in mixture._streams])
