"""What the attacks share. Nothing of actcache or trainer is imported here: see tests/conftest.py."""

import pytest


@pytest.fixture(scope="module")
def attacked(tiny_llama_dir, tiny_texts, tmp_path_factory):
    """Sound trees, which are attacked and used."""
    from support.attacked_commands import AttackedCommands

    return AttackedCommands(tmp_path_factory.mktemp("attacked"), tiny_llama_dir, tiny_texts)
