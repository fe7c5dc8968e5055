"""What the tests of configs share: what a cache says of its hooks, and one run resolved against it."""

import dataclasses

from actcache.errors import CacheMismatch
from actcache.format.records import HookSpec
from trainer.config.settings import SAEConfig
from trainer.config.sweep import SweepConfig

HOOK = "blocks.1.hook_resid_post"
BASE = {"architecture": "topk", "hook_name": HOOK, "d_sae": 1024, "k": 16}


@dataclasses.dataclass(frozen=True)
class Statistics:
    mean_norm: float = 20.0
    mean_square_norm: float = 625.0
    total_variance: float = 500.0


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a cache of one hook says: E||x|| = 20 and E||x||^2 = 625, or twice that with special tokens."""

    d_in: int = 64
    variance: float = 500.0
    hook_name: str = HOOK

    def hook(self, hook_name: str) -> HookSpec:
        if hook_name != self.hook_name:
            raise CacheMismatch(f"no {hook_name}")
        return HookSpec(hook_name=hook_name, d_in=self.d_in, dtype="bfloat16")

    def statistics(self, hook_name: str, *, split: str = "train", row_filter: str = "no_special_tokens") -> Statistics:
        factor = {"no_special_tokens": 1, "all": 2}[row_filter]
        return Statistics(20.0 * factor, 625.0 * factor**2, self.variance * factor**2)


OUT, OUT_WIDTH = "blocks.1.hook_mlp_out", 24


@dataclasses.dataclass(frozen=True)
class TwoHooks(Hooks):
    """A second one of its own width, scale and variance."""

    def hook(self, hook_name: str) -> HookSpec:
        if hook_name == OUT:
            return HookSpec(hook_name=OUT, d_in=OUT_WIDTH, dtype="bfloat16")
        return super().hook(hook_name)

    def statistics(self, hook_name: str, *, split: str = "train", row_filter: str = "no_special_tokens") -> Statistics:
        return Statistics(3.0, 10.0, 6.0) if hook_name == OUT else super().statistics(hook_name, split=split)


def resolved(*, training_tokens: int = 4096 * 1000, sweep: dict | None = None, **run: object) -> SAEConfig:
    (config,) = SweepConfig.from_dict({"base": BASE | run, **(sweep or {})}).expand(Hooks(), training_tokens)
    return config


def penalised(architecture: str, **run: object) -> SAEConfig:
    base = {key: value for key, value in BASE.items() if key != "k"}
    (config,) = SweepConfig.from_dict({"base": base | {"architecture": architecture} | run}).expand(
        Hooks(), 4096 * 1000
    )
    return config
