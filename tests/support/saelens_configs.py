"""Training configs of SAELens, as their users have them."""

from pathlib import Path
from typing import Any

# of SAELens 3.6.0 to 5.11.0, whose fields lie flat
FLAT_CALL = """
cfg = LanguageModelSAERunnerConfig(model_name="gpt2-small", hook_name="blocks.8.hook_resid_pre", hook_layer=8, d_in=768,
    architecture="standard", d_sae=768*8, activation_fn="relu", lr=4e-4, l1_coefficient=8e-5,
    l1_warm_up_steps=1000, train_batch_size_tokens=4096, training_tokens=100_000_000,
    dataset_path="monology/pile-uncopyrighted", context_size=128, log_to_wandb=True, wandb_project="sae-training",
    checkpoint_path="checkpoints", n_checkpoints=5)
"""


def flat_file(folder: Path) -> Path:
    path = folder / "train_sae.py"
    path.write_text(FLAT_CALL)
    return path


def runner_config(sae: Any, **changes: Any) -> Any:
    """SAELens' own object around the config of an SAE."""
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

    logger = LoggingConfig(log_to_wandb=False, wandb_log_frequency=20, eval_every_n_wandb_logs=7)
    settings = {"hook_name": "blocks.1.hook_resid_post", "dataset_path": "texts", "verbose": False, "logger": logger}
    return LanguageModelSAERunnerConfig(sae=sae, **(settings | changes))
