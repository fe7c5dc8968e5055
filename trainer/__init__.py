"""trainer: batches -> SAEs -> metrics. One pass over a cache trains many sparse autoencoders."""

from trainer.config.settings import SAEConfig, TrainConfig
from trainer.config.sweep import SweepConfig
from trainer.evaluation.evaluate import evaluate, evaluate_runs
from trainer.features.attribution import logit_attribution
from trainer.features.logit_lens import logit_lens
from trainer.features.similarity import similar_features, stability
from trainer.features.text import encode_text
from trainer.formats.foreign import Names
from trainer.formats.imports import import_release, import_sae
from trainer.formats.saelens import export_sae, load_sae
from trainer.interventions.steering import Add, Clamp, Scale, steer
from trainer.sae.sae import SAE
from trainer.training.run import RunRecord
from trainer.training.sweep import SweepProgress, train

__all__ = [
    "SAE",
    "Add",
    "Clamp",
    "Names",
    "RunRecord",
    "SAEConfig",
    "Scale",
    "SweepConfig",
    "SweepProgress",
    "TrainConfig",
    "encode_text",
    "evaluate",
    "evaluate_runs",
    "export_sae",
    "import_release",
    "import_sae",
    "load_sae",
    "logit_attribution",
    "logit_lens",
    "similar_features",
    "stability",
    "steer",
    "train",
]
