"""A run's features in the layouts of the sites that show them.

A finished run comes in whose features and words are built.
Files go out that another site imports as they are.
Nothing here may upload anything, run a language model, or give other bytes for equal features.

Public:
    neuronpedia.export_neuronpedia: writes files for Neuronpedia's import
"""
