"""The folder of a run, RUNS/<name>/: what its files are called, how they are read, and how they are written whole.

    config.json      the settings of the SAE and of training; the cache and the model
    metrics.jsonl    a line for each logged step; a resumed run writes the same lines
    timing.jsonl     how long the same steps took
    checkpoint/      the training states that were saved last
    sae/             the trained weights, once training has ended
    failed.json      why training was stopped, where the SAE diverged
    eval.json        the metrics on held-out rows, once they are measured
    crc32c.json      checksums of the JSON files, and of the logs up to the last checkpoint

RUNS/.lock is held by whoever trains there (`only_writer`).

`read_runs` and `read_harvests` read these files, and the logs of harvests, for the report. To them a file that is not
there yet is empty, and a damaged one is an error.
"""

import fcntl
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.arguments import shown
from actcache.errors import CacheLocked, CacheMismatch, ManifestError
from actcache.files import (
    PARTIAL_SUFFIX,
    NoFile,
    contents,
    entries,
    is_file,
    is_folder,
    listed,
    make_folder,
    name_,
    naming,
    refuse_links,
    require_writable,
    write_atomically,
)
from actcache.machine.limits import json_memory, require_memory_for_array
from actcache.machine.links import own_file
from actcache.store.locks import is_at, try_lock
from trainer.checksums import (
    CHECKSUMS_FILE,
    add_checksums,
    checked_bytes,
    checksums_of,
    read_checksums,
    sealed,
    unless_changed,
)

Number = int | float
LARGE = 1 << 63
CONFIG_FILE, METRICS_FILE, TIMING_FILE, FAILED_FILE = "config.json", "metrics.jsonl", "timing.jsonl", "failed.json"
EVALUATION_FILE = "eval.json"
BASELINES = ("pca", "random")  # what config.json of a baseline has as its architecture
CHECKPOINTS, SAE_FOLDER = "checkpoint", "sae"
MOST_LEVELS = 64
TOO_DEEP = f"lists and objects nested more than {MOST_LEVELS} deep"
RUNS_LOCK = ".lock"  # no run can have this name
# These settings may differ between two calls on one folder, because they change no result.
_MAY_DIFFER = {("cache", "path"), ("train", "checkpoint_every"), ("train", "keep_checkpoints")}

logger = logging.getLogger("actcache")


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
        """Whether this is a baseline, which was not trained."""
        return self.sae.get("architecture") in BASELINES

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
    n_tokens: Number
    total_seconds: float
    model_seconds: float


def read_runs(runs: Path) -> list[RunFiles]:
    """Read every folder of `runs` that has a config.json, or `runs` itself if it has one.

    Returns:
        The runs by name, then the baselines by name.

    Raises:
        ManifestError: there is no such folder, or a file is damaged or malformed.
    """
    folders = run_folders(runs.resolve())  # so that "." has a name
    if not folders:
        raise ManifestError(f"report: {runs} must be a folder of runs, it holds no config.json; train first")
    found = [_read_run(folder) for folder in folders]
    return sorted(found, key=lambda run: (run.is_baseline, run.name))


def read_harvests(runs: Sequence[RunFiles]) -> list[HarvestTime]:
    """Read the log of every harvest that added rows to a cache that the runs name, in the order of time.

    A cache that is no longer there has no logs. What a run names as its cache may be anything: a log that cannot be
    read is left out, which is logged.
    """
    caches = {path for run in runs if isinstance(path := run.about("cache", "path"), str)}
    times: list[HarvestTime] = []
    for path in sorted(path for cache in caches for path in _harvest_logs(cache)):
        try:
            times.append(_harvest_time(path, read_json(path)))
        except (ManifestError, NoFile) as error:
            logger.warning("report: without a log of a harvest: %s", error)
    return sorted((time for time in times if time.n_tokens > 0), key=lambda time: time.finished)


