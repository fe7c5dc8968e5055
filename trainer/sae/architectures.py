"""The architectures side by side: their initial weights, and their forward pass of training.

The weights are a dict of leaf tensors. W_enc is [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_out] and b_dec [d_out];
d_out equals d_in except in a transcoder. jumprelu also has threshold [d_sae], and skip_transcoder W_skip [d_out, d_in].
gated has b_gate, b_mag and r_mag, all [d_sae], instead of b_enc. x is multiplied by the config's input_scale before it
comes here. A crosscoder's x holds the activations at all of its hooks, side by side.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer.config.settings import TRANSCODERS, SAEConfig, subtracts_b_dec
from trainer.kernels import active, select, sparse
from trainer.kernels.active import ActiveEntries, Workspace
from trainer.sae import activations

Weights = Mapping[str, Tensor]
LATENTS_AT_ONCE = 512  # latents whose pre-activations on the whole sample are in memory at a time
DENSEST_SPARSE = 1 / 8  # share of active entries above which gathers cost more than dense products


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SAEOutput:
    """What the forward pass of training hands to the losses.

    Attributes:
        pre_acts: the pre-activations of the active entries, one after another. Where `entries` is None they are those
            of all entries, [batch, d_sae]. gated has those of its gate here.
        feature_acts: the activations of the same entries.
        entries: which entries are active; None where the pass was dense.
        encoder_input: what W_enc multiplied, x or x - b_dec.
        x_hat: the reconstruction.
        prefix_x_hats: for matryoshka_batchtopk, x_hat from each prefix of the latents. The last one is x_hat.
    """

    pre_acts: Float[Tensor, "*entries"]
    feature_acts: Float[Tensor, "*entries"]
    entries: ActiveEntries | None
    encoder_input: Float[Tensor, "batch d_in"]
    x_hat: Float[Tensor, "batch d_out"]
    prefix_x_hats: Float[Tensor, "prefix batch d_in"] | None = None

    def firing_counts(self) -> Int[Tensor, " d_sae"]:
        """In how many rows of the batch each latent is active."""
        if self.entries is None:
            return torch.count_nonzero(self.feature_acts, dim=0)
        return active.firing_counts(self.feature_acts, self.entries)


def initial_weights(
    config: SAEConfig,
    b_dec: Float[Tensor, " d_out"],
    *,
    x_mean: Float[Tensor, " d_in"] | None = None,
    sample: Float[Tensor, "row d_in"] | None = None,
) -> dict[str, Tensor]:
    """The weights before the first step: float32 leaves that require gradients, on b_dec's device.

    The decoder has random directions, and W_enc [d_sae, d_in] begins as W_dec times encoder_init_scale. A transcoder's
    encoder has the random directions; its decoder and W_skip begin at 0. The directions are drawn on the CPU from a
    generator seeded with `config.seed`.

    Args:
        config: the SAE.
        b_dec: the initial b_dec, in units of the scaled rows that are reconstructed.
        x_mean: the mean of the scaled rows of x. With it a transcoder's b_enc begins at -W_enc E x; else b_enc is 0.
        sample: scaled rows of x. Where config.init_firing_rate is set, b_enc makes each latent fire on that share of
            these rows.
    """
    directions = _random_directions(config)
    b_enc = torch.zeros(config.d_sae)
    W_enc = directions * config.encoder_init_scale
    if x_mean is not None:
        b_enc = -(W_enc @ x_mean.float().cpu())
    if sample is not None and config.init_firing_rate is not None:
        b_enc = _firing_b_enc(config, config.init_firing_rate, W_enc, sample.float().cpu())
    biases = ("b_gate", "b_mag", "r_mag") if config.architecture == "gated" else ("b_enc",)
    is_transcoder = config.architecture in TRANSCODERS
    weights = {
        "W_enc": W_enc.clone(),
        **{name: b_enc.clone() for name in biases},
        "W_dec": torch.zeros(config.d_sae, config.d_out) if is_transcoder else directions,
        "b_dec": b_dec.float().clone(),
    }
    if config.architecture == "skip_transcoder":
        weights["W_skip"] = torch.zeros(config.d_out, config.d_in)
    if config.jumprelu_init_threshold is not None:
        weights["threshold"] = torch.full((config.d_sae,), config.jumprelu_init_threshold)
    return {name: weight.to(b_dec.device).requires_grad_() for name, weight in weights.items()}


def _random_directions(config: SAEConfig) -> Float[Tensor, "d_sae d_in"]:
    """Random rows of norm `decoder_init_norm`. Where that is None, entries are uniform within 1 / sqrt(d_in) of 0."""
    generator, shape = torch.Generator().manual_seed(config.seed), (config.d_sae, config.d_in)
    if config.decoder_init_norm is None:
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(config.d_in)
    directions = torch.randn(shape, generator=generator)
    return directions * (config.decoder_init_norm / directions.norm(dim=1, keepdim=True))


def _firing_b_enc(
    config: SAEConfig, rate: float, W_enc: Float[Tensor, "d_sae d_in"], sample: Float[Tensor, "row d_in"]
) -> Float[Tensor, " d_sae"]:
    """The b_enc with which each latent exceeds the threshold on the share `rate` of the sample's rows."""
    n_silent = max(1, len(sample) - max(1, round(rate * len(sample))))
    quantiles = [(sample @ rows.T).kthvalue(n_silent, dim=0).values for rows in W_enc.split(LATENTS_AT_ONCE)]
    return (config.jumprelu_init_threshold or 0.0) - torch.cat(quantiles)


