"""SAELens, dictionary_learning and sparsify beside ours: the same weights, loss and update, and SAELens' runners.

Each peer trains on the device that the weights it is given lie on. autocast: its products in bfloat16, as its own
training has them on request; sparsify, which brings its own, has no such switch.

What differs is made equal where a setting or a public hook allows it. SAELens and dictionary_learning clip the
gradient's norm at 1 and minimise E||x - x_hat||^2 undivided: `comparable` puts our clipping and Adam's eps in these
units. SAELens ranks latents by the decoder's norms instead of holding them at 1: that is switched off, and its W_dec
gets our projection and renormalisation. sparsify does not clip; the parts that its trainer calls around the language
model's forward pass are called in its order, with its Adam. None of the three fuses Adam.

SAELens is in the extra `bench`. The other two are in none, for dictionary_learning pins an old nnsight, and that wants
torchvision and diffusers, none of which its training needs; measured with `pip install --no-deps dictionary-learning
"nnsight<0.4" python-socketio python-engineio bidict pillow eai-sparsify natsort schedulefree`.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array2D, Dataset, Features
from jaxtyping import Float, Int
from torch import Tensor

from actcache.store.cache import Cache
from trainer.config.settings import SAEConfig, subtracts_b_dec
from trainer.sae.architectures import Weights
from trainer.training.optimizer import remove_parallel_gradient_, unit_norm_rows_

Step = Callable[[Tensor], Tensor | float]  # one update on a batch of scaled x; E||x - x_hat||^2 before it
PROMPTS = 32  # sequences of SAELens' forward pass, and of its reads: its default
EPOCHS_WARNING = "All samples in the training dataset have been exhausted"


def comparable(config: SAEConfig) -> SAEConfig:
    """The config with gradients clipped at norm 1 and Adam's eps 1e-8, both in units of E||x - x_hat||^2."""
    unit = config.total_variance if config.k is not None else 1.0  # what our loss of the TopK family is divided by
    return replace(config, max_grad_norm=1 / unit, adam_eps=1e-8 / unit)


def saelens_trainer(
    config: SAEConfig, weights: Weights, batch_tokens: int, *, sparse: bool = False, autocast: bool = False
) -> Any:
    """SAELens' SAETrainer around an SAE that starts at our weights; without data, for `saelens_step`.

    Its schedules are the config's, whose learning rate warms up linearly if at all and is not annealed. sparse: topk's
    `use_sparse_activations`.
    """
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    assert config.lr_scheduler_name == "constant"
    assert config.lr_warm_up_name == "linear" or config.lr_warm_up_steps == 0
    settings = SAETrainerConfig(
        total_training_samples=config.training_tokens,
        train_batch_size_samples=batch_tokens,
        lr=config.lr,
        lr_end=config.lr / 10,
        lr_warm_up_steps=config.lr_warm_up_steps,
        lr_decay_steps=config.lr_decay_steps,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        dead_feature_window=config.dead_window // batch_tokens,  # steps there, tokens here
        device=str(weights["b_dec"].device),
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=settings, sae=saelens_sae(config, weights, sparse=sparse), data_provider=iter(()))
    for coefficient in trainer.coefficient_schedulers.values():
        coefficient.step()  # it would warm up from 0, ours begins a step later
    if config.has_unit_norm_decoder:
        W_dec = trainer.sae.W_dec
        W_dec.register_post_accumulate_grad_hook(remove_parallel_gradient_)
        trainer.optimizer.register_step_post_hook(lambda *_: unit_norm_rows_(W_dec))
    return trainer


def saelens_step(trainer: Any) -> Step:
    """What `SAETrainer.fit` does with a batch."""

    def step(x: Tensor) -> Tensor:
        output = trainer.step(x)
        trainer.n_training_steps += 1
        return output.losses["mse_loss"].detach()

    return step


