"""How good SAEs are on held-out rows, with and without the language model.

Trained SAEs, an open cache and, where there is one, its language model come in.
The metrics of each SAE go out, and for runs an eval.json beside each.
Nothing here may look at a training row to judge an SAE, or define a metric that `trainer.sae.metrics` defines.

Public:
    evaluate.evaluate: metrics of one SAE
    evaluate.evaluate_all: metrics of several SAEs in one pass
    evaluate.evaluate_runs: evaluates runs and writes eval.json
    downstream_loss.model_metrics: losses with reconstructions in the model
    downstream_loss.Model: what evaluation needs of a model
    pca.PCA: principal components as a baseline
    pca.fit_pca: fits principal components to batches
    random_sae.random_sae: random directions as a baseline
    baselines.baselines: the baselines of a folder
    stored_losses.LossSums: losses that a cache keeps
"""
