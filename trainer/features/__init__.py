"""What single latents fire on, what they promote, and which others they resemble.

A finished run or an SAE comes in, with a cache or a language model.
What each latent fires on goes out as files in RUN/features/, and answers about single latents as frozen values.
Nothing here may hold a dense [rows, d_sae] matrix of the whole split, or load a language model by itself.

Public:
    build.build_features: encodes the validation split
    read.open_features: maps the features of a run
    read.Features: contexts, histograms and coactive latents
    read.Context: a firing token and its neighbours
    words.write_words: writes token strings and logit lens
    words.read_words: reads token strings and logit lens
    text.encode_text: active latents of a text's tokens
    logit_lens.logit_lens: tokens that each latent promotes
    attribution.logit_attribution: what each latent adds to a logit
    similarity.similar_features: nearest decoder directions of another SAE
    similarity.stability: latents found again across seeds
"""