def saelens_sae(config: SAEConfig, weights: Weights, *, sparse: bool = False) -> Any:
    """SAELens' TrainingSAE of the config (topk, batchtopk, standard, or jumprelu in mode step), at our weights."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    shared: dict[str, Any] = {
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "device": str(weights["b_dec"].device),
        "apply_b_dec_to_input": subtracts_b_dec(config.architecture),
    }
    warm_up_steps = config.sparsity_warm_up_steps
    ranked: dict[str, Any] = {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if config.architecture == "batchtopk":
        sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shared, **ranked))
    elif config.architecture == "topk":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shared, **ranked, use_sparse_activations=sparse))
    elif config.architecture == "standard":
        l1: dict[str, Any] = {"l1_coefficient": config.sparsity_coefficient, "l1_warm_up_steps": warm_up_steps}
        sae = StandardTrainingSAE(StandardTrainingSAEConfig(**shared, **l1))
    else:
        l0: dict[str, Any] = {"l0_coefficient": config.sparsity_coefficient, "l0_warm_up_steps": warm_up_steps}
        window: dict[str, Any] = {"jumprelu_bandwidth": config.jumprelu_bandwidth}
        sae = JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shared, **window, **l0))
    buffers = dict(sae.named_buffers())  # the threshold of batchtopk
    sae.load_state_dict(buffers | _saelens_weights(weights))
    return sae


def saelens_inference_sae(trainer: Any, config: SAEConfig, folder: Path) -> Any:
    """The trained SAE as SAELens saves it for inference in `folder` and loads it, for rows that are not scaled."""
    from sae_lens import SAE

    trainer.sae.fold_activation_norm_scaling_factor(config.input_scale)
    trainer.sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def _saelens_weights(weights: Weights) -> dict[str, Tensor]:
    """Under SAELens' names: W_enc as [d_in, d_sae]."""
    named = {name: weight.detach() for name, weight in weights.items()}
    named["W_enc"] = named["W_enc"].T
    return named


