"""Datasets of every kind, made at random from a seed: each gives what was written, or one line that is right."""

import random
import shutil

import pytest
from support.dataset_folders import Folder, Maker, packed
from support.documents import TOKENIZER
from support.tiny_caches import HOOKS

from actcache.errors import DatasetError
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.text.sources import DatasetSource
from actcache.text.tokenise import documents

N_FOLDERS, MANY_FOLDERS = 200, 500  # the latter under the mark faults


def ids_of(value: str | list[int]) -> list[int]:
    return TOKENIZER(value, add_special_tokens=False)["input_ids"] if isinstance(value, str) else value


def fault_of(folder: Folder) -> str | None:
    """What is wrong with how a dataset is read; None if nothing is."""
    expected = [(number, ids) for number, value in folder.expected if (ids := ids_of(value))]
    try:
        source = DatasetSource(path=str(folder.path), **folder.settings)
        found = [(number, ids.tolist()) for number, ids in documents(source, TOKENIZER)]
    except DatasetError as error:
        said = str(error)
        if folder.refused is None or folder.refused not in said or "\n" in said:
            return f"refused with {said!r:.400}, expected {folder.refused or expected!r:.200}"
        return None
    if folder.refused is not None:
        return f"taken, expected the refusal {folder.refused!r}"
    return None if found == expected else f"gives {found!r:.300}, expected {expected!r:.300}"


def faults(root, seed: int, n_folders: int) -> list[str]:
    found = []
    for number in range(n_folders):
        folder = Maker(random.Random(f"{seed} {number}")).make(root / str(number))
        if fault := fault_of(folder):
            found.append(f"{seed} {number} {folder.path} {folder.settings}: {fault}")
        else:
            shutil.rmtree(root / str(number))
    return found


def test_every_dataset_gives_what_was_written_or_is_refused_in_one_line(tmp_path):
    assert faults(tmp_path, 0, N_FOLDERS) == []


def test_the_stored_tokens_are_those_that_were_written(tiny_model, tmp_path):
    n_caches = 0
    for number in range(20):
        folder = Maker(random.Random(f"stored {number}")).make(tmp_path / str(number))
        expected = packed([(n, ids_of(value)) for n, value in folder.expected], 16, TOKENIZER.bos_token_id, 0.2)
        if folder.refused is not None or not any(expected.values()):
            continue
        source = DatasetSource(path=str(folder.path), **folder.settings)
        config = HarvestConfig(hook_names=HOOKS[:1], context_size=16, holdout=0.2, codec="raw")
        cache = harvest(tiny_model, source, config, tmp_path / "caches" / str(number))
        assert {split: cache.sequences(split).tolist() for split in expected} == expected, folder
        n_caches += 1
    assert n_caches > 5


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_datasets_give_what_was_written_or_are_refused_in_one_line(tmp_path, seed):
    assert faults(tmp_path, seed, MANY_FOLDERS) == []
