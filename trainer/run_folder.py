"""The folder of a run, RUNS/<name>/: what its files are called, how they are read, and how they are written whole.

    config.json      the settings of the SAE and of training; the cache and the model
    metrics.jsonl    a line for each logged step; a resumed run writes the same lines
    timing.jsonl     how long the same steps took
    checkpoint/      the training states that were saved last
    sae/             the trained weights, once training has ended
    failed.json      why training was stopped, where the SAE diverged
    eval.json        the metrics on held-out rows, once they are measured

RUNS/.lock is held by whoever trains there (`only_writer`).

`read_runs` and `read_harvests` read these files, and the logs of harvests, for the report. To them a file that is not
there yet is empty, and a damaged one is an error.
"""

import fcntl
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.errors import CacheLocked, CacheMismatch, ManifestError
from actcache.files import make_folder, own_file, refuse_links, require_writable, write_atomically
from actcache.store.locks import is_at, try_lock

Number = int | float
CONFIG_FILE, METRICS_FILE, TIMING_FILE, FAILED_FILE = "config.json", "metrics.jsonl", "timing.jsonl", "failed.json"
CHECKPOINTS, SAE_FOLDER = "checkpoint", "sae"
RUNS_LOCK = ".lock"  # no run can have this name
# These settings may differ between two calls on one folder, because they change no result.
_MAY_DIFFER = ("cache.path", "train.checkpoint_every", "train.keep_checkpoints")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What the files of one folder of RUNS hold.

    Attributes:
        folder: the folder.
        config: config.json.
        evaluation: eval.json; {} where there is none.
        metrics: the lines of metrics.jsonl.
        timing: the lines of timing.jsonl.
        error: the error in failed.json: why the SAE diverged; None where there is none.
    """

    folder: Path
    config: dict[str, Any]
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    error: str | None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def sae(self) -> dict[str, Any]:
        """The SAE's settings. A baseline has them at the top of its config.json, a run under `sae`."""
        return self.config.get("sae", self.config)

    @property
    def is_baseline(self) -> bool:
        """Whether this is a PCA baseline, which was not trained."""
        return self.sae.get("architecture") == "pca"

    def about(self, what: str, key: str) -> Any:
        """The value of a key of the block `what` (cache or model) of config.json; None where there is none."""
        block = self.config.get(what)
        return block.get(key) if isinstance(block, dict) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class HarvestTime:
    """What one call of `actcache harvest` logged.

    Attributes:
        finished: when the call ended.
        n_tokens: how many rows it made.
        total_seconds: how long it took.
        model_seconds: how long the language model ran.
    """

    finished: str
    n_tokens: int
    total_seconds: float
    model_seconds: float


def read_runs(runs: Path) -> list[RunFiles]:
    """Read every folder of `runs` that has a config.json, or `runs` itself if it has one.

    Returns:
        The runs by name, then the baselines by name.

    Raises:
        ManifestError: there is no such folder, or a file is malformed.
    """
    folders = [runs] if (runs / "config.json").is_file() else [path.parent for path in runs.glob("*/config.json")]
    if not folders:
        raise ManifestError(f"report: {runs} must be a folder of runs, it holds no config.json; train first")
    found = [_read_run(folder.resolve()) for folder in folders]
    return sorted(found, key=lambda run: (run.is_baseline, run.name))


def read_harvests(runs: Sequence[RunFiles]) -> list[HarvestTime]:
    """Read the log of every harvest that added rows to a cache that the runs name, in the order of time.

    A cache that is no longer there has no logs.

    Raises:
        ManifestError: a log is malformed.
    """
    caches = {path for run in runs if isinstance(path := run.about("cache", "path"), str)}
    logs = sorted(path for cache in caches for path in Path(cache).glob("log/harvest-*.json"))
    times = [_harvest_time(path, _read_object(path)) for path in logs]
    return sorted((time for time in times if time.n_tokens > 0), key=lambda time: time.finished)


def finite(value: object) -> Number | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def check_out(out: Path, names: set[str]) -> None:
    """Raise CacheMismatch unless `out` is absent, empty, or a folder that holds a run.

    names: the names of the runs that are to be written; a folder with one of these names counts as a run.
    """
    if out.is_file():
        raise CacheMismatch(f"{out}: must be a folder for runs, is a file; pass another --out")
    held = sorted(path.name for path in out.iterdir() if path.name != RUNS_LOCK) if out.exists() else []
    if held and not names.intersection(held) and not any(out.glob(f"*/{CONFIG_FILE}")):
        raise CacheMismatch(f"{out}: must be empty or hold runs, holds {', '.join(held[:5])}; pass another --out")


