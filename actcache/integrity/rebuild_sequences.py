"""`RebuiltSequences`: makes damaged sequence arrays again, from the token arrays or from the dataset."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from actcache.arguments import local_path
from actcache.errors import CacheMismatch, CorruptShard, DatasetError
from actcache.flow import SPLITS
from actcache.format.arrays import SEQUENCE_ARRAYS, sequence_arrays
from actcache.format.codecs import codec
from actcache.format.scatter import shard_permutation
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.provenance import KEPT
from actcache.harvesting.sequences import packing
from actcache.integrity.expected import ExpectedCache
from actcache.integrity.problems import StoredArray, stored_arrays
from actcache.models.language_model import LanguageModel
from actcache.store.cache import read_origin
from actcache.store.reader import ArrayReader
from actcache.store.shard_file import encode_chunk, write_encoded_shard
from actcache.text.packing import pack
from actcache.text.sources import DatasetSource, Source
from actcache.text.tokenise import documents

SourceOf = Callable[[], Source]
ModelOf = Callable[[dict[str, Any]], LanguageModel]  # gives the model; its argument says how activations were computed
SequenceShard = tuple[str, str, int]  # split, path of the sequence array, shard
IDS, DOCUMENTS = SEQUENCE_ARRAYS
PACKING = ("context_size", "prepend_bos", "separator", "seed", "holdout")
OF_FILE = ("column", "sample_by", "on_bad_row")
DATASET = ("config", "split", "revision", *OF_FILE)


def remembered_dataset(root: Path) -> DatasetSource:
    """Where the dataset of a cache was at its harvest. Raises DatasetError if the cache does not remember it."""
    try:
        return DatasetSource(**read_origin(root)["dataset"])
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"{root}: its documents have to be packed again, and where the dataset is was not remembered; "
            "pass --dataset"
        ) from error


class RebuiltSequences:
    """Rebuilds the sequence arrays of a cache. A shard is written only if it has the checksum that the plan names."""

    def __init__(self, expected: ExpectedCache, dataset: str | Source | SourceOf, model: ModelOf):
        """Nothing is read yet.

        Args:
            expected: what the cache should hold; it notes the files that are written.
            dataset: where the dataset is now, or what tells it if it is needed.
            model: called only if the dataset has to be packed again.
        """
        self._expected, self._root, self._plan = expected, expected.root, expected.plan
        self._dataset, self._model = dataset, model
        self._codec, self._shard_rows = codec(self._plan.identity["codec"]), self._plan.identity["shard_rows"]

    def restore_ids(self, damaged: set[str]) -> None:
        """Rebuild damaged token ids from the token arrays. If these are damaged too, pack the dataset again.

        The dataset then restores the documents as well. damaged: paths of the damaged files. Raises CacheMismatch,
        DatasetError.
        """
        lost = self._damaged_sequences(IDS, damaged)
        lost = [(stored, shard) for stored, shard in lost if not self._restored_from_tokens(stored, shard)]
        if lost:
            self._restore_from_dataset([*lost, *self._damaged_sequences(DOCUMENTS, damaged)])

    def restore_documents(self, damaged: set[str]) -> None:
        """Rebuild damaged documents by packing the dataset again: no other file tells the document of a token.

        damaged: paths of the damaged files. Raises CacheMismatch, DatasetError.
        """
        self._restore_from_dataset(self._damaged_sequences(DOCUMENTS, damaged))

    def _damaged_sequences(self, array: str, damaged: set[str]) -> list[tuple[StoredArray, int]]:
        """(array of a split, shard), for each damaged shard of a sequence array that was not rebuilt yet."""
        lost = damaged - {*self._expected.redone}
        of_splits = [stored for stored in stored_arrays(self._expected.cache()) if stored.array.path == array]
        return [(s, shard) for s in of_splits for shard in range(s.n_shards) if str(s.path(shard)) in lost]

    def _restored_from_tokens(self, stored: StoredArray, shard: int) -> bool:
        """Rebuild a shard of token ids from the token arrays. Returns False if these are damaged or do not fit."""
        start, stop = (sequence * self._plan.identity["context_size"] for sequence in stored.rows(shard))
        first, last = start // self._shard_rows, -(-stop // self._shard_rows)
        reader = self._expected.cache().token_reader(stored.split, "id")
        try:
            token_ids = np.concatenate([self._token_ids(reader, stored.split, index) for index in range(first, last)])
        except CorruptShard:
            return False
        in_shard = token_ids[start - first * self._shard_rows : stop - first * self._shard_rows]
        return self._put_sequences(stored, shard, in_shard.reshape(-1, self._plan.identity["context_size"]))

    def _token_ids(self, reader: ArrayReader, split: str, index: int) -> Int32[np.ndarray, " token"]:
        """The token ids of a shard, in the order of its sequences. Raises CorruptShard."""
        held = self._expected.held[split, index]
        permutation = shard_permutation(held.n_rows, seed=self._plan.identity["seed"], split=split, index=index)
        return reader.read(held.first_token, held.first_token + held.n_rows)[permutation]

    def _put_sequences(self, stored: StoredArray, shard: int, rows: Int32[np.ndarray, "sequence position"]) -> bool:
        """Write a shard of a sequence array, which is one chunk. Returns False if the plan names another checksum."""
        chunk = encode_chunk(rows, stored.array, self._codec)
        if stored.reader.records[shard].checksums != (chunk[1],):
            return False
        write_encoded_shard(stored.path(shard), stored.array, [chunk], stored.shard_rows)
        self._expected.redone.append(str(stored.path(shard)))
        return True

    def _restore_from_dataset(self, lost: Sequence[tuple[StoredArray, int]]) -> None:
        """Pack the dataset again until every lost shard is rebuilt. lost: (array of a split, shard).

        Raises DatasetError if it is not known where the dataset is, CacheMismatch if it gives other sequences.
        """
        wanted = {(stored.split, stored.array.path, shard): stored for stored, shard in lost}
        sequences: dict[SequenceShard, list[np.ndarray]] = defaultdict(list)
        for key, sequence in self._packed_again() if wanted else ():
            if (stored := wanted.get(key)) is None:
                continue
            sequences[key].append(sequence)
            first, last = stored.rows(key[2])
            if len(sequences[key]) == last - first:
                if not self._put_sequences(stored, key[2], np.stack(sequences.pop(key))):
                    break
                del wanted[key]
            if not wanted:
                break
        if wanted:
            stored, shard = lost[0]
            raise CacheMismatch(
                f"{stored.path(shard)}: lost, and the dataset does not give it again; pass its former revision as "
                "--dataset, or harvest again elsewhere"
            )

    def _packed_again(self) -> Iterator[tuple[SequenceShard, Int32[np.ndarray, " position"]]]:
        """For every sequence of the dataset, in order: (shard, its token ids), then (shard, its documents)."""
        identity, source = self._plan.identity, self._source()
        model = self._model(next(iter(self._expected.held.values())).compute)
        config = HarvestConfig(
            hook_names=(self._expected.hooks[0].hook_name,),
            repack=identity.get("rows") != KEPT,
            **{key: identity[key] for key in PACKING},
        )
        texts = documents(source, model.tokenizer)
        counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
        chunk_rows = sequence_arrays(config.context_size)[0].chunk_rows
        for sequence in pack(texts, packing(model, config), seed=config.seed, holdout=config.holdout):
            shard = counts[sequence.split] // chunk_rows
            yield (sequence.split, IDS, shard), sequence.token_ids
            yield (sequence.split, DOCUMENTS, shard), sequence.documents
            counts[sequence.split] += 1

    def _source(self) -> Source:
        """The dataset to pack again. Raises DatasetError if the cache does not remember where it is."""
        if isinstance(self._dataset, str):
            keys = (
                OF_FILE if local_path(self._dataset).is_file() else DATASET
            )  # a file has neither splits nor revisions
            known = {key: self._plan.identity["dataset"].get(key) for key in keys}
            return DatasetSource(
                path=self._dataset, **{key: value for key, value in known.items() if value is not None}
            )
        return self._dataset() if callable(self._dataset) else self._dataset
