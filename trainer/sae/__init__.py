"""The mathematics of sparse autoencoders, as functions on tensors.

A config, weights and a batch of activations come in.
Feature activations, reconstructions, losses and metrics go out.
Nothing here may read or write a file, load a language model, or change a weight in place.

Public:
    architectures.forward: the training pass of every architecture
    architectures.initial_weights: random weights before the first step
    architectures.SAEOutput: what the training pass returns
    losses.loss_terms: the loss of one batch, by term
    losses.LossTerms: the terms that are logged
    metrics.ReconstructionSums: sums from which all metrics follow
    metrics.ce_loss_score: how much loss an SAE recovers
    metrics.kl_div_score: how much divergence an SAE recovers
    sae.SAE: a trained SAE, as a torch module
"""
