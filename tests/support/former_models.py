"""A process of its own, in which an older transformers may be the one that is imported: models as that one has them."""

import json
import sys
from pathlib import Path

import torch

from actcache.models.load import load_model
from support.tiny_models import FAMILIES, make_model_dir

TOKENS = torch.tensor([[0, 5, 9, 3, 44, 7]])


def main(folder: Path) -> None:
    """Save a model of each family below the folder, and say what it is and what it computes in known.json."""
    known = {}
    for family in FAMILIES:
        model = load_model(make_model_dir(family, folder / family), device="cpu")
        logits = model.logits(TOKENS).tolist()
        known[family] = {"identity": {**model.identity, "probe": model.probe()}, "logits": logits}
    (folder / "known.json").write_text(json.dumps(known))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