def forward(
    config: SAEConfig,
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    workspace: Workspace,
    *,
    k: int | None = None,
) -> SAEOutput:
    """One forward pass of training. Gradients go to the weights, none to x.

    Args:
        config: the SAE.
        weights: as the module describes them.
        x: scaled rows, float32.
        workspace: holds the dense pre-activations of the batch.
        k: the number of active latents at this step; config.k if None.
    """
    return _FORWARD[config.architecture](config, weights, x, k or config.k or 0, workspace)


def _standard(config: SAEConfig, weights: Weights, x: Tensor, k: int, workspace: Workspace) -> SAEOutput:
    """f = ReLU(x W_enc^T + b_enc); x_hat = f W_dec + b_dec (Anthropic, "Circuits Updates - April 2024")."""
    all_pre_acts = select.encoder_pre_acts(x, weights["W_enc"], weights["b_enc"], workspace)
    pre_acts, entries = _sparse_if_few(all_pre_acts, all_pre_acts.new_zeros(()), x, weights["W_enc"], weights["b_enc"])
    return _decoded(pre_acts, activations.relu(pre_acts), entries, weights, x)


def _skip_transcoder(config: SAEConfig, weights: Weights, x: Tensor, k: int, workspace: Workspace) -> SAEOutput:
    """As standard, with W_skip x added to x_hat (Paulo et al. 2025, arXiv:2501.18823)."""
    output = _standard(config, weights, x, k, workspace)
    return replace(output, x_hat=output.x_hat + x @ weights["W_skip"].T)


def _topk(config: SAEConfig, weights: Weights, x: Tensor, k: int, workspace: Workspace) -> SAEOutput:
    """f = ReLU(TopK_k((x - b_dec) W_enc^T + b_enc)) (Gao et al. 2024, arXiv:2406.04093)."""
    encoder_input = x - weights["b_dec"].detach()
    pre_acts, entries = _topk_active(config, weights, encoder_input, k, workspace, by_magnitude=False)
    return _decoded(pre_acts, activations.relu(pre_acts), entries, weights, encoder_input)


def _abstopk(config: SAEConfig, weights: Weights, x: Tensor, k: int, workspace: Workspace) -> SAEOutput:
    """f = the k entries of (x - b_dec) W_enc^T + b_enc of largest magnitude, with their signs (arXiv:2510.00404)."""
    encoder_input = x - weights["b_dec"].detach()
    pre_acts, entries = _topk_active(config, weights, encoder_input, k, workspace, by_magnitude=True)
    return _decoded(pre_acts, pre_acts, entries, weights, encoder_input)


def _topk_active(
    config: SAEConfig, weights: Weights, encoder_input: Tensor, k: int, workspace: Workspace, *, by_magnitude: bool
) -> tuple[Tensor, ActiveEntries]:
    """(the pre-activations of the active entries, which entries these are)."""
    encoder = encoder_input, weights["W_enc"], weights["b_enc"]
    if config.encoder_dtype == "bfloat16":
        n_candidates = select.with_margin(k, config.d_sae)
        _, latents = select.topk_pre_acts(*_bfloat16(*encoder), n_candidates, workspace, by_magnitude=by_magnitude)
        exact = sparse.entry_pre_acts(topk_entries(latents, config.d_sae), *encoder).view_as(latents)
        values, latents = select.largest_of_candidates(exact, latents, k, by_magnitude=by_magnitude)
    else:
        values, latents = select.topk_pre_acts(*encoder, k, workspace, by_magnitude=by_magnitude)
    entries = topk_entries(latents, config.d_sae)
    return active_pre_acts(values.flatten(), entries, weights, encoder_input, config), entries


