"""`as_packed`: what is done of what was asked for when documents become sequences, so that a cache records that."""

from __future__ import annotations

import logging
from dataclasses import replace

from actcache.format.manifest import Plan
from actcache.harvesting.config import SEPARATORS, HarvestConfig
from actcache.harvesting.provenance import KEPT
from actcache.harvesting.sequences import separator_ids
from actcache.models.language_model import LanguageModel
from actcache.text.sources import Source
from actcache.text.tokenise import packed_rows

logger = logging.getLogger("actcache")


def as_packed(model: LanguageModel, source: Source, config: HarvestConfig, held: Plan | None) -> HarvestConfig:
    """The config with prepend_bos, separator and repack as the sequences are made; `repack` is False if rows are kept.

    A cache that was begun goes on as it was begun. For a new cache the first rows of the dataset are read. What is not
    done as it was asked for is logged.

    Args:
        model: its tokenizer may lack BOS or EOS.
        source: the dataset.
        config: what was asked for.
        held: the plan of the cache, if it was begun.

    Raises:
        DatasetError: the dataset cannot be read.
    """
    if held is not None:
        return _as_begun(model, config, held)
    ids = separator_ids(model)
    rows = [] if config.repack else packed_rows(source, model.tokenizer, config.context_size)
    if rows:
        logger.info("the rows of token ids are sequences of %d and are kept as they are", config.context_size)
        begun = ids["bos"] is not None and all(row[0] == ids["bos"] for row in rows)
        return replace(config, prepend_bos=begun, separator="none")
    done = _done(config, ids)
    asked = {"bos": config.prepend_bos or config.separator == "bos", "eos": config.separator == "eos"}
    for name in (name for name, is_asked in asked.items() if is_asked and ids[name] is None):
        logger.warning("%s: its tokenizer has no %s, so none is put into the sequences", model.identity["name"], name)
    return done


def _as_begun(model: LanguageModel, config: HarvestConfig, held: Plan) -> HarvestConfig:
    """The config in the words of a plan, if these mean what is asked for; they may say more than was done."""
    ids = separator_ids(model)
    words = {key: held.identity.get(key) for key in ("prepend_bos", "separator")}
    if type(words["prepend_bos"]) is not bool or words["separator"] not in SEPARATORS:  # of an imported cache
        return _done(config, ids)
    if held.identity.get("rows") == KEPT:
        return config if config.repack else replace(config, **words)
    begun = replace(config, **words, repack=True)
    return begun if _done(begun, ids) == _done(config, ids) else _done(config, ids)


def _done(config: HarvestConfig, ids: dict[str, int | None]) -> HarvestConfig:
    """The config as it is done where rows are packed. ids: of each separator."""
    return replace(
        config,
        prepend_bos=config.prepend_bos and ids["bos"] is not None,
        separator="none" if ids[config.separator] is None else config.separator,
        repack=True,
    )
