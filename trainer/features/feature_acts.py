"""Sparse feature activations: how a batch of rows is encoded to them, and the file that holds those of many tokens.

`SparseEncoder` gives the entries of a batch that are not zero; no dense copy of the split is ever made. `Codes` are the
entries of consecutive tokens, in one safetensors file with the same fields. The file is mapped when it is read, so only
what is looked at is loaded. It holds the entries both by token and by latent, because both are asked for.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor

from actcache.errors import ManifestError, NonFiniteActivations
from actcache.files import NoFile, write_atomically
from trainer.checksums import CHECKSUMS_FILE, Checksums, MappedFile, add_checksums, checksums_of
from trainer.kernels.active import ActiveEntries, Workspace
from trainer.kernels.select import encoder_pre_acts, exceeds, topk_chunk_rows, topk_pre_acts
from trainer.sae.sae import GROUPED, SAE
from trainer.tensor_file import mapped_arrays

MAX_ROWS = 4096  # rows encoded at a time; more make the product no faster
WAY_OUT = "remove {} and build it anew"

Entries = tuple[Int[Tensor, " entry"], Int[Tensor, " entry"], Float[Tensor, " entry"]]  # row, latent, activation


class SparseEncoder:
    """`SAE.encode` without its zeros, to within the rounding of the weights' dtype.

    The pre-activations of every batch use one buffer, [batch, d_sae] of the weights' dtype. The entries that fire take
    at most as many bytes. An SAE without b_enc, such as gated, is encoded densely, in five such buffers; so is one that
    takes groups, or normalises each row.
    """

    def __init__(self, sae: SAE):
        self._sae, self._workspace = sae, Workspace()
        self._is_signed = sae.architecture == "abstopk"
        b_enc = sae.W_enc.new_zeros(sae.d_sae) if sae.b_enc is None else sae.b_enc
        scale = sae.W_dec.norm(dim=-1) if sae.rescale_acts_by_decoder_norm else None
        self._W_enc = (sae.W_enc if scale is None else sae.W_enc * scale).T
        self._b_enc = b_enc if scale is None else b_enc * scale
        self._cut = b_enc.new_zeros(()) if sae.threshold is None else sae.threshold.clamp_min(0)

    @property
    def batch_rows(self) -> int:
        """How many rows to encode at a time."""
        return min(MAX_ROWS, topk_chunk_rows(self._sae.d_sae, is_cuda=self._sae.device.type == "cuda"))

    @torch.no_grad()
    def entries(self, x: Float[Tensor, "batch d_in"]) -> Entries:
        """(row, latent, activation) of all entries that are not zero, with ascending rows, on the SAE's device.

        x: raw activations of any float dtype, on any device.

        Raises:
            NonFiniteActivations: an activation is NaN or infinite.
        """
        sae = self._sae
        x = x.to(sae.device)
        if sae.b_enc is None or sae.normalize_activations != "none" or sae.architecture in GROUPED:
            row, latent, act = _nonzero(sae.encode(x))
        else:
            x = sae.seen(x).to(sae.W_enc.dtype)
            row, latent, act = self._fired(x - sae.b_dec if sae.subtracts_b_dec else x)
        if not act.isfinite().all():
            raise NonFiniteActivations(
                f"{sae.hook_name}: activations of latents must be finite, got NaN or infinity from {sae.W_enc.dtype} "
                "weights; is the SAE of this hook, and its dtype wide enough?"
            )
        return row, latent, act

    def _fired(self, x: Float[Tensor, "batch d_in"]) -> Entries:
        if self._sae.k is None:
            pre_acts = encoder_pre_acts(x, self._W_enc, self._b_enc, self._workspace)
            row, latent = exceeds(pre_acts, self._cut).nonzero(as_tuple=True)
            return row, latent, pre_acts[row, latent]
        values, latents = topk_pre_acts(
            x, self._W_enc, self._b_enc, self._sae.k, self._workspace, by_magnitude=self._is_signed
        )
        row, rank = (values != 0 if self._is_signed else exceeds(values, self._cut)).nonzero(as_tuple=True)
        return row, latents[row, rank], values[row, rank]


def _nonzero(feature_acts: Float[Tensor, "batch d_sae"]) -> Entries:
    row, latent = feature_acts.nonzero(as_tuple=True)
    return row, latent, feature_acts[row, latent]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Codes:
    """The entries that fire on tokens first_token, first_token + 1, ... of a split.

    Token t below is the t-th of these tokens.

    The arrays are parts of the mapped file, and their bytes may be damaged. The methods check what they read.

    Attributes:
        file: the file that holds them.
        first_token: number of the first token in the split.
        token_id: the id of each token.
        token_start: token t has the entries token_start[t] : token_start[t + 1] of `latent` and `act`, in no order.
        latent: the latent of each entry, by token.
        act: the activation of each entry, by token.
        latent_start: latent i has the entries latent_start[i] : latent_start[i + 1] of `token_by_latent` and
            `act_by_latent`, with ascending tokens.
        token_by_latent: the token of each entry, by latent.
        act_by_latent: the activation of each entry, by latent.
    """

    file: MappedFile
    first_token: int
    token_id: Int32[np.ndarray, " token"]
    token_start: Int64[np.ndarray, " token_plus_1"]
    latent: Int32[np.ndarray, " entry"]
    act: Float32[np.ndarray, " entry"]
    latent_start: Int64[np.ndarray, " d_sae_plus_1"]
    token_by_latent: Int32[np.ndarray, " entry"]
    act_by_latent: Float32[np.ndarray, " entry"]

    @property
    def stop(self) -> int:
        """One past the last token."""
        return self.first_token + len(self.token_id)

    def of_latent(
        self, latent: int
    ) -> tuple[Int32[np.ndarray, " entry_of_latent"], Float32[np.ndarray, " entry_of_latent"]]:
        """(tokens, activations) of a latent's entries, with ascending tokens. Raises ManifestError for damage."""
        start, stop = self._checked(self.latent_start[latent : latent + 2]).tolist()
        self._require(0 <= start <= stop <= len(self.token_by_latent), "latent_start")
        tokens = self._checked(self.token_by_latent[start:stop])
        acts = self._checked(self.act_by_latent[start:stop])
        within = len(tokens) == 0 or (tokens[0] >= 0 and tokens[-1] < len(self.token_id))
        self._require(within and (tokens[1:] > tokens[:-1]).all(), "token_by_latent")
        self._require(np.isfinite(acts).all(), "act_by_latent")
        return tokens, acts

    def latents_at(self, tokens: Int32[np.ndarray, " chosen"]) -> Int32[np.ndarray, " entry_of_chosen"]:
        """The latents that fire on the chosen tokens, token after token. Raises ManifestError for damage.

        tokens: each once.
        """
        self.file.check_at(self.token_start, tokens)
        self.file.check_at(self.token_start, tokens + 1)
        start, stop = self.token_start[tokens], self.token_start[tokens + 1]
        within = ((start >= 0) & (start <= stop) & (stop <= len(self.latent))).all()
        counts = stop - start
        self._require(within and counts.sum() <= len(self.latent), "token_start")
        first = np.cumsum(counts) - counts  # where the latents of each token begin in the result
        entries = np.repeat(start - first, counts) + np.arange(counts.sum())
        self.file.check_at(self.latent, entries)
        latents = self.latent[entries]
        self._require(((latents >= 0) & (latents < len(self.latent_start) - 1)).all(), "latent")
        return latents

    def ids(self, start: int, stop: int) -> list[int]:
        """The ids of tokens [start, stop) of these. Raises ManifestError for damage."""
        return self._checked(self.token_id[start:stop]).tolist()

    def _checked(self, view: np.ndarray) -> np.ndarray:
        self.file.check(view)
        return view

    def _require(self, is_so: bool | np.bool_, field: str) -> None:
        """Raise ManifestError if a field points where nothing is: bytes may be as they were written, and yet wrong."""
        if not is_so:
            raise damaged(self.file.path, ValueError(f"{field} holds what it may not"))


