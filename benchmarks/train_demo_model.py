"""Train the language model that comes with the package, on text that comes with every Python.

Trains a byte-level BPE tokenizer and a small GPT-2 from scratch on `standard_library_documents()`,
and compares its bits per byte on held-out documents with `xz -9`. Equal seed, steps, threads, text and versions give
an equal file on the same machine. Last stdout line is one JSON object.

    python -m benchmarks.train_demo_model --out actcache/bundled/bundled_model --curve demo_model_curve.csv
"""

import argparse
import csv
import hashlib
import json
import lzma
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from actcache.bundled.documents import bundled_model_path, standard_library_documents

BOS = "<|endoftext|>"
CURVE = Path(__file__).parent / "results" / "demo_model_curve.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides which model comes out. Learning rates are peaks; fractions are of the steps."""

    vocab_size: int = 512
    context_size: int = 256
    n_layers: int = 6
    n_heads: int = 4
    d_model: int = 128
    batch_rows: int = 16
    n_steps: int = 1600
    warm_up_fraction: float = 0.05
    matrix_lr: float = 0.01
    adam_lr: float = 0.004
    weight_decay: float = 0.1
    held_out_fraction: float = 0.03
    eval_every: int = 200
    seed: int = 0
    n_threads: int = 2


def is_held_out(index: int, fraction: float) -> bool:
    """Whether document `index` is kept from training: its SHA-256, read as a number in [0, 1), is below `fraction`."""
    digest = hashlib.sha256(str(index).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def split_documents(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents), each in the order of `documents`."""
    train, held_out = [], []
    for index, document in enumerate(documents):
        (held_out if is_held_out(index, fraction) else train).append(document)
    return train, held_out


def train_tokenizer(documents: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with one special token, which begins every row and separates documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, clean_up_tokenization_spaces=False
    )


def bos_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id of the special token."""
    return tokenizer.get_vocab()[BOS]


def tokenize(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[list[int]]:
    """Token ids of each document, without special tokens."""
    return [tokenizer.encode(document, add_special_tokens=False) for document in documents]


def packed(documents: list[list[int]], bos: int) -> Int[Tensor, " token"]:
    """All documents in one row, each after a BOS."""
    return torch.tensor([token for document in documents for token in [bos, *document]])


def training_batches(
    stream: Int[Tensor, " token"], bos: int, recipe: Recipe, generator: torch.Generator
) -> Iterator[Int[Tensor, "row position"]]:
    """Batches without end: windows of the stream behind a BOS, cut at new borders and shuffled anew in each epoch."""
    window = recipe.context_size - 1
    while True:
        offset = int(torch.randint(window, (1,), generator=generator))
        rows = stream[offset : offset + (len(stream) - offset) // window * window].view(-1, window)
        rows = torch.nn.functional.pad(rows, (1, 0), value=bos)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        yield from rows[: len(rows) // recipe.batch_rows * recipe.batch_rows].split(recipe.batch_rows)


def new_model(recipe: Recipe, bos: int) -> GPT2LMHeadModel:
    """A GPT-2 with random weights and tied embeddings; draws from torch's global generator."""
    return GPT2LMHeadModel._from_config(
        GPT2Config(
            vocab_size=recipe.vocab_size,
            n_positions=recipe.context_size,
            n_embd=recipe.d_model,
            n_layer=recipe.n_layers,
            n_head=recipe.n_heads,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=bos,
            eos_token_id=bos,
        ),
        attn_implementation="eager",  # faster than the fused kernel on a CPU at this size
    )


def new_optimizers(model: GPT2LMHeadModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks (Jordan et al. 2024), AdamW for embeddings, biases and norms."""
    blocks = [parameter for parameter in model.transformer.h.parameters() if parameter.ndim == 2]
    inside = {id(parameter) for parameter in blocks}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    return [
        torch.optim.Muon(blocks, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def lr_factor(recipe: Recipe) -> Callable[[int], float]:
    """step -> share of the peak learning rate: linear warm-up, then a cosine to zero."""
    warm_up = max(1, round(recipe.warm_up_fraction * recipe.n_steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (recipe.n_steps - warm_up)))

    return factor


def training_loss(model: GPT2LMHeadModel, rows: Int[Tensor, "row position"]) -> Float[Tensor, ""]:
    """Mean next-token cross entropy in nats; bfloat16 matrix products, float32 softmax."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def train(model: GPT2LMHeadModel, batches: Iterator[Tensor], recipe: Recipe) -> Iterator[tuple[int, float]]:
    """Train in place; yields (steps done, mean training loss in nats since the last yield) every `eval_every` steps."""
    optimizers = new_optimizers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(recipe)) for optimizer in optimizers]
    losses = []
    for step in range(1, recipe.n_steps + 1):
        model.train()
        loss = training_loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % recipe.eval_every == 0 or step == recipe.n_steps:
            yield step, sum(losses) / len(losses)
            losses.clear()


def scored_windows(document: list[int], bos: int, context_size: int) -> Iterator[tuple[list[int], int]]:
    """(window behind a BOS, number of tokens at its end to score): half-window steps, every token scored once."""
    window = context_size - 1
    end = min(window, len(document))
    yield [bos, *document[:end]], end
    while end < len(document):
        step = min(window // 2, len(document) - end)
        end += step
        yield [bos, *document[end - window : end]], step


@torch.inference_mode()
def bits_per_byte(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> float:
    """Bits the model needs for `documents`, per UTF-8 byte.

    Every token is scored once, in float32. A window is a BOS and `n_positions - 1` tokens of one document; windows move
    by half their length, so a token sees the document from its start or at least half a window of it.
    """
    model.eval()
    bos = bos_id(tokenizer)
    nats = 0.0
    for document in tokenize(tokenizer, documents):
        for window, n_scored in scored_windows(document, bos, model.config.n_positions):
            rows = torch.tensor([window])
            logits = model(rows).logits[0, :-1][-n_scored:]
            nats += torch.nn.functional.cross_entropy(logits, rows[0, 1:][-n_scored:], reduction="sum").item()
    return nats / math.log(2) / sum(len(document.encode()) for document in documents)


def xz_bits_per_byte(documents: list[str], prefix: list[str]) -> float:
    """Bits that `documents` add to an `xz -9` file of `prefix`, per UTF-8 byte; an empty prefix has no file."""
    before, text = "".join(prefix).encode(), "".join(documents).encode()
    n_bytes_before = len(lzma.compress(before, preset=9)) if before else 0
    return 8 * (len(lzma.compress(before + text, preset=9)) - n_bytes_before) / len(text)


def write_curve(path: Path, curve: list[dict[str, float]]) -> None:
    """The loss curve as CSV, one line per evaluation."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curve[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


def curve_point(
    recipe: Recipe, step: int, training_nats: float, held_out_bits: float, start: float
) -> dict[str, float]:
    """One line of the loss curve; seconds since `start`, a `time.perf_counter()`."""
    return {
        "step": step,
        "tokens": step * recipe.batch_rows * (recipe.context_size - 1),
        "training_nats_per_token": round(training_nats, 4),
        "held_out_bits_per_byte": round(held_out_bits, 4),
        "seconds": round(time.perf_counter() - start, 1),
    }


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights as safetensors, config and tokenizer, for `from_pretrained(out)`."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def run(recipe: Recipe, out: Path, curve_path: Path) -> dict[str, object]:
    """Train, write model and curve, and return what the result document says."""
    start = time.perf_counter()
    training, held_out = split_documents(standard_library_documents(), recipe.held_out_fraction)
    tokenizer = train_tokenizer(training, recipe)
    bos = bos_id(tokenizer)
    stream = packed(tokenize(tokenizer, training), bos)
    torch.set_num_threads(recipe.n_threads)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, bos)
    batches = training_batches(stream, bos, recipe, torch.Generator().manual_seed(recipe.seed))
    curve = []
    for step, training_nats in train(model, batches, recipe):
        curve.append(curve_point(recipe, step, training_nats, bits_per_byte(model, tokenizer, held_out), start))
        print(json.dumps(curve[-1]), flush=True)
        save(model, tokenizer, out)
    write_curve(curve_path, curve)
    return curve[-1] | {
        "training_tokens_per_epoch": len(stream),
        "training_bytes": sum(len(document.encode()) for document in training),
        "held_out_bytes": sum(len(document.encode()) for document in held_out),
        "held_out_documents": len(held_out),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "xz_bits_per_byte": round(xz_bits_per_byte(held_out, prefix=[]), 4),
        "xz_after_training_text_bits_per_byte": round(xz_bits_per_byte(held_out, prefix=training), 4),
    }


def versions() -> dict[str, object]:
    """What the result depends on besides the recipe."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Parse the arguments, train, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=bundled_model_path(), help="folder of the model")
    parser.add_argument("--curve", type=Path, default=CURVE, help="CSV file of the loss curve")
    parser.add_argument("--steps", type=int, default=Recipe().n_steps, help="training steps; fewer for a trial")
    arguments = parser.parse_args()
    summary = run(Recipe(n_steps=arguments.steps), arguments.out, arguments.curve)
    print(json.dumps(summary | versions()))


if __name__ == "__main__":
    main()
