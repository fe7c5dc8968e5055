"""Latents of the demo's SAE that a person can name, held to expressions on text that nobody had looked at.

Each expression was chosen on training rows alone. The latent that it describes is here the one that agrees with it best
on training rows (the largest F1). Precision and recall are then counted on the validation split, and on numpy's
docstrings, which neither the language model nor the SAE was trained on. Precision: the share of the tokens on which the
latent fires, however weakly, that are part of a match. Recall: the share of matches with a token on which it fires.

Those of STEERED are then added at every token while the model writes, one at a time, and the matches of the expression
in 1,000 characters are counted, beside those in text written with random directions of the same norm, and with nothing
added. The last line on stdout is one JSON object.

    actcache demo --out demo && python -m benchmarks.named_features demo
"""

import argparse
import copy
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import numpy as np
import torch
from jaxtyping import Int64

from actcache.bundled.documents import bundled_model_path, module_documents
from actcache.harvesting.config import HarvestConfig
from actcache.harvesting.run import harvest
from actcache.loading.loader import Loader
from actcache.models.language_model import LanguageModel
from actcache.models.load import load_model
from actcache.store.cache import Cache, open_cache
from actcache.text.sources import LoadedDataset
from benchmarks.measure import Say, machine
from trainer.commands.lines import context_line
from trainer.features.feature_acts import SparseEncoder
from trainer.features.read import open_features
from trainer.features.token_strings import token_strings
from trainer.features.words import read_words
from trainer.formats.saelens import load_sae
from trainer.interventions.splice import Add
from trainer.interventions.steering import steer
from trainer.sae.sae import SAE

