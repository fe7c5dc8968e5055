"""What is to be trained, said once and checked before anything runs.

A sweep file or a config of SAELens, and the facts that a cache records of its hooks come in.
Frozen configs go out, in which every setting of every SAE has a value.
Nothing here may read an activation, import torch, or assign a setting after its config is built.

Public:
    settings.SAEConfig: every setting of one SAE
    settings.TrainConfig: what all SAEs of a sweep share
    settings.ScaledHook: a hook and its input scale
    settings.subtracts_b_dec: whether the encoder sees x - b_dec
    sweep.SweepConfig: a sweep file, read and checked
    saelens.sweep_from_saelens: the sweep of a SAELens config
    presets.PRESETS: settings of papers, by preset name
    presets.default_preset: the preset of an architecture
"""
