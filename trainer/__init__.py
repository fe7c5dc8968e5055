"""trainer: batches -> SAEs -> metrics. One pass over a cache trains many sparse autoencoders."""

from trainer.config import SAEConfig, SweepConfig, TrainConfig
from trainer.evaluate import evaluate, evaluate_runs
from trainer.saelens import SAE, export_sae, load_sae
from trainer.sweep import RunRecord, SweepProgress, train

__all__ = [
    "SAE",
    "RunRecord",
    "SAEConfig",
    "SweepConfig",
    "SweepProgress",
    "TrainConfig",
    "evaluate",
    "evaluate_runs",
    "export_sae",
    "load_sae",
    "train",
]
