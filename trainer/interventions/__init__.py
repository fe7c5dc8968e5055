"""SAEs that change a language model while it runs.

A language model, SAEs, a text and the changes to their latents come in.
What the model then gives goes out: logits, text, or how much each latent matters to them.
Nothing here may change the model's weights.

Public:
    splice.spliced: SAEs in every pass of a model
    splice.Splice: an SAE, and what its latents become
    splice.Scale: multiplies the activation of a latent
    splice.Clamp: sets the activation of a latent
    splice.Add: adds to the activation of a latent
    splice.Patch: the activation of a latent from elsewhere
    feature_attribution.attribution: how much latents matter to a metric
    steering.steer: continues a text with and without changes
    steering.steered_logits: the logits under changed latents
    steering.Steered: both continuations of a prompt
"""