def write_codes(
    path: Path,
    token_id: Int32[np.ndarray, " token"],
    token: Int[Tensor, " entry"],
    latent: Int[Tensor, " entry"],
    act: Float[Tensor, " entry"],
    d_sae: int,
) -> None:
    """Write the codes of consecutive tokens, whole or not at all, after their checksum in the folder's file of them.

    Args:
        path: the file to write.
        token_id: the id of each token.
        token: the token of each entry, counted from 0, ascending.
        latent: the latent of each entry.
        act: the activation of each entry.
        d_sae: the number of latents.
    """
    entries = ActiveEntries.of(token, latent, batch=len(token_id), d_sae=d_sae)
    tensors = {
        "token_id": token_id,
        "token_start": entries.row_start,
        "latent": latent.int(),
        "act": act,
        "latent_start": entries.latent_start,
        "token_by_latent": entries.row_by_latent.int(),
        "act_by_latent": act.index_select(0, entries.by_latent),
    }
    data = safetensors.numpy.save({name: np.asarray(tensor) for name, tensor in tensors.items()})
    add_checksums(path.with_name(CHECKSUMS_FILE), checksums_of({path.name: data}))
    write_atomically(path, [data])


def map_codes(path: Path, first_token: int, checksums: Checksums) -> Codes:
    """Map a file of `write_codes` that begins with token `first_token`.

    checksums: those of its folder. Raises ManifestError if what is read here is damaged.
    """
    file, arrays = _mapped(path, checksums)
    names = [name for name in Codes.__slots__ if name not in ("file", "first_token")]
    try:
        for name in names:
            kind = "f" if name.startswith("act") else "i"
            if arrays[name].ndim != 1 or arrays[name].dtype.kind != kind:
                raise ValueError(f"{name} has the shape {arrays[name].shape} and the dtype {arrays[name].dtype}")
        codes = Codes(file=file, first_token=first_token, **{name: arrays[name] for name in names})
        for ends in (codes.token_start[-1:], codes.latent_start[-1:]):
            file.check(ends)
        n_entries = {int(codes.token_start[-1]), int(codes.latent_start[-1]), *map(len, (codes.latent, codes.act))}
        whole = n_entries == {len(codes.token_by_latent)} == {len(codes.act_by_latent)}
        if not whole or len(codes.token_start) != len(codes.token_id) + 1:
            raise ValueError("the lengths of its arrays differ")
    except (KeyError, IndexError, ValueError) as error:
        raise damaged(path, error) from error
    return codes


def map_arrays(path: Path, checksums: Checksums) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, read-only and mapped.

    checksums: those of its folder. Raises ManifestError if the file is damaged anywhere, or is not one.
    """
    file, arrays = _mapped(path, checksums)
    file.check(file.bytes)
    return arrays


def _mapped(path: Path, checksums: Checksums) -> tuple[MappedFile, dict[str, np.ndarray]]:
    """The file, of which only the header is checked, and its arrays."""
    try:
        file = MappedFile(path, checksums, WAY_OUT.format(path.parent))
        return file, mapped_arrays(file)
    except (NoFile, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> ManifestError:
    """The error for a file of `build_features` that no longer holds what was written."""
    return ManifestError(
        f"{path}: must be as the features were written, got {type(error).__name__}: {error}; "
        f"{WAY_OUT.format(path.parent)}"
    )
