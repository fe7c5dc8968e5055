"""Training: one pass over a cache steps many SAEs.

An open cache and a sweep's configs come in.
For each SAE goes out a folder RUNS/<name>/ with its config, logs, checkpoints and trained weights.
No SAE may depend on which others train beside it, and nothing may be written that a resumed run would write otherwise.

Public:
    sweep.train: trains every SAE of a sweep
    sweep.plan: what a sweep has still to do
    sweep.SweepProgress: how far a sweep is
    resolve.resolve_runs: configs, rows and descriptions of runs
    run.RunRecord: what became of one SAE
    step.TrainState: all that changes while training
    step.train_step: one optimizer step on one batch
    plan.SweepPlan: passes, memory and FLOPs of a sweep
    checkpoint.save_checkpoint: writes a training state
    checkpoint.load_checkpoint: reads a training state back
    loggers.MetricLogger: what a logger must be able to do
"""
