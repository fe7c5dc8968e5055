"""Packed sequences as they are written, kept and compared when a cache is begun, grows, or is asked for again."""

import json
import shutil
import time
from pathlib import Path

import pytest
from support.io_counts import bytes_read_and_written
from support.tiny_caches import HOOKS, TOKENS, harvest_tiny, promised_files
from support.tiny_models import make_tokenizer

from actcache.errors import CacheMismatch, DatasetError, ModelError
from actcache.store.cache import open_cache
from actcache.text.content_hash import SETTLED_SECONDS


def test_more_tokens_than_there_are_says_how_many(tiny_model, tiny_texts, tiny_cache, tmp_path):
    available = tiny_cache.n_rows("train") + tiny_cache.n_rows("validation")
    with pytest.raises(DatasetError, match=f"it holds {available} .*pass --tokens {available} or fewer"):
        harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=available + 16)
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=available)
    assert sum(cache.n_rows(split) for split in ("train", "validation")) == available


def test_tokens_are_rounded_down_to_whole_sequences(tiny_model, tiny_texts, tmp_path):
    cache = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000)
    assert cache.n_rows("train") + cache.n_rows("validation") == 1000 // 16 * 16


def test_empty_text_is_refused(tiny_model, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": "a"}\n')
    with pytest.raises(DatasetError, match="no text that fills a sequence of 16 tokens"):
        harvest_tiny(tiny_model, tmp_path / "empty.jsonl", tmp_path / "c")


def test_growth_beyond_the_dataset_leaves_the_cache_as_it_was(tiny_model, tiny_texts, tmp_path):
    root = harvest_tiny(tiny_model, tiny_texts, tmp_path / "c", tokens=1000).path
    before = promised_files(root)
    with pytest.raises(DatasetError, match="10000000 tokens asked, it holds"):
        harvest_tiny(tiny_model, tiny_texts, root, tokens=10**7)
    assert promised_files(root) == before
    assert open_cache(root).n_rows() > 0


def test_growth_refuses_a_dataset_that_gives_other_tokens(tiny_model, tmp_path):
    from datasets import Dataset

    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import harvest
    from actcache.text.sources import LoadedDataset

    class Drifting(LoadedDataset):
        """A dataset whose name and hash stay while its rows change, as a hub dataset without a revision."""

        def identity(self) -> dict:
            return {"name": "drifting"}

    def asked(texts: list[str], tokens: int):
        config = HarvestConfig(hook_names=HOOKS[:1], context_size=16, tokens=tokens, holdout=0.0)
        return harvest(tiny_model, Drifting(Dataset.from_dict({"text": texts})), config, tmp_path / "c")

    texts = [f"{number} is followed by {number + 1}. " * 9 for number in range(40)]
    asked(texts, 640)
    before = promised_files(tmp_path / "c")
    with pytest.raises(CacheMismatch, match=r"gives other tokens in sequences 0 to 40; pass its former revision"):
        asked([*texts[:3], "other text " * 20, *texts[4:]], 960)
    assert promised_files(tmp_path / "c") == before
    assert asked(texts, 960).n_rows() == 960


def test_a_kill_between_the_steps_of_growth_is_healed(tiny_model, tiny_texts, tmp_path, whole):
    """After the sequences have changed and before the plan has: the old plan's tail is another file by then."""
    import shutil

    old = harvest_tiny(tiny_model, tiny_texts, tmp_path / "old", tokens=1111).path
    for tokens in (1111, TOKENS):
        root = tmp_path / str(tokens)
        shutil.copytree(old, root)
        (root / "manifest" / "cache.json").unlink()
        for split in ("train", "validation"):
            for name in ("id", "document"):
                key = Path("acts.zarr") / split / "sequences" / name / "c" / "0" / "0"
                shutil.copy(whole.path / key, root / key)
        healed = harvest_tiny(tiny_model, tiny_texts, root, tokens=tokens)
        assert promised_files(healed.path) == promised_files(old if tokens == 1111 else whole.path)


WIDE = "<beyond>"  # a token that the tokenizer knows and the model does not


def wide_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([WIDE])
    return tokenizer


@pytest.mark.parametrize("codec", ["raw", "auto"])
def test_an_id_that_the_embedding_lacks_is_one_line_before_the_first_pass(tiny_model, codec, tmp_path):
    """The text is packed first. Where no text has such a token, it does no harm."""
    from datasets import Dataset

    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import dry_run, harvest
    from actcache.models.load import wrap_model
    from actcache.text.sources import LoadedDataset

    model = wrap_model(tiny_model._model, wide_tokenizer())
    known = model.n_embeddings
    config = HarvestConfig(hook_names=HOOKS[:1], context_size=16, holdout=0.0, codec=codec)
    texts = ["one two three " * 9, f"four {WIDE} five " * 9]
    source = LoadedDataset(Dataset.from_dict({"text": texts}))
    says = rf"token ids must be in \[0, {known}\), the rows of its embedding, got {known}; pass the tokenizer of this"
    for asked in (harvest, dry_run):
        with pytest.raises(ModelError, match=says) as error:
            asked(model, source, config, tmp_path / "c")
        assert "\n" not in str(error.value)
        assert not list((tmp_path / "c").rglob("zarr.json"))
    fine = LoadedDataset(Dataset.from_dict({"text": texts[:1]}))
    assert harvest(model, fine, config, tmp_path / "c").n_rows() > 0


@pytest.mark.parametrize(
    ("rows", "asked", "row"),
    [
        (["<bos>one two", "<bos>three <bos> four"], {}, None),
        (["one two", "three<bos>four", "five<bos>"], {}, None),
        (["one", "\n<bos>two", " <bos>three"], {}, 1),
        (["one", "two", "<bos><bos>three"], {}, 2),
        (["one", "two", "<bos>\n<bos>three"], {"prepend_bos": False, "separator": "eos"}, 2),
        ([" <bos>one"], {"prepend_bos": False, "separator": "eos"}, None),
        ([" <bos>one"], {"prepend_bos": False, "separator": "bos"}, 0),
        ([[0, 5, 6], [5, 0, 6], [0, 0, 5]], {}, 2),
        ([[0, 0, *[5] * 14], [0, 0, *[5] * 14]], {"repack": False}, 0),
        ([[6, 0, *[5] * 14], [0, 6, *[5] * 14]], {"repack": False}, None),
    ],
)
def test_a_text_that_makes_bos_come_twice_is_named_once(rows, asked, row, tiny_model, caplog):
    from datasets import Dataset

    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.sequences import packed_sequences
    from actcache.text.sources import LoadedDataset

    column = "text" if isinstance(rows[0], str) else "input_ids"
    source = LoadedDataset(Dataset.from_dict({column: [*rows, *[rows[-1]] * 40]}))
    config = HarvestConfig(hook_names=HOOKS[:1], context_size=16, holdout=0.0, **{"repack": True, **asked})
    assert list(packed_sequences(tiny_model, source, config))
    lines = [record.getMessage() for record in caplog.records if "twice there" in record.getMessage()]
    assert [line.split(" begins with ")[0] for line in lines] == ([] if row is None else [f"dataset: row {row}"])


def test_few_tokens_of_a_large_file_read_it_once_and_copy_nothing(tiny_model, tmp_path, monkeypatch):
    """Its hash needs all bytes, and is remembered: another worker, or the same call again, reads a few rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text((json.dumps({"text": "Some words of a long text. " * 40}) + "\n") * 20_000)
    while texts.stat().st_ctime > time.time() - SETTLED_SECONDS:
        time.sleep(0.1)
    size = texts.stat().st_size
    for n_hashed, out in ((1, tmp_path / "a"), (0, tmp_path / "b")):
        n_read, n_written = bytes_read_and_written(
            lambda out=out: harvest_tiny(tiny_model, texts, out, tokens=1280, codec="raw")
        )
        assert n_hashed * size <= n_read < (n_hashed + 0.25) * size
        assert n_written < size / 4


def test_a_dataset_that_changes_while_it_is_read_is_not_stored(tiny_model, tiny_texts, tmp_path):
    from actcache.harvesting.config import HarvestConfig
    from actcache.harvesting.run import harvest
    from actcache.text.sources import DatasetSource

    class Changing(DatasetSource):
        """A file that another program goes on writing."""

        def load(self):
            with open(self.path, "ab") as file:
                file.write(tiny_texts.read_bytes())
            return super().load()

    texts = shutil.copy(tiny_texts, tmp_path / "texts.jsonl")
    config = HarvestConfig(hook_names=HOOKS, context_size=16)
    with pytest.raises(DatasetError, match="was changed while it was read; run the same again"):
        harvest(tiny_model, Changing(path=str(texts)), config, tmp_path / "c")
    assert not list((tmp_path / "c").rglob("plan.json"))
    assert not list((tmp_path / "c").rglob("acts.zarr/*"))
    harvest(tiny_model, DatasetSource(path=str(texts)), config, tmp_path / "c")
