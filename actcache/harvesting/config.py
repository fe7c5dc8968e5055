"""`HarvestConfig`: the settings of one harvest."""

from __future__ import annotations

from dataclasses import dataclass

from actcache.arguments import type_fields_
from actcache.errors import ConfigError
from actcache.format.codecs import codec
from actcache.format.dtypes import ACTIVATION_DTYPES
from actcache.format.records import HOOK_NAME

AUTO = "auto"
BATCH_TOKENS = 4096  # tokens of a forward pass on a CPU; a shard has at least as many rows
SEPARATORS = ("bos", "eos", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestConfig:
    """What to harvest, and how it is packed and stored.

    hook_names: the hooks, each once. tokens: rows of both splits together, rounded down to whole sequences; None takes
    the whole dataset. context_size: tokens of a sequence. codec: a profile, or "auto" for the one that a short
    measurement chooses. dtype: of the stored values. batch_size: sequences of one forward pass; None takes about 4,096
    tokens on a CPU, and a measured number on CUDA. prepend_bos: whether every sequence begins with BOS. separator: the
    token between documents. repack: pack token ids anew whose rows are sequences already. seed: keys the scatter of
    rows and the choice of the validation split. holdout: share of documents in the validation split.

    Raises ConfigError for a value that is out of range.
    """

    hook_names: tuple[str, ...]
    tokens: int | None = None
    context_size: int = 128
    codec: str = "lossless"
    dtype: str = "bfloat16"
    batch_size: int | None = None
    prepend_bos: bool = True
    separator: str = "bos"
    repack: bool = False
    seed: int = 0
    holdout: float = 0.01

    def __post_init__(self) -> None:
        type_fields_("harvest", self)
        if self.codec != AUTO:
            codec(self.codec)
        for hook_name in self.hook_names:
            if not HOOK_NAME.fullmatch(hook_name):
                raise ConfigError(f"harvest: a hook name is words joined by dots, got {hook_name!r}")
        rules = {
            "hook_names must name at least one hook, each once": (
                len(self.hook_names) == len(set(self.hook_names)) > 0,
                self.hook_names,
            ),
            "context_size must be at least 2": (self.context_size >= 2, self.context_size),
            "tokens must fill at least one sequence": (
                self.tokens is None or self.tokens >= self.context_size,
                self.tokens,
            ),
            f"dtype must be one of {', '.join(ACTIVATION_DTYPES)}": (self.dtype in ACTIVATION_DTYPES, self.dtype),
            "batch_size must be at least 1": (self.batch_size is None or self.batch_size >= 1, self.batch_size),
            f"separator must be one of {', '.join(SEPARATORS)}": (self.separator in SEPARATORS, self.separator),
            "seed must be at least 0": (self.seed >= 0, self.seed),
            "holdout must be in [0, 1)": (0 <= self.holdout < 1, self.holdout),
        }
        for rule, (is_met, got) in rules.items():
            if not is_met:
                raise ConfigError(f"harvest: {rule}, got {got!r}")

    @property
    def batch_sequences(self) -> int:
        """Sequences of a forward pass: `batch_size`, or the default of a CPU."""
        return self.batch_size or max(1, BATCH_TOKENS // self.context_size)
