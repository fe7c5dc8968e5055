"""trainer: batches -> SAEs -> metrics -> report. One pass over a cache trains many sparse autoencoders.

Each name is imported when it is first asked for: `actcache --help` must not wait for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actcache.lazy import lazily

if TYPE_CHECKING:
    from trainer.config.saelens import sweep_from_saelens
    from trainer.config.settings import SAEConfig, TrainConfig
    from trainer.config.sweep import SweepConfig
    from trainer.evaluation.evaluate import evaluate, evaluate_runs
    from trainer.features.attribution import logit_attribution
    from trainer.features.build import build_features
    from trainer.features.logit_lens import logit_lens
    from trainer.features.read import open_features
    from trainer.features.similarity import similar_features, stability
    from trainer.features.text import encode_text
    from trainer.formats.foreign import Names
    from trainer.formats.imports import import_release, import_sae
    from trainer.formats.saelens import export_sae, load_sae
    from trainer.interventions.feature_attribution import attribution
    from trainer.interventions.splice import Add, Clamp, Patch, Scale, Splice, spliced
    from trainer.interventions.steering import steer
    from trainer.publish.neuronpedia import export_neuronpedia
    from trainer.report.report import write_report
    from trainer.sae.sae import SAE
    from trainer.training.run import RunRecord
    from trainer.training.sweep import SweepProgress, plan, train

__all__ = [
    "SAE",
    "Add",
    "Clamp",
    "Names",
    "Patch",
    "RunRecord",
    "SAEConfig",
    "Scale",
    "Splice",
    "SweepConfig",
    "SweepProgress",
    "TrainConfig",
    "attribution",
    "build_features",
    "encode_text",
    "evaluate",
    "evaluate_runs",
    "export_neuronpedia",
    "export_sae",
    "import_release",
    "import_sae",
    "load_sae",
    "logit_attribution",
    "logit_lens",
    "open_features",
    "plan",
    "similar_features",
    "spliced",
    "stability",
    "steer",
    "sweep_from_saelens",
    "train",
    "write_report",
]

__getattr__ = lazily(
    __name__,
    {
        "sweep_from_saelens": "trainer.config.saelens",
        **dict.fromkeys(("SAEConfig", "TrainConfig"), "trainer.config.settings"),
        "SweepConfig": "trainer.config.sweep",
        **dict.fromkeys(("evaluate", "evaluate_runs"), "trainer.evaluation.evaluate"),
        "logit_attribution": "trainer.features.attribution",
        "build_features": "trainer.features.build",
        "logit_lens": "trainer.features.logit_lens",
        "open_features": "trainer.features.read",
        **dict.fromkeys(("similar_features", "stability"), "trainer.features.similarity"),
        "encode_text": "trainer.features.text",
        "Names": "trainer.formats.foreign",
        **dict.fromkeys(("import_release", "import_sae"), "trainer.formats.imports"),
        **dict.fromkeys(("export_sae", "load_sae"), "trainer.formats.saelens"),
        "attribution": "trainer.interventions.feature_attribution",
        **dict.fromkeys(("Add", "Clamp", "Patch", "Scale", "Splice", "spliced"), "trainer.interventions.splice"),
        "steer": "trainer.interventions.steering",
        "export_neuronpedia": "trainer.publish.neuronpedia",
        "write_report": "trainer.report.report",
        "SAE": "trainer.sae.sae",
        "RunRecord": "trainer.training.run",
        **dict.fromkeys(("SweepProgress", "plan", "train"), "trainer.training.sweep"),
    },
)
