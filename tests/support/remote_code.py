"""A tiny Llama that brings Python code of its own, as models on the hub do."""

import atexit
import json
import shutil
import tempfile
from pathlib import Path

from transformers import dynamic_module_utils

CONFIG = """
from pathlib import Path
from transformers import LlamaConfig
from .marker import leave

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

leave("config")
"""
MODEL = """
from transformers import LlamaForCausalLM
from .config import OwnConfig

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from transformers import PreTrainedTokenizerFast
from .marker import leave

class OwnTokenizer(PreTrainedTokenizerFast):
    pass

leave("tokenizer")
"""
MARKER = """
from pathlib import Path

def leave(name):
    (Path({folder!r}) / name).touch()
"""


# Once for the whole process, because Python keeps the package of these modules: else they go to the user's cache.
dynamic_module_utils.HF_MODULES_CACHE = tempfile.mkdtemp()
atexit.register(shutil.rmtree, dynamic_module_utils.HF_MODULES_CACHE)


class RemoteCode:
    """Makes folders of models with code. ran: what of that code ran."""

    def __init__(self, plain: Path, folder: Path):
        self._plain, self._folder, self._marks = plain, folder, folder / "marks"
        self._marks.mkdir()

    @property
    def ran(self) -> set[str]:
        return {path.name for path in self._marks.iterdir()}

    def model(self, name: str, *, comment: str = "", model_type: str = "own_llama") -> Path:
        """A model with code in config.py and model.py; `comment` stands in that code."""
        path = self._copy(name, {"config.py": f"# {comment}\n{CONFIG}", "model.py": MODEL})
        auto = {"AutoConfig": "config.OwnConfig", "AutoModelForCausalLM": "model.OwnModel"}
        _change(path / "config.json", {"model_type": model_type, "auto_map": auto})
        return path

    def tokenizer(self, name: str) -> Path:
        """A plain model whose tokenizer has code."""
        path = self._copy(name, {"own.py": TOKENIZER})
        auto = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
        _change(path / "tokenizer_config.json", {"tokenizer_class": "OwnTokenizer", "auto_map": auto})
        return path

    def elsewhere(self, name: str) -> Path:
        """A plain model with code in the files that loading a model does not need: of generation, of a processor."""
        code = f"{MARKER.format(folder=str(self._marks))}\nleave('elsewhere')\n"
        path = self._copy(name, {"own.py": code})
        (path / "custom_generate").mkdir()
        (path / "custom_generate" / "generate.py").write_text(
            f"{code}\ndef generate(model, *_, **__): leave('called')\n"
        )
        auto = {
            key: "own.Own" for key in ("AutoProcessor", "AutoGenerationConfig", "AutoImageProcessor", "AutoTokenizer")
        }
        for file in ("generation_config.json", "processor_config.json", "preprocessor_config.json"):
            (path / file).write_text(json.dumps({"auto_map": auto, "custom_generate": "own"}))
        return path

    def _copy(self, name: str, files: dict[str, str]) -> Path:
        path = Path(shutil.copytree(self._plain, self._folder / name))
        for file, code in {**files, "marker.py": MARKER.format(folder=str(self._marks))}.items():
            (path / file).write_text(code)
        return path


def _change(path: Path, values: dict) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
