import numpy as np
import pytest
import torch
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from support.documents import token_lists

from actcache.errors import ConfigError, DatasetError
from actcache.text.packing import Packing, pack, split_of


def packed(bos: int | None, separator: int | None, context_size: int = 8) -> list[list[int]]:
    stream = [(i, np.array(ids, dtype=np.int32)) for i, ids in enumerate(token_lists())]
    packing = Packing(context_size=context_size, bos_id=bos, separator_id=separator)
    return [s.token_ids.tolist() for s in pack(stream, packing, seed=0, holdout=0.0)]


@pytest.mark.parametrize("context_size", [2, 3, 8, 16, 33])
@pytest.mark.parametrize(("bos", "separator"), [(0, 0), (0, 1), (0, None), (None, 1), (None, None)])
def test_packing_equals_saelens(bos, separator, context_size):
    stream = iter([torch.tensor(ids) for ids in token_lists()])
    theirs = concat_and_batch_sequences(
        stream, context_size, begin_batch_token_id=bos, sequence_separator_token_id=separator
    )
    assert packed(bos, separator, context_size) == [row.tolist() for row in theirs]


def test_every_token_says_its_document_and_splits_are_packed_apart():
    stream = [(i, np.full(5 + i % 7, i + 2, dtype=np.int32)) for i in range(200)]  # document i holds only id i + 2
    found = list(pack(stream, Packing(context_size=8, bos_id=0, separator_id=1), seed=3, holdout=0.3))
    for sequence in found:
        own = sequence.token_ids >= 2
        assert (sequence.token_ids[own] == sequence.documents[own] + 2).all()
        assert {split_of(int(d), seed=3, holdout=0.3) for d in sequence.documents} == {sequence.split}
    assert {sequence.split for sequence in found} == {"train", "validation"}


def test_holdout_is_a_share_of_documents_that_depends_on_the_seed():
    held = [{i for i in range(4000) if split_of(i, seed=s, holdout=0.1) == "validation"} for s in (0, 1)]
    assert held[0] != held[1]
    for found in held:  # binomial(4000, 0.1): five standard deviations are 95
        assert abs(len(found) - 400) < 95
    assert not any(split_of(i, seed=0, holdout=0.0) == "validation" for i in range(4000))


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="context_size"):
        Packing(context_size=1, bos_id=0, separator_id=None)


def test_kept_rows_are_sequences_and_only_the_last_may_be_short():
    packing = Packing(context_size=4, bos_id=0, separator_id=0, keeps_rows=True)
    stream = [(i, np.arange(i, i + n, dtype=np.int32)) for i, n in enumerate([4, 4, 3])]
    found = list(pack(stream, packing, seed=0, holdout=0.5))
    assert [s.token_ids.tolist() for s in found] == [[0, 1, 2, 3], [1, 2, 3, 4]]
    assert [(s.split, s.documents.tolist()) for s in found] == [
        (split_of(i, seed=0, holdout=0.5), [i] * 4) for i in (0, 1)
    ]
    for lengths, row in (([4, 5], "row 1 has 5"), ([3, 4], "row 0 has 3"), ([4, 3, 3], "row 1 has 3")):
        stream = [(i, np.zeros(n, dtype=np.int32)) for i, n in enumerate(lengths)]
        with pytest.raises(DatasetError, match=f"{row} token ids, .* pass --repack"):
            list(pack(stream, packing, seed=0, holdout=0.0))