def _batchtopk(config: SAEConfig, weights: Weights, x: Tensor, k: int, workspace: Workspace) -> SAEOutput:
    """f = BatchTopK_k((x - b_dec) W_enc^T + b_enc) (Bussmann et al. 2024, arXiv:2412.06410)."""
    encoder_input, feature_acts, entries = _batchtopk_active(config, weights, x, k, workspace)
    return _decoded(feature_acts, feature_acts, entries, weights, encoder_input)


def _matryoshka(config: SAEConfig, weights: Weights, x: Tensor, k: int, workspace: Workspace) -> SAEOutput:
    """f as batchtopk; x_hat_g = b_dec + sum_{i < width_g} f_i d_i for each prefix g (Bussmann et al. 2025, 2503.17547).

    The latents between two prefixes are decoded into rows of their own, so that each entry is gathered once.
    """
    assert config.matryoshka_widths is not None
    encoder_input, feature_acts, entries = _batchtopk_active(config, weights, x, k, workspace)
    widths, batch = config.matryoshka_widths, len(x)
    n_parts = len(widths)
    # The widths are compared as numbers: a tensor of them would be copied to the device at each step.
    part = torch.stack([entries.latent >= width for width in widths]).sum(0)
    by_part = part.argsort(stable=True)
    parted = ActiveEntries.of(
        (part * batch + entries.row)[by_part], entries.latent[by_part], batch=n_parts * batch, d_sae=config.d_sae
    )
    added = sparse.sparse_decode(feature_acts[by_part], parted, weights["W_dec"]).view(n_parts, batch, -1)
    prefix_x_hats = weights["b_dec"] + added.cumsum(0)
    return SAEOutput(
        pre_acts=feature_acts,
        feature_acts=feature_acts,
        entries=entries,
        encoder_input=encoder_input,
        x_hat=prefix_x_hats[-1],
        prefix_x_hats=prefix_x_hats,
    )


def _batchtopk_active(
    config: SAEConfig, weights: Weights, x: Tensor, k: int, workspace: Workspace
) -> tuple[Tensor, Tensor, ActiveEntries]:
    """(encoder input, feature_acts of the active entries, which entries these are)."""
    encoder_input = x - weights["b_dec"].detach()
    encoder = encoder_input, weights["W_enc"], weights["b_enc"]
    if config.encoder_dtype == "bfloat16":
        all_pre_acts = select.encoder_pre_acts(*_bfloat16(*encoder), workspace)
        row, latent = select.batch_topk_entries(all_pre_acts, select.with_margin(k, config.d_sae))
        exact = sparse.entry_pre_acts(ActiveEntries.of(row, latent, batch=len(x), d_sae=config.d_sae), *encoder)
        chosen = select.largest(exact, k * len(x))
        values, row, latent = exact[chosen], row[chosen], latent[chosen]
    else:
        all_pre_acts = select.encoder_pre_acts(*encoder, workspace)
        row, latent = select.batch_topk_entries(all_pre_acts, k)
        values = all_pre_acts[row, latent]
    entries = ActiveEntries.of(row, latent, batch=len(x), d_sae=config.d_sae)
    return encoder_input, activations.relu(active_pre_acts(values, entries, weights, encoder_input, config)), entries


