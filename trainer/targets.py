"""When an SAE counts as good: a target for each of four metrics, and the word that says how a value stands to it.

docs/how-to/is-my-sae-good.md says where the targets are from, and what to do if one is missed.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The good values of a metric: from `low` to `high`, both included."""

    low: float = -math.inf
    high: float = math.inf

    @property
    def words(self) -> str:
        """The target in words."""
        if math.isinf(self.high):
            return f">= {self.low:g}"
        return f"<= {self.high:g}" if math.isinf(self.low) else f"{self.low:g} to {self.high:g}"


TARGETS = {  # by the key in eval.json
    "l0": Target(low=50.0, high=200.0),
    "explained_variance": Target(low=0.9),
    "ce_loss_score": Target(low=0.8),
    "dead_fraction": Target(high=0.05),
}


def mark(key: str, value: object) -> str | None:
    """ "good", "low" or "high"; None where the metric has no target, or the value is no finite number."""
    if key not in TARGETS or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    target = TARGETS[key]
    if value < target.low:
        return "low"
    return "high" if value > target.high else "good"