RUN = "topk-8"
NUMPY_TOKENS = 200_000
NAMED = {  # what a person calls it -> what it fires on
    "self, in signatures": r"\bself\b",
    "double underscores": r"__",
    "forms of to be": r"\b(?:is|are|be|was|were|been)\b",
    "what will or may happen": r"\b(?:will|may)\b",
    "digits": r"\d",
    "words in -ing": r"\w+ing\b",
    "words that begin with re": r"\bre\w+",
    "an indented new line": r"\n +",
}
STEERED = {"digits": 0.25, "double underscores": 0.5}  # share of the largest activation that is added at every token
PROMPTS = ("The ", "Return ", "This function ", "If ", "An object ", "Note that ", "A list of ", "When ")
N_DRAWS, N_WRITTEN, N_RANDOM, N_CONTEXTS = 2, 100, 4, 3  # of each prompt; tokens; directions; shown


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Text:
    """Sequences as the strings of their tokens, and (token, latent) of all that fires on them; tokens count from 0."""

    strings: list[list[str]]
    token: Int64[np.ndarray, " entry"]
    latent: Int64[np.ndarray, " entry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far one latent and one expression agree. base_rate: the share of all tokens that are part of a match."""

    n_fired: int
    n_matches: int
    precision: float
    recall: float
    base_rate: float

    @property
    def f1(self) -> float:
        """Of precision and recall; 0 where both are."""
        return 2 * self.precision * self.recall / max(self.precision + self.recall, 1e-9)


def read_text(sae: SAE, cache: Cache, split: str, tokenizer: Any) -> Text:
    """A split, encoded from the cache."""
    sequences = cache.sequences(split)
    shown = token_strings(tokenizer, np.unique(sequences).tolist())
    encoder, found = SparseEncoder(sae), []
    with Loader(cache, sae.hook_name, split=split, token_fields=("sequence", "position")) as loader:
        for batch in loader:
            assert batch.sequence is not None
            assert batch.position is not None
            row, latent, _ = encoder.entries(batch.x[sae.hook_name])
            token = batch.sequence.long() * cache.context_size + batch.position
            found.append(torch.stack([token[row], latent]))
    token, latent = torch.cat(found, dim=1).numpy()
    strings = [[shown[token_id] for token_id in sequence] for sequence in sequences.tolist()]
    return Text(strings=strings, token=token, latent=latent)


def numbered_matches(strings: Sequence[Sequence[str]], pattern: str) -> tuple[Int64[np.ndarray, " token"], int]:
    """For each token the number of the match that it is part of, -1 where of none; and how many matches there are."""
    expression, numbers, n_matches = re.compile(pattern), [], 0
    for sequence in strings:
        stop = np.cumsum([len(string) for string in sequence])
        number = np.full(len(sequence), -1)
        for match in expression.finditer("".join(sequence)):
            first, last = np.searchsorted(stop, (match.start(), match.end() - 1), side="right")
            number[first : last + 1] = n_matches
            n_matches += 1
        numbers.append(number)
    return np.concatenate(numbers), n_matches


def agreements(text: Text, pattern: str, d_sae: int) -> list[Agreement]:
    """Of every latent with one expression; a rate of nothing is 0."""
    number, n_matches = numbered_matches(text.strings, pattern)
    of_entry = number[text.token]
    hits, base_rate = of_entry >= 0, float((number >= 0).mean())
    pairs = np.unique(np.stack([text.latent[hits], of_entry[hits]]), axis=1)  # each match of each latent once
    counts = (np.bincount(latents, minlength=d_sae).tolist() for latents in (text.latent, text.latent[hits], pairs[0]))
    return [
        Agreement(
            n_fired=n_fired,
            n_matches=n_matches,
            precision=n_hits / max(n_fired, 1),
            recall=n_found / max(n_matches, 1),
            base_rate=base_rate,
        )
        for n_fired, n_hits, n_found in zip(*counts, strict=True)
    ]


def best_latent(text: Text, pattern: str, d_sae: int) -> int:
    """The one that agrees with an expression best."""
    found = agreements(text, pattern, d_sae)
    return max(range(d_sae), key=lambda latent: found[latent].f1)


def matches_per_thousand(texts: Sequence[str], pattern: str) -> float:
    """Matches in 1,000 characters."""
    return 1000 * sum(len(re.findall(pattern, text)) for text in texts) / max(1, sum(map(len, texts)))


def written(model: LanguageModel, sae: SAE, latent: int, amount: float) -> tuple[list[str], list[str]]:
    """What the model writes after each prompt, left alone, and with `amount` of the latent's direction added."""
    both = [
        steer(model, sae, prompt, features={latent: Add(amount)}, n_tokens=N_WRITTEN, seed=seed)
        for prompt in PROMPTS
        for seed in range(N_DRAWS)
    ]
    return [each.before for each in both], [each.after for each in both]


def with_random_row(sae: SAE, latent: int, seed: int) -> SAE:
    """The SAE with a random direction of the same norm in the place of a latent's."""
    row = torch.randn(sae.W_dec.shape[1], generator=torch.Generator().manual_seed(seed))
    other = copy.deepcopy(sae)
    other.W_dec[latent] = row * (sae.W_dec[latent].norm() / row.norm())
    return other


def run(demo: Path, say: Say) -> dict[str, Any]:
    """Measure; returns what the JSON line says."""
    bench = _Bench(demo)
    named = [bench.named(name, say) for name in NAMED]
    steered = [bench.steered(each, say) for each in named if each["name"] in STEERED]
    return {"bench": "named features", "run": RUN, "named": named, "steered": steered, "machine": machine()}


class _Bench:
    """The model, the SAE, what it fires on in the three texts, and the features that the demo has built."""

    def __init__(self, demo: Path):
        cache, self._run = open_cache(demo / "cache"), demo / "runs" / RUN
        self._model, self._sae = load_model(str(bundled_model_path()), device="cpu"), load_sae(self._run)
        self._texts = {split: self._text(cache, split) for split in ("train", "validation")}
        with tempfile.TemporaryDirectory() as folder:
            self._texts["numpy"] = self._text(self._harvested(Path(folder)), "train")

    def named(self, name: str, say: Say) -> dict[str, Any]:
        """One expression: its latent, how they agree in each text, and where the latent fires most in held-out text."""
        pattern, d_sae = NAMED[name], self._sae.d_sae
        latent = best_latent(self._texts["train"], pattern, d_sae)
        found = {where: agreements(text, pattern, d_sae)[latent] for where, text in self._texts.items()}
        shares = ", ".join(f"{where} {each.precision:.3f} ({each.recall:.3f})" for where, each in found.items())
        say(f"{name}, latent {latent}, {pattern}: precision (recall) {shares}")
        contexts = self._contexts(latent)
        return {"name": name, "pattern": pattern, "latent": latent, "contexts": contexts} | {
            where: asdict(each) for where, each in found.items()
        }

    def steered(self, named: Mapping[str, Any], say: Say) -> dict[str, Any]:
        """Matches in 1,000 characters without it, with it, and with random directions as long; one text of each."""
        latent, pattern = named["latent"], named["pattern"]
        amount = STEERED[named["name"]] * float(open_features(self._run).max_act[latent])
        before, after = written(self._model, self._sae, latent, amount)
        random_saes = [with_random_row(self._sae, latent, seed) for seed in range(N_RANDOM)]
        randoms = [matches_per_thousand(written(self._model, sae, latent, amount)[1], pattern) for sae in random_saes]
        rates = {"before": matches_per_thousand(before, pattern), "after": matches_per_thousand(after, pattern)}
        say(f"{named['name']}: {rates['after']:.2f} matches in 1,000 characters with {amount:.3g} of latent {latent} ")
        say(f"  added, {rates['before']:.2f} without, {mean(randoms):.2f} with random directions {randoms}")
        sample = {"prompt": PROMPTS[0], "before": before[0], "after": after[0]}
        return {"name": named["name"], "latent": latent, "amount": amount, **rates, "random": randoms, "sample": sample}

    def _text(self, cache: Cache, split: str) -> Text:
        return read_text(self._sae, cache, split, self._model.tokenizer)

    def _harvested(self, folder: Path) -> Cache:
        """numpy's docstrings."""
        documents = LoadedDataset(datasets.Dataset.from_dict({"text": module_documents(Path(np.__file__).parent)}))
        config = HarvestConfig(hook_names=(self._sae.hook_name,), tokens=NUMPY_TOKENS, holdout=0.0)
        return harvest(self._model, documents, config, folder / "cache")

    def _contexts(self, latent: int) -> list[str]:
        """Where it fires most on held-out text, that token in brackets."""
        words, contexts = read_words(self._run), open_features(self._run).top(latent, N_CONTEXTS)
        return [context_line([words.text(i) for i in context.token_ids], context.peak) for context in contexts]


def main() -> None:
    """Run the command of this module's docstring."""
    parser = argparse.ArgumentParser(description="Name latents of the demo's SAE, and check it.")
    parser.add_argument("demo", type=Path, help="what `actcache demo --out` wrote")
    print(json.dumps(run(parser.parse_args().demo, lambda line: print(line, file=sys.stderr)), allow_nan=False))


if __name__ == "__main__":
    main()