def finite(value: object) -> Number | None:
    """The value if it is a finite number, else None. A large whole number is a float, as sums of it are."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None  # math.isfinite fails where an int is larger than any float
    return value if abs(value) < LARGE else float(value)


def json_values(text: bytes) -> Any:
    """What JSON of anybody says; NaN and infinity are null.

    Raises ValueError if it is none, if a number is larger than any float, or if lists and objects are nested so deeply
    that printing them could fail; MemoryError if there is no room for its values.
    """
    require_memory_for_array(json_memory(text), "reading JSON")
    try:
        values = json.loads(text, parse_constant=lambda _: None)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    inside = [values]
    for _ in range(MOST_LEVELS + 1):
        if math.inf in inside or -math.inf in inside:  # 1e999
            raise ValueError("a number that is larger than any float")
        level = [each for each in inside if isinstance(each, dict | list)]
        if not level:
            return values
        inside = [each for outer in level for each in (outer.values() if isinstance(outer, dict) else outer)]
    raise ValueError(TOO_DEEP)


def check_out(out: Path, names: set[str]) -> None:
    """Raise CacheMismatch unless `out` is absent, empty, or a folder that holds a run.

    names: the names of the runs that are to be written; a folder with one of these names counts as a run.
    """
    if is_file(out):
        raise CacheMismatch(f"{out}: must be a folder for runs, is a file; pass another --out")
    held = [path.name for path in entries(out) if path.name != RUNS_LOCK]
    if held and not names.intersection(held) and not any(is_file(out / name / CONFIG_FILE) for name in held):
        raise CacheMismatch(f"{out}: must be empty or hold runs, holds {', '.join(held[:5])}; pass another --out")


def check_folder(folder: Path, description: Mapping[str, Any]) -> None:
    """Raise CacheMismatch unless the folder is absent, empty, or holds the run of this config.json."""
    if not is_file(folder / CONFIG_FILE):
        if is_file(folder) or any(not path.name.endswith(PARTIAL_SUFFIX) for path in entries(folder)):
            raise CacheMismatch(f"{folder}: must be a run or absent, it has no {CONFIG_FILE}; pass another --out")
        return
    held, wanted = _flat(read_run_json(folder, CONFIG_FILE)), _flat(description)
    keys = [key for key in sorted({*held, *wanted} - _MAY_DIFFER) if held.get(key) != wanted.get(key)]
    if keys:
        differences = [
            f"{'.'.join(key)[:200]} is {shown(held.get(key))} there, {shown(wanted.get(key))} here" for key in keys[:5]
        ]
        differences += [f"{len(keys) - 5} more"] if len(keys) > 5 else []
        raise CacheMismatch(f"{folder}: holds another run: {'; '.join(differences)}; pass another --out or name")


def is_over(folder: Path) -> bool:
    """Whether an earlier call finished this run, or saw it diverge, as it would again."""
    return is_folder(folder / SAE_FOLDER) or is_file(folder / FAILED_FILE)


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
            refused = OSError(error.errno, error.strerror, str(folder))
            name_(refused, folder)
            raise refused from None
        with file:
            with naming(path):
                is_ours = try_lock(file.fileno(), fcntl.LOCK_EX)
                is_there = is_at(path, file.fileno())
            if not is_ours:
                raise CacheLocked(f"{folder}: another process {doing}; wait for it, or stop it")
            if is_there:
                yield
                return


def run_folders(runs: Path) -> list[Path]:
    """`runs` itself if it is a run, else the folders in it that are, by name.

    A folder whose name begins with a dot is what a killed import left, and no run.
    """
    if _is_run(runs):
        return [runs]
    return [path for path in listed(runs) if not path.name.startswith(".") and _is_run(path)]


def _is_run(folder: Path) -> bool:
    """Whether a folder has a config.json, or a checksum of one: to lose it makes it no other folder."""
    return is_file(folder / CONFIG_FILE) or CONFIG_FILE in read_checksums(folder / CHECKSUMS_FILE)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, up to the first one that a kill left incomplete; [] without a file.

    Raises ManifestError if the lines up to the last checkpoint are not those that were written.
    """
    lines: list[dict[str, Any]] = []
    for text in _log_bytes(path).splitlines(keepends=True):
        try:
            line = json_values(text)
        except ValueError:
            break
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            break
        lines.append(line)
    return lines


def read_run_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of a run. Raises as `read_json`, and ManifestError if it is not what was written."""
    path, held = folder / name, folder / CHECKSUMS_FILE
    return _json_object(path, lambda: checked_bytes(path, read_checksums(held), unless_changed(held)))


def model_of_run(folder: Path, config: Mapping[str, Any]) -> tuple[str, str | None]:
    """(name, revision) of the model that the config.json of a run names. Raises ManifestError if it names none."""
    block = config.get("model")
    name, revision = (block.get("name"), block.get("revision")) if isinstance(block, dict) else (None, None)
    is_named = isinstance(name, str) and isinstance(revision, str | None)
    _require(is_named, folder / CONFIG_FILE, "model", "an object with the name and the revision of a model", block)
    return str(name), revision


def write_run_json(folder: Path, name: str, values: Mapping[str, Any]) -> None:
    """Write a JSON file of a run, whole or not at all, and then its checksum."""
    held, data = folder / CHECKSUMS_FILE, json_bytes(values)
    checksums = read_checksums(held)
    if checksums.pop(name, None) is not None:  # else a kill in between would leave a file with the other's checksum
        write_atomically(held, [sealed(checksums)])
    write_atomically(folder / name, [data])
    add_checksums(held, checksums_of({name: data}))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ManifestError: there is no such file, or it holds anything else.
        OSError: it cannot be read.
    """
    return _json_object(path, lambda: contents(path))


