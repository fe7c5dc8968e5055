import pytest

from actcache.models.names import canonical_name, same_name, short_name


@pytest.mark.parametrize(
    "names",
    [
        ("gpt2-small", "gpt2", "openai-community/gpt2"),
        ("gpt2-xs", "distilgpt2", "distilbert/distilgpt2"),
        ("pythia-1.4b", "EleutherAI/pythia-1.3b", "EleutherAI/pythia-1.4b"),
        ("gemma-2-2b", "google/gemma-2-2b"),
    ],
    ids=lambda names: names[0],
)
def test_names_of_one_model(names):
    assert {canonical_name(name) for name in names} == {names[-1]}
    assert all(same_name(one, other) for one in names for other in names)


@pytest.mark.parametrize(
    ("one", "other"), [("gpt2", "gpt2-medium"), ("me/gpt2", "gpt2"), ("tiny", None), (None, "gpt2"), ("Tiny", "tiny")]
)
def test_names_of_two_models(one, other):
    assert not same_name(one, other)


def test_a_name_of_no_table_is_its_own():
    assert canonical_name("someone/model") == "someone/model"
    assert same_name(None, None)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        *[(name, "gpt2-small") for name in ("openai-community/gpt2", "gpt2", "gpt2-small")],
        *[("google/gemma-2-2b", "gemma-2-2b"), ("someone/model", "model"), ("tiny/", "tiny")],
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short
