"""The commands of `actcache` about SAEs: options in, calls of the library, lines out.

The options that a user types on the command line come in.
Lines for people go out, or one JSON value where --json is given.
No command may do what the library cannot do without it, or import torch before it is called.

Public:
    train.train: `actcache train`: trains SAEs
    evaluate.evaluate: `actcache eval`: evaluates runs
    features.features: `actcache features`: what features fire on
    features.steer: `actcache steer`: writes with features changed
    features.similar: `actcache similar`: nearest features of two runs
    features.stability: `actcache stability`: features found across seeds
    publish.report: `actcache report`: draws a sweep
    publish.export: `actcache export`: writes runs for others
    publish.import_run: `actcache import`: makes runs of others' SAEs
"""
