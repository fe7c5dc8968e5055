"""Identities as older versions wrote them, by the definition of that day."""

import hashlib
import json

import pytest

NOT_ARCHITECTURE = (
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def former_identity(model, renamed):
    """As older versions wrote it. renamed: names of parameters today -> in the transformers of that day."""
    canonical = json.dumps(
        {key: value for key, value in model.config.to_diff_dict().items() if key not in NOT_ARCHITECTURE},
        sort_keys=True,
        separators=(",", ":"),
    )
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{renamed.get(name, name)} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].numpy().tobytes())
    hashes = {"config_sha256": hashlib.sha256(canonical.encode()).hexdigest(), "weights_sha256": digest.hexdigest()}
    return {"name": "elsewhere", "revision": None, **hashes}


@pytest.mark.parametrize("renamed", [{}, {"lm_head.weight": "embed_out.weight"}], ids=["today", "5.12"])
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_an_identity_of_an_older_version_is_known(family, renamed, ours, theirs):
    """Transformers called the output head of GPT-NeoX `embed_out` up to 5.12."""
    model, known = ours(family), former_identity(theirs(family), renamed)
    assert model.differences(known) == []
    (weights,) = model.differences({**known, "weights_sha256": "0" * 64})
    assert weights == "its weights are others (weights_sha256 000000000000 there)"
    (config,) = model.differences({**known, "config_sha256": "1" * 64})
    assert config == "its config is another (config_sha256 111111111111 there)"