def dictionary_learning_step(config: SAEConfig, weights: Weights, *, autocast: bool = False) -> Step:
    """An update of dictionary_learning's TopKTrainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer  # pyright: ignore[reportMissingImports]: in no extra

    assert config.k is not None
    device = weights["b_dec"].device
    trainer = TopKTrainer(
        steps=config.n_steps,
        activation_dim=config.d_in,
        dict_size=config.d_sae,
        k=config.k,
        layer=0,
        lm_name="none",
        lr=config.lr,
        warmup_steps=0,
        device=str(device),
    )
    theirs = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "b_dec": "b_dec"}
    parameters = dict(trainer.ae.named_parameters())
    with torch.no_grad():
        for name, ours in theirs.items():
            parameters[name].copy_(weights[ours])
        parameters["decoder.weight"].copy_(weights["W_dec"].T)
    number = count(1)  # at step 0 it would move b_dec to the median of the batch

    def step(x: Tensor) -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            return float(trainer.update(next(number), x))

    return step


def sparsify_step(config: SAEConfig, weights: Weights) -> Step:
    """An update of sparsify's SparseCoder, as its Trainer makes it from the rows of one hook."""
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]: in no extra

    assert config.k is not None
    device, sizes = weights["b_dec"].device, SparseCoderConfig(num_latents=config.d_sae, k=config.k)
    sae = SparseCoder(config.d_in, sizes, device=device, dtype=torch.float32)
    theirs = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    sae.load_state_dict({name: weights[ours].detach() for name, ours in theirs.items()})
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr)
    tokens_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)

    def step(x: Tensor) -> Tensor:
        sae.set_decoder_norm_to_unit_norm()
        output = sae(x, dead_mask=tokens_since_fired > config.dead_window)
        (output.fvu + output.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        tokens_since_fired.add_(len(x))
        tokens_since_fired[output.latent_indices.flatten()] = 0
        return (output.sae_out.detach() - x).square().sum() / len(x)

    return step


def saelens_store(folder: Path, cache: Cache, *, batch_tokens: int, buffer_rows: int) -> Any:
    """SAELens' ActivationsStore over the cache's rows, which it gets in token order, as its cache runner leaves them.

    It serves float32 rows, unscaled, special tokens too, from a mixing buffer of `buffer_rows`, for ever.
    """
    from sae_lens import ActivationsStore, CacheActivationsRunnerConfig

    (hook_name,), context_size = cache.hook_names, cache.context_size
    in_order = _rows_in_token_order(cache)
    _, d_in = in_order.shape
    features = Features({hook_name: Array2D(shape=(context_size, d_in), dtype="float32")})
    sequences = in_order.view(-1, context_size, d_in).numpy()
    Dataset.from_dict({hook_name: list(sequences)}, features=features).save_to_disk(folder)
    config = CacheActivationsRunnerConfig(
        dataset_path="in memory",
        model_name="in memory",
        model_batch_size=batch_tokens // context_size,
        hook_name=hook_name,
        d_in=d_in,
        training_tokens=len(in_order),
        context_size=context_size,
        new_cached_activations_path=str(folder),
        device="cpu",
    )
    store = ActivationsStore.from_cache_activations(None, config)  # pyright: ignore[reportArgumentType]: reads the cache
    store.train_batch_size_tokens = batch_tokens
    store.n_batches_in_buffer = buffer_rows // context_size
    served = next(store)
    assert (torch.cdist(served[:4].double(), in_order.double()).amin(dim=1) == 0).all(), "SAELens serves other rows"
    warnings.filterwarnings("ignore", EPOCHS_WARNING)
    return store


def _rows_in_token_order(cache: Cache) -> Float[Tensor, "row d_in"]:
    n_rows, (hook_name,) = cache.n_rows(), cache.hook_names
    columns = [cache.token_reader("train", name).read(0, n_rows).astype(np.int64) for name in ("sequence", "position")]
    order = np.argsort(columns[0] * cache.context_size + columns[1])
    return cache.hook_reader("train", hook_name).read(0, n_rows)[torch.from_numpy(order)].float()


def saelens_model(folder: Path, hook_name: str) -> Any:
    """The causal model of a transformers folder, as SAELens' runners load it."""
    from sae_lens.load_model import load_model

    return load_model("AutoModelForCausalLM", str(folder), device="cpu", hook_names=[hook_name])


@dataclass(frozen=True, slots=True, kw_only=True)
class SAELensRunners:
    """SAELens' way from a causal model and token sequences to SAEs of one config, over all the sequences.

    model: of `saelens_model`; only the cache runner loads its own, from `model_folder`, each time.

    Rows are neither scaled nor left out, and nothing is logged. Its mixing buffer is as small as it can be, one forward
    pass of `PROMPTS` sequences, so that nothing is computed that is not served. Each run writes its SAEs with the
    optimizers' state.
    """

    model_folder: Path
    model: Any
    hook_name: str
    sequences: Int[np.ndarray, "sequence position"]
    config: SAEConfig
    batch_tokens: int

    def cache(self, out: Path) -> Any:
        """CacheActivationsRunner over the tokens, without its shuffle; the dataset it wrote."""
        from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

        n_tokens, context_size = self.sequences.size, self.sequences.shape[1]
        row_bytes = 4 * self.config.d_in
        config = CacheActivationsRunnerConfig(
            dataset_path="in memory",
            model_name=str(self.model_folder),
            model_class_name="AutoModelForCausalLM",
            model_batch_size=PROMPTS,
            hook_name=self.hook_name,
            d_in=self.config.d_in,
            training_tokens=n_tokens,
            context_size=context_size,
            new_cached_activations_path=str(out),
            shuffle=False,
            buffer_size_gb=(n_tokens + 1) * row_bytes / 1e9,  # one buffer, so that it is full
            device="cpu",
            prepend_bos=False,
        )
        with _quiet():
            return CacheActivationsRunner(config, override_dataset=self._dataset()).run()

    def train_one(self, weights: Weights, out: Path, cached: Path | None = None) -> None:
        """LanguageModelSAETrainingRunner: from the cache of `cache`, or with the model's forward pass."""
        from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner

        sae = saelens_sae(self.config, weights)
        config = LanguageModelSAERunnerConfig(
            sae=sae.cfg,
            hook_name=self.hook_name,
            use_cached_activations=cached is not None,
            cached_activations_path=None if cached is None else str(cached),
            verbose=False,
            **self._shared(out),
        )
        with _quiet():
            LanguageModelSAETrainingRunner(
                config, override_dataset=self._dataset(), override_model=self.model, override_sae=sae
            ).run()

    def train_many(self, weights: Sequence[Weights], out: Path) -> None:
        """MultiSAETrainingRunner, which runs the model once for all SAEs and has no cached mode."""
        from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig

        saes = {f"sae-{number}": saelens_sae(self.config, start) for number, start in enumerate(weights)}
        config = MultiSAETrainingRunnerConfig(
            saes={name: sae.cfg for name, sae in saes.items()}, hook_names=self.hook_name, **self._shared(out)
        )
        with _quiet():
            MultiSAETrainingRunner(
                config, override_dataset=self._dataset(), override_model=self.model, override_saes=saes
            ).run()

    def _shared(self, out: Path) -> dict[str, Any]:
        """What the two training runners take alike."""
        from sae_lens.config import LoggingConfig

        return {
            "model_name": str(self.model_folder),
            "model_class_name": "AutoModelForCausalLM",
            "dataset_path": "in memory",
            "streaming": False,
            "context_size": self.sequences.shape[1],
            "prepend_bos": False,
            "training_tokens": self.sequences.size,
            "store_batch_size_prompts": PROMPTS,
            "n_batches_in_buffer": PROMPTS,  # it counts sequences
            "train_batch_size_tokens": self.batch_tokens,
            "lr": self.config.lr,
            "adam_beta1": self.config.adam_beta1,
            "adam_beta2": self.config.adam_beta2,
            "device": "cpu",
            "logger": LoggingConfig(log_to_wandb=False),
            "save_final_checkpoint": True,
            "checkpoint_path": str(out / "checkpoint"),
            "output_path": str(out / "sae"),
        }

    def _dataset(self) -> Dataset:
        return Dataset.from_dict({"input_ids": self.sequences.tolist()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without SAELens' warnings on short runs, and with the signal handlers that its runners replace put back."""
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)
