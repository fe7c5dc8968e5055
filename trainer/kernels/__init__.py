"""The arithmetic that touches only the active entries of a batch.

Dense activations, weights and pre-activations come in as tensors.
The active entries go out, and the sums over them with their gradients.
Nothing here may know an architecture or a config, and no sum may depend on the order in which threads finish.

Public:
    active.ActiveEntries: active entries, by row and by latent
    active.Workspace: a buffer that all steps share
    active.firing_counts: rows in which each latent fires
    select.topk_pre_acts: the k largest of each row
    select.batch_topk_entries: the k * batch largest of a batch
    select.encoder_pre_acts: dense pre-activations in the workspace
    select.exceeds: which pre-activations exceed a cut
    sparse.active_pre_acts: active pre-activations with encoder gradient
    sparse.sparse_decode: decoder rows summed over active entries
"""
