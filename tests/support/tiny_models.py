"""Tiny language models and a real tokenizer, made on the spot and seeded: every family that harvest supports.

Three layers, 32 wide, every parameter (norms and biases too) random, so that a missed norm, bias or layer shows.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

N_LAYERS = 3
D_MODEL = 32
TEXT = """
A tokenizer turns text into numbers, and a language model turns numbers into guesses about the next number. Between the
two, every layer of the model writes into a stream of vectors, one vector for each token, and every later layer reads
what the earlier layers have written. A sparse autoencoder takes one such vector apart: it explains it as the sum of
a few directions out of many, and a person can often give a name to what a direction stands for.

The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote in the book: the wind, the weather,
the ships that passed. "Nothing happens here," he said to the cat. The cat, who had seen the mice, the moths, the moon
and the sea, did not answer. In the morning he put out the lamp, wrote the hour in the book, and went down to sleep.

def mean(values):
    total = 0.0
    for value in values:
        total = total + value
    return total / len(values)

Numbers are written 0 1 2 3 4 5 6 7 8 9 10 11 12 100 1000; the years 1905, 1969 and 2024 are numbers too. Is that so?
Yes! It is so. Whether it was so before, and whether it will be so after, is another question: ask the keeper, ask the
cat, ask the model, ask the autoencoder. The model will guess; the keeper will look in the book; the cat will sleep.
"""

_SIZES = {"vocab_size": 0, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.2}
_WIDE = {
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GQA = _WIDE | {"num_key_value_heads": 2, "head_dim": 8}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# n_ctx: transformers 5 does not write it for GPT-2, and TransformerLens' converter reads it
_GPT2 = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 256, "n_ctx": 256}
_CONFIGS: dict[str, tuple[type[PretrainedConfig], dict]] = {
    "gpt2": (GPT2Config, _GPT2),
    "gpt_neox": (GPTNeoXConfig, _WIDE | {"use_parallel_residual": True}),
    "gpt_neox_sequential": (GPTNeoXConfig, _WIDE | {"use_parallel_residual": False}),
    "llama": (LlamaConfig, _GQA),
    "mistral": (MistralConfig, _GQA | {"sliding_window": 8}),
    "qwen2": (Qwen2Config, _WIDE | {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, _GQA),
    "gemma2": (Gemma2Config, _GQA | _WINDOWS | {"query_pre_attn_scalar": 8}),
    "gemma3_text": (Gemma3TextConfig, _GQA | _WINDOWS | {"query_pre_attn_scalar": 8}),
}
FAMILIES = tuple(_CONFIGS)


# where each family keeps its final norm, and what its gain is the stored weight plus; written out by hand
FINAL_NORMS = {
    "gpt2": ("transformer.ln_f", 0),
    "gpt_neox": ("gpt_neox.final_layer_norm", 0),
    "gpt_neox_sequential": ("gpt_neox.final_layer_norm", 0),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), ("model.norm", 0)),
    **dict.fromkeys(("gemma2", "gemma3_text"), ("model.norm", 1)),
}
LAYER_NORMED = ("gpt2", "gpt_neox", "gpt_neox_sequential")  # the others have RMSNorm: no mean taken off, no bias


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 entries trained on TEXT; any text can be encoded.

    Id 0 is `<bos>`, id 1 `<eos>`; encoding prepends BOS unless add_special_tokens=False.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def make_model(family: str, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A causal language model of the family in float32, evaluation mode; the global random state is left as it was."""
    config_class, sizes = _CONFIGS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_class(**(_SIZES | sizes | {"vocab_size": vocab_size})))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def norm_by_hand(model: PreTrainedModel, family: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(gain, bias, eps) of the final norm from its parameters, float64."""
    path, added = FINAL_NORMS[family]
    norm = model.get_submodule(path)
    weight = norm.weight.detach().double()
    bias = norm.bias.detach().double() if family in LAYER_NORMED else torch.zeros_like(weight)
    return weight + added, bias, norm.eps if hasattr(norm, "eps") else norm.variance_epsilon


def make_model_dir(family: str, path: Path) -> Path:
    """Write model and tokenizer of the family (one of FAMILIES) to `path` as save_pretrained does; returns `path`."""
    tokenizer = make_tokenizer()
    make_model(family, len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def pickle_weights(path: Path) -> Path:
    """Put pytorch_model.bin in the place of model.safetensors of a model's folder, with the same weights."""
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def make_multimodal_dir(path: Path) -> Path:
    """Write a Gemma 3 that sees pictures, and its tokenizer but no processor of pictures, to `path`; returns `path`."""
    tokenizer = make_tokenizer()
    family, sizes = _CONFIGS["gemma3_text"]
    text = family(**(_SIZES | sizes | {"vocab_size": len(tokenizer)}))
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Gemma3ForConditionalGeneration(config).eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
