"""SAEs that change a language model while it runs.

A language model, an SAE, a text and the changes to its latents come in.
The model's logits under those changes go out, or the text that it then writes.
Nothing here may change the model's weights, or an activation at a special token.

Public:
    steering.steer: continues a text with and without changes
    steering.steered_logits: the logits under changed latents
    steering.Scale: multiplies the activation of a latent
    steering.Clamp: sets the activation of a latent
    steering.Add: adds to the activation of a latent
    steering.Steered: both continuations of a prompt
"""