def _bfloat16(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.bfloat16(), W_enc.bfloat16(), b_enc.bfloat16()


def _gated(config: SAEConfig, weights: Weights, x: Tensor, k: int, workspace: Workspace) -> SAEOutput:
    """f = 1[pi > 0] ReLU(exp(r_mag) u + b_mag), u = (x - b_dec) W_enc^T, pi = u + b_gate (arXiv:2404.16014)."""
    W_enc, b_gate, encoder_input = weights["W_enc"], weights["b_gate"], x - weights["b_dec"].detach()
    all_gates = select.encoder_pre_acts(encoder_input, W_enc, b_gate, workspace)
    gate, entries = _sparse_if_few(all_gates, all_gates.new_zeros(()), encoder_input, W_enc, b_gate, weights["b_dec"])
    u = gate - per_entry(b_gate, entries)
    magnitude = u * per_entry(weights["r_mag"].exp(), entries) + per_entry(weights["b_mag"], entries)
    return _decoded(gate, activations.relu(magnitude) * (gate > 0), entries, weights, encoder_input)


def _jumprelu(config: SAEConfig, weights: Weights, x: Tensor, k: int, workspace: Workspace) -> SAEOutput:
    """f = h * H(h - theta), h = x W_enc^T + b_enc, theta = threshold (arXiv:2407.14435).

    The paper learns log theta. Here theta itself is learned and held at 0 or above, so that it answers the penalty in
    short runs too: Adam moves either by about lr a step, and such a step of log theta hardly moves a small theta.
    Entries less than a bandwidth below theta are active entries too: f is 0 there, but theta learns from them through
    the straight-through window.
    """
    assert config.jumprelu_bandwidth is not None
    W_enc, b_enc = weights["W_enc"], weights["b_enc"]
    bandwidth, threshold = config.jumprelu_bandwidth, weights["threshold"]
    all_pre_acts = select.encoder_pre_acts(x, W_enc, b_enc, workspace)
    if config.pre_act_loss_coefficient:  # this loss reaches every latent below its threshold
        pre_acts, entries = sparse.dense_pre_acts(all_pre_acts, x, W_enc, b_enc, None), None
    else:
        pre_acts, entries = _sparse_if_few(all_pre_acts, threshold.detach() - bandwidth, x, W_enc, b_enc)
    feature_acts = activations.jumprelu(pre_acts, per_entry(threshold, entries), bandwidth)
    return _decoded(pre_acts, feature_acts, entries, weights, x)


_FORWARD: dict[str, Callable[[SAEConfig, Weights, Tensor, int, Workspace], SAEOutput]] = {
    "standard": _standard,
    "topk": _topk,
    "abstopk": _abstopk,
    "batchtopk": _batchtopk,
    "matryoshka_batchtopk": _matryoshka,
    "jumprelu": _jumprelu,
    "gated": _gated,
    "transcoder": _standard,
    "skip_transcoder": _skip_transcoder,
    "crosscoder": _standard,
}


def per_entry(per_latent: Float[Tensor, " d_sae"], entries: ActiveEntries | None) -> Float[Tensor, "..."]:
    """Each latent's value, repeated for each entry of pre_acts or feature_acts."""
    return per_latent if entries is None else per_latent.index_select(0, entries.latent)


def topk_entries(latents: Int[Tensor, "batch k"], d_sae: int) -> ActiveEntries:
    """The active entries of a batch in which every row has k of them, given their latents."""
    batch, k = latents.shape
    row = torch.arange(batch, device=latents.device).repeat_interleave(k)
    return ActiveEntries.of(row, latents.flatten(), batch=batch, d_sae=d_sae)


def active_pre_acts(
    values: Float[Tensor, " active"],
    entries: ActiveEntries,
    weights: Weights,
    encoder_input: Float[Tensor, "batch d_in"],
    config: SAEConfig,
) -> Float[Tensor, " active"]:
    """`sparse.active_pre_acts` with these weights. b_dec gets a gradient where the architecture subtracts it from x."""
    b_dec = weights["b_dec"] if subtracts_b_dec(config.architecture) else None
    return sparse.active_pre_acts(values, entries, encoder_input, weights["W_enc"], weights["b_enc"], b_dec)


def _sparse_if_few(
    all_pre_acts: Tensor, cut: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None = None
) -> tuple[Tensor, ActiveEntries | None]:
    """(pre-activations, which entries these are): those above `cut` if they are few, else all of them and None.

    Their gradients go to W_enc, b_enc and b_dec, as `sparse.active_pre_acts` says.
    """
    batch, d_sae = all_pre_acts.shape
    is_active = select.exceeds(all_pre_acts, cut)
    # On CUDA this waits, which is worth it: without the count every step would be dense, at five times the FLOPs.
    n_active = active.count_true(is_active)
    if n_active > DENSEST_SPARSE * batch * d_sae:
        return sparse.dense_pre_acts(all_pre_acts, x, W_enc, b_enc, b_dec), None
    row, latent = active.indices_of_true(is_active, n_active)
    entries = ActiveEntries.of(row, latent, batch=batch, d_sae=d_sae)
    values = all_pre_acts[row, latent]
    return sparse.active_pre_acts(values, entries, x, W_enc, b_enc, b_dec), entries


def _decoded(
    pre_acts: Tensor, feature_acts: Tensor, entries: ActiveEntries | None, weights: Weights, encoder_input: Tensor
) -> SAEOutput:
    if entries is None:
        x_hat = torch.addmm(weights["b_dec"], feature_acts, weights["W_dec"])
    else:
        x_hat = sparse.sparse_decode(feature_acts, entries, weights["W_dec"]) + weights["b_dec"]
    return SAEOutput(
        pre_acts=pre_acts, feature_acts=feature_acts, entries=entries, encoder_input=encoder_input, x_hat=x_hat
    )
