import random
from pathlib import Path, PurePath

import pytest
from datasets.data_files import DataFilesList, get_data_patterns

from actcache.text.data_files import DataFault, data_files, splits_of, suffix_of

WORDS = (
    "train",
    "training",
    "test",
    "testing",
    "eval",
    "validation",
    "valid",
    "dev",
    "val",
    "latest",
    "part",
    "trains",
)


def written(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    return folder


def taken(folder: Path, split: str = "train", config: str | None = None) -> list[str]:
    found = data_files(folder, split, config)
    assert {*found.files}.isdisjoint(found.left_out)
    return [str(file.relative_to(folder)) for file in found.files]


def refusal(folder: Path, split: str = "train", config: str | None = None) -> str:
    with pytest.raises(DataFault) as error:
        data_files(folder, split, config)
    assert "\n" not in str(error.value)
    assert error.value.way_out
    return str(error.value)


def random_name(rng: random.Random) -> str:
    def word() -> str:
        return "".join(rng.choice((*WORDS, "_", "-", ".", " ", "0", "x")) for _ in range(rng.randint(1, 4))).strip(".")

    if rng.random() < 0.2:
        return f"data/{rng.choice(('train_sft', 'test', 'all'))}-0000{rng.randrange(3)}-of-00003.jsonl"
    return "/".join([*((word() or "x").strip() for _ in range(rng.randrange(3))), f"{word() or 'x'}.jsonl"])


def test_splits_are_those_of_datasets(tmp_path):
    """Of 60 folders with random names, as the patterns of `datasets` find them; these may find a file twice."""
    rng = random.Random(0)
    for number in range(60):
        folder = tmp_path / f"f{number}"
        written(folder, *{random_name(rng) for _ in range(rng.randint(1, 5))})
        names = [p.relative_to(folder) for p in sorted(folder.rglob("*.jsonl"), key=str) if p.is_file()]
        visible = [name for name in names if not any(part.startswith((".", "__")) for part in name.parts)]
        if not visible:
            continue
        expected = {}
        for split, patterns in get_data_patterns(str(folder)).items():
            found = DataFilesList.from_patterns(patterns, base_path=str(folder))
            expected[split] = sorted({PurePath(file).relative_to(folder) for file in found})
        assert {split: sorted(files) for split, files in splits_of(visible).items()} == expected, names


def test_a_data_card_beside_files_is_no_data(tmp_path):
    written(tmp_path, "README.md", "LICENSE.txt", "notes.md", "dataset_info.json", ".cache/a.parquet", "data/b.parquet")
    assert taken(tmp_path) == ["data/b.parquet"]
    written(tmp_path / "alone", "README.md", "paper.pdf")
    assert "the folder holds no .txt, .text, .md, " in (said := refusal(tmp_path / "alone"))
    assert said.endswith("it holds 'README.md', 'paper.pdf'")


def test_markdown_is_text_where_nothing_else_is(tmp_path):
    assert taken(written(tmp_path, "README.md", "b.md", "a.md")) == ["a.md", "b.md"]


def test_files_of_several_kinds_are_refused(tmp_path):
    written(tmp_path, "a.jsonl", "b.parquet", "c.txt")
    assert refusal(tmp_path) == "it holds files of several kinds, json: 'a.jsonl'; parquet: 'b.parquet'; text: 'c.txt'"


def test_the_case_of_names_does_not_matter(tmp_path):
    written(tmp_path, "TRAIN.JSONL", "Test.Jsonl.GZ")
    assert taken(tmp_path) == ["TRAIN.JSONL"]
    assert taken(tmp_path, "test") == ["Test.Jsonl.GZ"]
    assert suffix_of(PurePath("A.v2.JSONL.Zst")) == ".jsonl"


def test_a_folder_may_have_any_name(tmp_path):
    folder = written(tmp_path / "größe [1] *? {a}" / "test", "train.jsonl", "test.jsonl", "[x].jsonl")
    assert taken(folder) == ["train.jsonl"]


def test_a_split_that_is_not_there_is_told_with_those_that_are(tmp_path):
    written(tmp_path, "train.jsonl", "test.jsonl")
    assert refusal(tmp_path, "validation") == "it has no split 'validation', it has 'train', 'test'"
    assert refusal(tmp_path, "train[:10]").startswith("it has no split 'train[:10]'")
    assert "no configuration 'de', it has none" in refusal(tmp_path, config="de")


CARD = """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/*.jsonl
  - split: test
    path: [en/held/*.jsonl]
- config_name: de
  data_dir: de
---
# The data
"""


def test_the_data_card_names_configurations_and_splits(tmp_path):
    written(tmp_path, "en/a.jsonl", "en/b.jsonl", "en/held/c.jsonl", "de/train.jsonl", "de/test.jsonl")
    (tmp_path / "README.md").write_text(CARD)
    assert taken(tmp_path, config="en") == ["en/a.jsonl", "en/b.jsonl"]
    assert taken(tmp_path, "test", "en") == ["en/held/c.jsonl"]
    assert taken(tmp_path, "test", "de") == ["de/test.jsonl"]
    assert refusal(tmp_path) == "it has the configurations 'en', 'de'"
    assert refusal(tmp_path, config="fr") == "it has no configuration 'fr', it has 'en', 'de'"


@pytest.mark.parametrize(
    ("path", "says"), [("../x.jsonl", "outside"), ("/etc/*.txt", "outside"), ("hf://a/b.txt", "outside"), ("[", "read")]
)
def test_a_data_card_cannot_lead_out_of_its_folder(tmp_path, path, says):
    written(tmp_path, "x.jsonl", "in/x.jsonl")
    (tmp_path / "in" / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {path}\n---\n")
    assert says in refusal(tmp_path / "in")
