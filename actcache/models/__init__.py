"""A language model and the activations at its hooks.

In come a name, a folder or a loaded module, and token ids.
Out go activations by hook name, logits, the output head as numbers, and the hashes that identify a model.
Nothing here may change a weight, compute a gradient, or know how activations are stored.

Public:
    load.load_model: loads a model from disk or the hub
    load.wrap_model: takes a model that is loaded already
    language_model.LanguageModel: what every other room needs of a model
    huggingface.HuggingFaceModel: a transformers module with forward hooks
    bridge.BridgeModel: a model with every TransformerLens hook
    identity.model_identity: name, architecture and hash of a model
    names.same_name: whether two names mean one model
    probe.rounding_bound: how far apart rounding may bring rows
    unembedding.Unembedding: final norm and output head as numbers
    batch_size.largest_batch: sequences per forward pass, measured
    hook_names.hooks_of: hook names of a transformers submodule
    pretrained.name_of: name of a hub model or folder
"""
