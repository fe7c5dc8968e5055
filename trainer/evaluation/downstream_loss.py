"""The downstream loss: what a language model predicts when an SAE's reconstruction replaces an activation.

The model runs over each batch of sequences in four kinds of passes. The original pass runs once, and the activations
that the SAEs take are read in it. A pass with zeros and a pass with the mean run once for each hook. A pass with a
reconstruction runs once for each SAE. A pass that replaces an activation begins at the block of its hook, if the model
can do that, because nothing before it has changed.

The losses of the original pass and of the ablations are the same for every SAE of a cache. Their sums are stored below
CACHE/log/losses, and later calls run no ablation. KL(original || new) needs the original probabilities of the whole
vocabulary at every token, which would be 6.6 GB for 32,768 tokens of GPT-2. They are not stored, so every call runs the
original pass, once for all SAEs.

Zero ablation puts zeros at every token, as SAELens does. Mean ablation puts the mean where an SAE puts its
reconstruction: at the tokens that count. So it is the best SAE without latents. The mean is that of the whole
validation split, from the cache's statistics: explained_variance compares with the same mean, and no pass is needed to
find it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int32, Int64
from torch import Tensor

from actcache.errors import DatasetError
from actcache.machine.limits import require_memory_for_array
from actcache.store.cache import Cache
from trainer.evaluation.pca import PCA
from trainer.evaluation.stored_losses import LossSums, read_sums, store_sums
from trainer.sae.metrics import ce_loss_score, kl_div_score
from trainer.sae.sae import SAE
from trainer.sae.streams import Model as StreamModel

BATCH_TOKENS = 2048  # tokens that run through the model at a time, in whole sequences
PIECE_VALUES = 1 << 24  # numbers of a [row, d_sae] or [token, vocab] matrix made at a time: 64 MiB as float32
CPU_VOCAB_VALUES = 1 << 20  # numbers of a [token, vocab] matrix on a CPU: they stay in its cache, three times as fast
KEY_VERSION = 1  # raised when the stored numbers change their meaning
MODEL_METRICS = (  # None where no model was given
    "n_model_tokens",
    "ce_loss_score",
    "ce_loss_score_vs_mean",
    "ce_loss_increase",
    "ce_loss_without_sae",
    "ce_loss_with_sae",
    "ce_loss_with_ablation",
    "ce_loss_with_mean_ablation",
    "ce_loss_by_position",
    "kl_div_score",
    "kl_div_with_sae",
    "kl_div_with_ablation",
    "kl_div_with_mean_ablation",
    "top1_agreement",
)
ZEROS, MEAN = "zeros", "mean"  # what an ablation puts in the place of a hook's activation

Channels = tuple[int, int] | None  # of an activation, from the first to the one after the last; None for all
Ablation = tuple[str, str, Channels]  # the hook, ZEROS or MEAN, and the channels that are ablated
PassName = int | Ablation | None  # the index of an SAE, an ablation, or None for the original pass


@runtime_checkable
class Model(StreamModel, Protocol):
    """What evaluation needs of a language model. `actcache.models.language_model.LanguageModel` is one."""

    identity: dict[str, Any]
    device: torch.device
    backend: str
    attention_kernel: str
    compiled: bool
    vocab_size: int

    def differences(self, there: Mapping[str, Any]) -> list[str]:
        """What makes the model of a cache another one than this, in words. there: `model` of its identity."""
        ...

    def probe(self) -> dict[str, Any]:
        """A few values of one forward pass over fixed tokens, as JSON values."""
        ...

    def logits(
        self,
        token_ids: Int[Tensor, "sequence position"],
        *,
        hook_fns: Mapping[str, Callable[[Tensor], None]] | None = None,
    ) -> Float[Tensor, "sequence position vocab"]:
        """Logits of the whole model. hook_fns: for a hook name, a function that is called with its activation."""
        ...

    def logits_with(
        self, token_ids: Int[Tensor, "sequence position"], hook_name: str, replace: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "sequence position vocab"]:
        """Logits when the hook's activation [sequence, position, d_in] is replaced by `replace` of it."""
        ...

    def logits_from(
        self,
        token_ids: Int[Tensor, "sequence position"],
        start: Float[Tensor, "sequence position d_model"],
        hook_name: str,
        replace: Callable[[Tensor], Tensor],
    ) -> Float[Tensor, "sequence position vocab"]:
        """As `logits_with`, begun with the activation `start` at the hook `stream_before(hook_name)`."""
        ...

    def stream_before(self, hook_name: str) -> str | None:
        """The hook where `logits_from` begins; None if every pass begins at the embedding."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batch:
    """What the original pass over some sequences leaves for the passes that are compared with it.

    Attributes:
        token_ids: the sequences.
        counts: which tokens count: those that are not special, or all.
        log_p: the log-probabilities of the next token, at least float32.
        top: the likeliest next token.
        seen: the activations that hook functions have seen, by hook.
    """

    token_ids: Int[Tensor, "sequence position"]
    counts: Bool[Tensor, "sequence position"]
    log_p: Float[Tensor, "sequence position vocab"]
    top: Int[Tensor, "sequence position"]
    seen: Mapping[str, Tensor]


def piece_rows(width: int, most_values: int | None = None) -> int:
    """How many rows of a matrix of this width hold `most_values` numbers (PIECE_VALUES if None); at least one."""
    return max(1, (most_values or PIECE_VALUES) // width)


def require_memory_for_logits(model: Model, sequences: Int32[np.ndarray, "sequence position"]) -> None:
    """Raise MemoryError if a model on a CPU has no room for what `model_metrics` takes of it for these sequences."""
    if model.device.type == "cpu":
        n_tokens = min(sequences.size, _batch_sequences(sequences) * sequences.shape[1])
        n_bytes = 2 * n_tokens * model.vocab_size * torch.float32.itemsize  # log-probabilities and logits
        require_memory_for_array(n_bytes, f"the logits of {n_tokens:,} tokens")


def model_metrics(
    saes: Sequence[SAE | PCA],
    cache: Cache,
    model: Model,
    sequences: Int32[np.ndarray, "sequence position"],
    *,
    exclude_special_tokens: bool = True,
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """MODEL_METRICS of each SAE, over the first validation sequences of the cache.

    All metrics of a crosscoder are None, because a pass replaces the activation at one hook only.

    Besides the model's memory, this takes the log-probabilities of the original pass and the logits of another pass,
    both [token, vocab] for BATCH_TOKENS tokens (or one sequence, if that is longer), and a few pieces of PIECE_VALUES
    numbers.

    Args:
        saes: the SAEs.
        cache: the cache of the sequences; sums are stored below it.
        model: the language model of the cache.
        sequences: the first sequences of the validation split.
        exclude_special_tokens: special tokens keep their activations and are left out of the means.
        progress: called with the number of tokens done.

    Returns:
        One dict for each SAE, in their order.

    Raises:
        DatasetError: no token that counts has a next one.
    """
    judged = {index: sae for index, sae in enumerate(saes) if len(sae.output_hooks) == 1}
    if not judged:
        return [dict.fromkeys(MODEL_METRICS) for _ in saes]
    counts = ~np.isin(sequences, cache.special_token_ids if exclude_special_tokens else ())
    if not counts[:, :-1].any():
        raise DatasetError(
            f"evaluate: {cache.path}: of the first {sequences.size} validation tokens none that counts has a next one; "
            "raise model_tokens or harvest longer sequences"
        )
    row_filter = "no_special_tokens" if exclude_special_tokens else "all"
    sums, n_agreeing = _all_sums(judged, cache, model, sequences, counts, row_filter, progress)
    metrics: list[dict[str, Any]] = [dict.fromkeys(MODEL_METRICS) for _ in saes]
    for index, sae in judged.items():
        hook_name, channels = _target(sae, cache)
        ablations = {kind: sums[hook_name, kind, channels] for kind in (ZEROS, MEAN)}
        metrics[index] = _metrics(counts, sums[None], ablations, sums[index], n_agreeing[index])
    return metrics


def _all_sums(
    saes: Mapping[int, SAE | PCA],
    cache: Cache,
    model: Model,
    sequences: Int32[np.ndarray, "sequence position"],
    counts: Bool[np.ndarray, "sequence position"],
    row_filter: str,
    progress: Callable[[int], None] | None,
) -> tuple[dict[PassName, LossSums], Counter[PassName]]:
    """The sums of all passes. Those without an SAE are read if an earlier call stored them, and stored if not.

    row_filter: of which rows the mean is, "no_special_tokens" or "all".

    Returns:
        The sums, and as `_run` at how many tokens a pass keeps the likeliest next token.
    """
    targets = dict.fromkeys(_target(sae, cache) for sae in saes.values())
    names: list[Ablation | None] = [None]
    names += [(hook_name, kind, channels) for (hook_name, channels), kind in product(targets, (ZEROS, MEAN))]
    keys = {name: _key(cache, model, counts, name, row_filter) for name in names}
    known = {name: sums for name, key in keys.items() if (sums := read_sums(cache, key)) is not None}
    unknown = [name for name in names if name not in known]
    means = {
        name[0]: torch.from_numpy(cache.statistics(name[0], split="validation", row_filter=row_filter).mean)
        for name in unknown
        if name is not None and name[1] == MEAN
    }
    made, n_agreeing = _run(saes, model, sequences, counts, unknown, means, progress)
    for name in unknown:
        store_sums(cache, keys[name], made[name])
    return made | known, n_agreeing


def _run(
    saes: Mapping[int, SAE | PCA],
    model: Model,
    sequences: Int32[np.ndarray, "sequence position"],
    counts: Bool[np.ndarray, "sequence position"],
    without_sae: Sequence[Ablation | None],
    means: Mapping[str, Float64[Tensor, " d_in"]],
    progress: Callable[[int], None] | None,
) -> tuple[dict[PassName, LossSums], Counter[PassName]]:
    """Run every SAE's pass and those of `without_sae` (None for the original) over the sequences.

    means: what mean ablation puts at each hook.

    Returns:
        The sums of each pass, and of each but the original at how many tokens that count it keeps the likeliest next
        token.
    """
    hook_names = _hooks_to_see(saes.values(), model)
    totals: dict[PassName, LossSums] = {}
    n_agreeing: Counter[PassName] = Counter()
    n_sequences, n_done = _batch_sequences(sequences), 0
    for ids, mask in zip(*(torch.from_numpy(each).split(n_sequences) for each in (sequences, counts)), strict=True):
        ids, mask = ids.to(model.device, torch.long), mask.to(model.device)
        # The batch gets no name here, which would keep its memory while the next one is made.
        passes = _passes(model, _original_pass(model, ids, mask, hook_names), saes, without_sae, means)
        for name, sums, n_kept in passes:
            totals[name] = totals[name].merge(sums) if name in totals else sums
            n_agreeing[name] += n_kept
        n_done += ids.numel()
        if progress is not None:
            progress(n_done)
    return totals, n_agreeing


def _batch_sequences(sequences: Int32[np.ndarray, "sequence position"]) -> int:
    """How many sequences run through the model at a time."""
    return max(1, BATCH_TOKENS // sequences.shape[1])


def _hooks_to_see(saes: Iterable[SAE | PCA], model: Model) -> list[str]:
    """The hooks whose activations the SAEs take, and those at which the passes of their outputs can begin."""
    hook_names: dict[str, None] = {}
    for sae in saes:
        start = model.stream_before(sae.output_hooks[0])
        hook_names |= dict.fromkeys((sae.input_hooks[0], *(() if start is None else (start,))))
    return list(hook_names)


def _original_pass(
    model: Model,
    token_ids: Int[Tensor, "sequence position"],
    counts: Bool[Tensor, "sequence position"],
    hook_names: Sequence[str],
) -> _Batch:
    seen: dict[str, Tensor] = {}
    hook_fns = {name: lambda x, name=name: seen.update({name: x}) for name in hook_names}
    log_p = _log_softmax(model.logits(token_ids, hook_fns=hook_fns))
    return _Batch(token_ids=token_ids, counts=counts, log_p=log_p, top=log_p.argmax(-1), seen=seen)


def _passes(
    model: Model,
    batch: _Batch,
    saes: Mapping[int, SAE | PCA],
    without_sae: Sequence[Ablation | None],
    means: Mapping[str, Float64[Tensor, " d_in"]],
) -> Iterator[tuple[PassName, LossSums, int]]:
    for name in without_sae:
        if name is None:
            yield None, _original_sums(batch), int(batch.counts.sum())
        else:
            hook_name, kind, channels = name
            ablated = partial(_ablated, None if kind == ZEROS else means[hook_name], channels)
            replace = ablated if kind == ZEROS else _where_it_counts(batch, ablated)
            yield name, *_sums(batch, _replaced(model, batch, hook_name, replace))
    for index, sae in saes.items():
        replace = _where_it_counts(batch, partial(_placed, sae, _reconstruction(sae, batch)))
        yield index, *_sums(batch, _replaced(model, batch, sae.output_hooks[0], replace))


def _target(sae: SAE | PCA, cache: Cache) -> tuple[str, Channels]:
    """The hook whose activation an SAE reconstructs, and which channels of it: those of one head, or all."""
    hook_name = sae.output_hooks[0]
    return hook_name, sae.own_channels(cache.hook(hook_name).d_in)


def _ablated(mean: Float64[Tensor, " width"] | None, channels: Channels, y: Tensor) -> Tensor:
    """The activation with the mean, or zeros, in these channels."""
    other = torch.zeros_like(y) if mean is None else mean.to(y).expand_as(y)
    if channels is None:
        return other
    first, end = channels
    return torch.cat([y[..., :first], other[..., first:end], y[..., end:]], dim=-1)


def _replaced(
    model: Model, batch: _Batch, hook_name: str, replace: Callable[[Tensor], Tensor]
) -> Float[Tensor, "sequence position vocab"]:
    start = model.stream_before(hook_name)
    if start is None:
        return model.logits_with(batch.token_ids, hook_name, replace)
    return model.logits_from(batch.token_ids, batch.seen[start], hook_name, replace)


def _reconstruction(sae: SAE | PCA, batch: _Batch) -> Float[Tensor, "sequence position d_out"]:
    """The SAE's reconstruction. Its input is from the original pass, because a transcoder reads another hook."""
    x = batch.seen[sae.input_hooks[0]].flatten(0, 1).to(sae.device)  # (sequence * position, d_in)
    y_hat = torch.cat([sae.reconstruct(rows)[1] for rows in x.split(piece_rows(sae.d_sae))])
    return y_hat.unflatten(0, batch.counts.shape)