def _json_object(path: Path, read: Callable[[], bytes], *, where: str = "") -> dict[str, Any]:
    """The JSON object that `read` gives of a file. Raises ManifestError if there is none, or no file.

    where: the place within the file, for the message.
    """
    try:
        values = json_values(read())
    except NoFile as error:
        raise ManifestError(f"must be readable JSON, is no file ({error.strerror})", path=path, where=where) from error
    except ValueError as error:
        what = f"must be readable JSON, got {type(error).__name__}: {error}"
        raise ManifestError(what, path=path, where=where) from error
    if not isinstance(values, dict):
        raise ManifestError(f"must be a JSON object, got {type(values).__name__}", path=path, where=where)
    return values


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Canonical JSON: sorted keys, finite numbers, one newline at the end."""
    return (json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _read_run(folder: Path) -> RunFiles:
    config, evaluation = read_run_json(folder, CONFIG_FILE), _read_if_there(folder, EVALUATION_FILE)
    error = _read_if_there(folder, FAILED_FILE).get("error")
    _require(isinstance(config.get("sae", {}), dict), folder / CONFIG_FILE, "sae", "an object", config.get("sae"))
    _check_lists(folder / EVALUATION_FILE, evaluation)
    _require(error is None or isinstance(error, str), folder / FAILED_FILE, "error", "a text", error)
    return RunFiles(
        folder=folder,
        config=config,
        evaluation=evaluation,
        metrics=_read_lines(folder / METRICS_FILE),
        timing=_read_lines(folder / TIMING_FILE),
        error=error,
    )


def _require(is_so: bool, path: Path, field: str, must: str, got: object) -> None:
    if not is_so:
        raise ManifestError(f"{field} must be {must}, got {shown(got)}", path=path, way_out="restore the file")


def _check_lists(path: Path, evaluation: dict[str, Any]) -> None:
    """Raise ManifestError unless the lists of eval.json, where it has them, are as long as they must be."""
    if (histogram := evaluation.get("feature_density")) not in (None, {}):
        edges, counts = _numbers(path, "feature_density", histogram, ("log10_edges", "counts"))
        fits = None not in (*edges, *counts) and len(edges) == len(counts) + 1
        _require(fits, path, "feature_density.log10_edges", "one number more than counts", edges)
    if (by_position := evaluation.get("ce_loss_by_position")) not in (None, {}):
        with_sae, without = _numbers(path, "ce_loss_by_position", by_position, ("with_sae", "without_sae"))
        _require(len(with_sae) == len(without), path, "ce_loss_by_position", "lists of one length", with_sae)


def _numbers(path: Path, field: str, block: object, keys: tuple[str, ...]) -> list[list[Number | None]]:
    """The lists of finite numbers or nulls that an object has under these keys."""
    _require(isinstance(block, dict), path, field, "an object", block)
    assert isinstance(block, dict)
    for key in keys:
        values = block.get(key)
        is_list = isinstance(values, list) and all(each is None or finite(each) is not None for each in values)
        _require(is_list, path, f"{field}.{key}", "a list of numbers", values)
    return [block[key] for key in keys]


def _harvest_logs(cache: str) -> list[Path]:
    """The logs of the harvests into a cache. Those of a cache of somebody else may be closed to us, which is said."""
    try:
        return [path for path in listed(Path(cache) / "log") if path.match("harvest-*.json")]
    except ValueError:  # a NUL, or half a character: no folder has such a name
        return []
    except PermissionError as error:
        logger.warning("%s: its logs cannot be read (%s), so the report is without them", cache, error.strerror)
        return []


def _harvest_time(path: Path, log: dict[str, Any]) -> HarvestTime:
    try:
        seconds, finished = log["seconds"], log["finished"]
        numbers = [finite(seconds[key]) for key in ("n_tokens", "total", "model_busy")]
    except (KeyError, TypeError) as error:
        raise ManifestError(f"must be the log of a harvest, it lacks {error}", path=path) from error
    _require(isinstance(finished, str), path, "finished", "a time", finished)
    _require(None not in numbers, path, "seconds", "of numbers", seconds)
    n_tokens, total_seconds, model_seconds = (number for number in numbers if number is not None)
    return HarvestTime(finished=finished, n_tokens=n_tokens, total_seconds=total_seconds, model_seconds=model_seconds)


def _read_if_there(folder: Path, name: str) -> dict[str, Any]:
    """What `read_run_json` reads; {} where there is no file, nor a checksum of one."""
    is_there = is_file(folder / name) or name in read_checksums(folder / CHECKSUMS_FILE)
    return read_run_json(folder, name) if is_there else {}


def _log_bytes(path: Path) -> bytes:
    """What a log holds, checked up to the last checkpoint; b"" where there is none."""
    held = path.with_name(CHECKSUMS_FILE)
    try:
        return checked_bytes(path, read_checksums(held), unless_changed(held), grows=True)
    except NoFile:
        return b""


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON object of each line; [] where there is no file. A last line without a newline is still being written."""
    lines = _log_bytes(path).split(b"\n")[:-1]
    return [_json_object(path, lambda line=line: line, where=f"line {i}") for i, line in enumerate(lines, 1)]


def _flat(nested: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """{"sae": {"lr": 1}} -> {("sae", "lr"): 1}."""
    flat: dict[tuple[str, ...], Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, (*above, key)) if isinstance(value, dict) else {(*above, key): value}
    return flat
