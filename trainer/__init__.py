"""trainer: batches -> SAEs -> metrics. One pass over a cache trains many sparse autoencoders."""

from trainer.config import SAEConfig, TrainConfig
from trainer.evaluate import evaluate, evaluate_runs
from trainer.runs import RunRecord
from trainer.saelens import SAE, export_sae, load_sae
from trainer.sweep import SweepProgress, train
from trainer.sweep_file import SweepConfig

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