def _placed(sae: SAE | PCA, y_hat: Float[Tensor, "sequence position d_out"], y: Tensor) -> Tensor:
    """The activation y with the reconstruction in it."""
    return sae.placed(y, y_hat.to(y.device))


def _where_it_counts(batch: _Batch, other: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that replaces an activation y by `other(y)` at the tokens that count."""
    return lambda y: torch.where(batch.counts[..., None].to(y.device), other(y).to(y), y)


def _log_softmax(logits: Float[Tensor, "*token vocab"]) -> Float[Tensor, "*token vocab"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _original_sums(batch: _Batch) -> LossSums:
    """The sums of the original pass. Its divergence from itself is 0."""
    ce = -batch.log_p[:, :-1].gather(-1, batch.token_ids[:, 1:, None])[..., 0]
    return LossSums(ce=_by_position(ce, batch.counts), kl=0.0)


def _sums(batch: _Batch, logits: Float[Tensor, "sequence position vocab"]) -> tuple[LossSums, int]:
    """The sums of a pass with these logits, and at how many tokens the likeliest next token is the original's."""
    shape, vocab = batch.token_ids.shape, logits.shape[-1]
    ce, kl, agrees = [], [], []
    rows = piece_rows(vocab, None if logits.is_cuda else CPU_VOCAB_VALUES)
    predicted = batch.token_ids.roll(
        -1, dims=1
    ).flatten()  # the last position, which predicts nothing, is dropped below
    by_token = (batch.log_p.flatten(0, 1), logits.flatten(0, 1), predicted, batch.top.flatten())
    for log_p, part, ids, top in zip(*(each.split(rows) for each in by_token), strict=True):
        log_q = _log_softmax(part)
        ce.append(-log_q.gather(-1, ids[:, None])[:, 0])
        kl.append(torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
        agrees.append(log_q.gather(-1, top[:, None])[:, 0] == log_q.amax(-1))  # amax takes a tenth of argmax's time
    divergence = torch.cat(kl).view(shape)[batch.counts].sum(dtype=torch.float64)
    sums = LossSums(ce=_by_position(torch.cat(ce).view(shape)[:, :-1], batch.counts), kl=float(divergence))
    return sums, int(torch.cat(agrees).view(shape)[batch.counts].sum())


def _by_position(
    ce: Float[Tensor, "sequence predicting"], counts: Bool[Tensor, "sequence position"]
) -> Float64[Tensor, " predicting"]:
    return torch.where(counts[:, :-1], ce, 0.0).sum(0, dtype=torch.float64).cpu()


def _metrics(
    counts: Bool[np.ndarray, "sequence position"],
    original: LossSums,
    ablations: Mapping[str, LossSums],
    replaced: LossSums,
    n_agreeing: int,
) -> dict[str, Any]:
    n_tokens, n_sequences = int(counts.sum()), counts[:, :-1].sum(0)
    passes = {"without_sae": original, "with_sae": replaced, "with_ablation": ablations[ZEROS]}
    losses = {f"ce_loss_{name}": float(sums.ce.sum()) / int(n_sequences.sum()) for name, sums in passes.items()}
    with_mean = float(ablations[MEAN].ce.sum()) / int(n_sequences.sum())
    divergences = {"kl_div_with_sae": replaced.kl / n_tokens, "kl_div_with_ablation": ablations[ZEROS].kl / n_tokens}
    by_position = {name: _means(sums.ce, n_sequences) for name, sums in passes.items()}
    return {
        "n_model_tokens": n_tokens,
        **losses,
        "ce_loss_with_mean_ablation": with_mean,
        "ce_loss_increase": losses["ce_loss_with_sae"] - losses["ce_loss_without_sae"],
        **divergences,
        "kl_div_with_mean_ablation": ablations[MEAN].kl / n_tokens,
        "ce_loss_score": ce_loss_score(**losses),
        "ce_loss_score_vs_mean": ce_loss_score(**losses | {"ce_loss_with_ablation": with_mean}),
        "kl_div_score": kl_div_score(**divergences),
        "top1_agreement": n_agreeing / n_tokens,
        "ce_loss_by_position": {"n_sequences": n_sequences.tolist(), **by_position},
    }


def _means(sums: Float64[Tensor, " position"], n_sequences: Int64[np.ndarray, " position"]) -> list[float | None]:
    """A mean for each position; None where no token counts, or where it is not finite."""
    pairs = zip(sums.tolist(), n_sequences.tolist(), strict=True)
    return [total / count if count and math.isfinite(total) else None for total, count in pairs]


def _key(
    cache: Cache,
    model: Model,
    counts: Bool[np.ndarray, "sequence position"],
    name: Ablation | None,
    row_filter: str,
) -> dict[str, Any]:
    """Everything on which the bits of the sums depend."""
    hook_name, kind, channels = name or (None, ZEROS, None)
    mean = {"mean_ablated": hook_name, "row_filter": row_filter}
    return {
        "version": KEY_VERSION,
        "cache_fingerprint": cache.fingerprint,
        "model": {**model.identity, "probe": model.probe()},
        "device": model.device.type,
        "torch": torch.__version__,
        "backend": model.backend,
        "attention": model.attention_kernel,
        "compiled": model.compiled,
        "n_sequences": len(counts),
        "n_tokens": int(counts.sum()),
        **(mean if kind == MEAN else {"zero_ablated": hook_name}),
        **({} if channels is None else {"channels": list(channels)}),
    }