def check_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Raise CacheMismatch unless the folder is absent, empty, or holds the run of this config.json."""
    if not folder.exists():
        return
    if not (folder / CONFIG_FILE).is_file():
        if not folder.is_dir() or any(not path.name.endswith(".partial") for path in folder.iterdir()):
            raise CacheMismatch(f"{folder}: must be a run or absent, it has no {CONFIG_FILE}; pass another --out")
        return
    held, wanted = _flat(read_json(folder / CONFIG_FILE)), _flat(description)
    differences = [
        f"{key} is {held.get(key)!r} there, {wanted.get(key)!r} here"
        for key in sorted({*held, *wanted} - set(_MAY_DIFFER))
        if held.get(key) != wanted.get(key)
    ]
    if differences:
        raise CacheMismatch(f"{folder}: holds another run: {'; '.join(differences)}; pass another --out or name")


def is_over(folder: Path) -> bool:
    """Whether an earlier call finished this run, or saw it diverge, as it would again."""
    return (folder / SAE_FOLDER).is_dir() or (folder / FAILED_FILE).is_file()


@contextmanager
def only_writer(folder: Path, lock: str, doing: str, unwritable: str) -> Iterator[None]:
    """Let no other process write into a folder meanwhile.

    Args:
        folder: it is made if it is missing.
        lock: the name of the file in it that is locked. The file stays.
        doing: what the other process does, for the message.
        unwritable: what cannot be done if this user may not write there, and what to do instead, for the message.

    Raises:
        CacheLocked: another process holds the lock.
        ManifestError: the folder holds a link through which would be written elsewhere.
        OSError: the folder cannot be written. The error names the folder.
    """
    path = folder / lock
    require_writable(folder, path, unwritable)
    refuse_links(folder)
    while True:
        try:
            make_folder(folder)
            file = open(path, "ab", opener=own_file)  # noqa: SIM115, closed below
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from None
        with file:
            if not try_lock(file.fileno(), fcntl.LOCK_EX):
                raise CacheLocked(f"{folder}: another process {doing}; wait for it, or stop it")
            if is_at(path, file.fileno()):
                yield
                return


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, up to the first one that a kill left incomplete; [] without a file."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ManifestError: there is no such file, or it holds anything else.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise ManifestError(f"{path}: must be readable JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise ManifestError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write canonical JSON, whole or not at all: sorted keys, finite numbers, one newline at the end."""
    write_atomically(path, [(json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()])


def _read_run(folder: Path) -> RunFiles:
    return RunFiles(
        folder=folder,
        config=_read_object(folder / "config.json"),
        evaluation=_read_object(folder / "eval.json"),
        metrics=_read_lines(folder / "metrics.jsonl"),
        timing=_read_lines(folder / "timing.jsonl"),
        error=_read_object(folder / FAILED_FILE).get("error"),
    )


def _harvest_time(path: Path, log: dict[str, Any]) -> HarvestTime:
    try:
        seconds = log["seconds"]
        return HarvestTime(
            finished=log["finished"],
            n_tokens=seconds["n_tokens"],
            total_seconds=seconds["total"],
            model_seconds=seconds["model_busy"],
        )
    except (KeyError, TypeError) as error:
        raise ManifestError(f"report: {path} must be the log of a harvest, it lacks {error}; remove it") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file."""
    return _parsed(path, path.read_bytes()) if path.is_file() else {}


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON object of each line; [] where there is no file. A last line without a newline is still being written."""
    if not path.is_file():
        return []
    return [_parsed(path, line) for line in path.read_bytes().split(b"\n")[:-1]]


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"report: {path} must be JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise ManifestError(f"report: {path} must hold JSON objects, got {type(values).__name__}")
    return values


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"sae": {"lr": 1}} -> {"sae.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def remembered_cache(runs: Path) -> Path:
    """The cache that the first run of a folder was trained on, as its config.json says.

    Raises:
        ManifestError: no run there names a cache.
    """
    for config in [runs / CONFIG_FILE, *sorted(runs.glob(f"*/{CONFIG_FILE}"))]:
        if config.is_file() and (cache := read_json(config).get("cache")):
            return Path(cache["path"])
    raise ManifestError(f"{runs} holds no run that remembers its cache; train first, or pass --cache or --model")
