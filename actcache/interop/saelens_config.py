"""`read_saelens_config`: a training config of SAELens 0 to 6, read from a file or an object, and what becomes of it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actcache.arguments import local_path, shown
from actcache.errors import ConfigError
from actcache.files import NoFile, opened
from actcache.interop.python_call import CLASS, MAX_NUMBER, Unread, read_calls
from actcache.interop.saelens_fields import (
    HERE,
    LIMITS,
    OF_HARVEST,
    RENAMED,
    RUNNER,
    SAE,
    USED_BY,
    Command,
    Limit,
)
from actcache.interop.yaml_file import MAX_BYTES, read_yaml

Verdict = Literal["refused", "different", "taken", "not here"]

CLASSES = ("LanguageModelSAERunnerConfig", "CacheActivationsRunnerConfig")
MAX_VALUES, MAX_DEPTH = 10_000, 20  # of a config; the longest of SAELens have some hundred
_OF_CLASS = {"TopK": "topk", "BatchTopK": "batchtopk", "AbsTopK": "abstopk", "JumpReLU": "jumprelu"}
_OF_CLASS |= {"MatryoshkaBatchTopK": "matryoshka_batchtopk", "Standard": "standard", "Gated": "gated"}
_OF_CLASS |= {"MatchingPursuit": "matching_pursuit", "Temporal": "temporal"}

# What SAELens takes for a field that a config leaves out (config.py and saes/*.py of 6.54.12).
DEFAULTS: dict[str, Any] = {
    "model_name": "gelu-2l",
    "hook_name": "blocks.0.hook_mlp_out",
    "dataset_path": "",
    "streaming": True,
    "context_size": 128,
    "training_tokens": 2_000_000,
    "sequence_separator_token": "bos",
    "seed": 42,
    "dtype": "float32",
    "prepend_bos": True,
    "train_batch_size_tokens": 4096,
    "store_batch_size_prompts": 32,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "lr": 3e-4,
    "lr_scheduler_name": "constant",
    "lr_warm_up_steps": 0,
    "lr_decay_steps": 0,
    "dead_feature_window": 1000,
    "n_eval_batches": 10,
    "n_checkpoints": 0,
    "exclude_special_tokens": False,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "decoder_init_norm": 0.1,
    "l1_coefficient": 1.0,
    "l1_warm_up_steps": 0,
    "k": 100,
    "aux_loss_coefficient": 1.0,
    "matryoshka_widths": [],
    "l0_coefficient": 1.0,
    "l0_warm_up_steps": 0,
    "jumprelu_init_threshold": 0.01,
    "jumprelu_bandwidth": 0.05,
    "jumprelu_sparsity_loss_mode": "step",
    "jumprelu_tanh_scale": 4.0,
    "log_to_wandb": True,
    "wandb_log_frequency": 10,
    "eval_every_n_wandb_logs": 100,
}
# Where SAELens 3 to 5 took another (sae_lens/config.py of v5.11.0). Its fields lie flat, without `sae` and `logger`.
_NEW = ("decoder_init_norm", "l0_coefficient", "l0_warm_up_steps")  # fields that they do not have
FLAT_DEFAULTS: dict[str, Any] = {name: value for name, value in DEFAULTS.items() if name not in _NEW} | {
    "architecture": "standard",
    "d_in": 512,
    "adam_beta1": 0.0,
    "l1_coefficient": 1e-3,
    "b_dec_init_method": "geometric_median",
    "activation_fn": "relu",
    "activation_fn_kwargs": {"k": 100},
    "normalize_sae_decoder": True,
    "decoder_heuristic_init": False,
    "decoder_heuristic_init_norm": 0.1,
    "init_encoder_as_decoder_transpose": False,
    "scale_sparsity_penalty_by_decoder_norm": False,
    "jumprelu_init_threshold": 0.001,
    "jumprelu_bandwidth": 0.001,
}
# Of which type a value must be where the default does not say it; None for a field of several types.
_KINDS: dict[str, type | None] = {
    **dict.fromkeys(("sequence_separator_token", "exclude_special_tokens", "normalize_activations"), None),
    **dict.fromkeys(("architecture", "activation_fn", "activation_fn_kwargs"), None),
    **dict.fromkeys(("d_sae", "expansion_factor", "hook_point_layer"), int),
    **dict.fromkeys(("lr_end", "target_l0", "pre_act_loss_coefficient"), float),
    "hook_point": str,
    "run_name": str,
}
_MAY_BE_NONE = ("decoder_init_norm", "d_sae", "expansion_factor", "lr_end", "target_l0", "pre_act_loss_coefficient")
_MAY_BE_NONE += ("run_name",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One field of a config: its value, what becomes of it, and the words that say so.

    is_given: whether the config gives the value, or it is SAELens' default.
    """

    field: str
    value: object
    is_given: bool
    verdict: Verdict
    here: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SAELensConfig:
    """A training config of SAELens.

    Attributes:
        who: where it comes from, for messages.
        given: the fields that it gives, those of `sae` and `logger` beside the others.
        is_flat: whether it is of SAELens 0 to 5, where the fields of SAE and logger lie beside the others.
        of_sae_alone: whether it is the cfg.json of an SAE, which does not say how it was trained.
    """

    who: str
    given: Mapping[str, Any]
    is_flat: bool
    of_sae_alone: bool = False

    def __getitem__(self, name: str) -> Any:
        """The value of a field: what the config gives, or what SAELens takes then. None if it has no default."""
        former = next((old for old, new in RENAMED.items() if new == name and old in self.given), name)
        default = self._defaults.get(name)
        value = self.given.get(name, self.given.get(former, default))
        is_whole = isinstance(value, float) and value.is_integer() and _kind(name, default) is int
        return int(value) if is_whole else value

    @property
    def _defaults(self) -> Mapping[str, Any]:
        return FLAT_DEFAULTS if self.is_flat else DEFAULTS

    @property
    def architecture(self) -> str | None:
        """The architecture, None if there is no SAE; topk for a flat config whose activation function is topk."""
        is_topk = self.is_flat and self["activation_fn"] == "topk"
        return "topk" if is_topk else self["architecture"]

    @property
    def hook_name(self) -> str:
        """The hook, with the layer of `hook_point` put in."""
        point = self.given.get("hook_point")
        return self["hook_name"] if point is None else str(point).replace("{layer}", str(self["hook_point_layer"] or 0))

    @property
    def version(self) -> tuple[int, ...] | None:
        """The version of SAELens that trains by it, if it says so."""
        said = self.given.get("sae_lens_training_version") or self.given.get("sae_lens_version")
        numbers = re.match(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", said) if isinstance(said, str) else None
        return None if numbers is None else tuple(map(int, numbers.groups()))

    def rows(self, command: Command) -> list[Row]:
        """What becomes of each field: first what is refused, then what is different here.

        A default of SAELens has its row too where something is made of it, or where it is different here.
        """
        defaults = {name: value for name, value in self._defaults.items() if name not in self._named}
        of_defaults = [self._row(name, value, command) for name, value in defaults.items()]
        rows = [self._row(name, value, command) for name, value in self.given.items()]
        rows += [row for row in of_defaults if row.verdict != "not here"]
        order: tuple[Verdict, ...] = ("refused", "different", "taken", "not here")
        concerned = [row for row in rows if command == "train" or row.field in OF_HARVEST or row.field not in HERE]
        return sorted(concerned, key=lambda row: order.index(row.verdict))

    @property
    def _named(self) -> set[str]:
        return {RENAMED.get(name, name) for name in self.given}

    def _row(self, name: str, value: object, command: Command) -> Row:
        verdict, here = self._verdict(name, value, command)
        words = re.sub(r"^not here[:,] ", "", here).replace("`", "")
        return Row(field=name, value=value, is_given=name in self.given, verdict=verdict, here=words)

    def _verdict(self, name: str, value: object, command: Command) -> tuple[Verdict, str]:
        now = RENAMED.get(name, name)
        here, limit, kind = HERE.get(name), LIMITS.get(now), _kind(now, self._defaults.get(now))
        if here is None:
            unnamed = "write it out, each field by its name"
            return "refused", unnamed if name == "*" else "SAELens has no such field; take it out, or correct its name"
        is_lost, is_read = here.startswith("not here"), command == "train" or name in OF_HARVEST
        if command == "train" and self.architecture not in USED_BY.get(name, (self.architecture,)):
            return "not here", f"not here: {self.architecture} does not use it"
        if isinstance(value, Unread) and not (is_lost and limit is None):
            return "refused", "it is more than a literal; write its value"
        is_absent = value is None and now in _MAY_BE_NONE
        if is_read and not is_lost and not is_absent and kind is not None and not _is(value, kind):
            return "refused", f"it must be {'a list of int' if kind is list else kind.__name__}"
        if limit is not None and not _is_met(limit, value, self):
            return ("refused" if limit.refused_by == command else "different"), here
        return ("not here" if is_lost else "taken"), here

    def refuse(self, rows: Sequence[Row]) -> None:
        """Raise ConfigError if a row is refused. The message names all of them."""
        refused = [f"{row.field}={shown(row.value)} ({row.here})" for row in rows if row.verdict == "refused"]
        if refused:
            raise ConfigError(
                f"{self.who}: would train or harvest something else than it asks for: {'; '.join(refused)}; change "
                "these fields in a copy of it to go without them"
            )


def _kind(name: str, default: object) -> type | None:
    """The type that a value of a field must have to be taken; None for a field of several."""
    return _KINDS.get(name, None if default is None else type(default))


def _is(value: object, kind: type) -> bool:
    """Whether a value is of a kind; a whole float is an int, an int a float, and a bool is no number."""
    if kind in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool) and (kind is float or value % 1 == 0)
    if kind is list:
        return isinstance(value, list | tuple) and all(_is(each, int) for each in value)
    return isinstance(value, kind)


def _is_met(limit: Limit, value: object, config: SAELensConfig) -> bool:
    try:
        return bool(limit.is_met(value, config))
    except (TypeError, ValueError, LookupError, OverflowError):  # a value of another type than any of SAELens
        return False


def read_saelens_config(cfg: object) -> SAELensConfig:
    """Read a training config of SAELens.

    Args:
        cfg: the path of a file, the config as a mapping, or SAELens' own object. A file is JSON or YAML by its suffix,
            such as runner_cfg.json or the cfg.json of an SAE; any other holds Python, in which the config is called
            once: LanguageModelSAERunnerConfig(...). The text is read, and never run.

    Raises:
        ConfigError: it is no such config, or not within the bounds that a stranger's file must keep.
    """
    if isinstance(cfg, str | Path):
        who, found = str(cfg), _of_file(local_path(cfg))
    else:
        who, found = "the config of SAELens", _plain(cfg)
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{who}: must be a config of SAELens, as a mapping, a file or its own object; got {shown(cfg)}"
        )
    _check_bounds(who, found)
    return _flattened(who, {str(name): value for name, value in found.items()})


def _of_file(path: Path) -> object:
    if path.suffix.lower() in (".yaml", ".yml"):
        return read_yaml(path)
    try:
        with opened(path) as file:
            content = file.read(MAX_BYTES + 1)
    except NoFile as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing file") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: must have at most {MAX_BYTES:,} bytes; is it a config?")
    is_json = path.suffix.lower() == ".json"
    try:
        text = content.decode()
        if is_json:
            return json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = "JSON" if is_json else "text in UTF-8"
        raise ConfigError(f"{path}: is not {kind}: {' '.join(str(error).split())}") from error
    calls = read_calls(str(path), text, CLASSES)
    if len(calls) != 1:
        raise ConfigError(f"{path}: must call {' or '.join(CLASSES)} once, it does so {len(calls)} times")
    return calls[0]


def _plain(config: object) -> object:
    """SAELens' object as a mapping, with those of SAE and logger in it. Others are as they are."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    values = {each.name: _plain(getattr(config, each.name)) for each in dataclasses.fields(config)}
    return {CLASS: type(config).__name__} | {name: _without_objects(value) for name, value in values.items()}


def _without_objects(value: object) -> object:
    """A value as a file may hold it: what is of another kind, such as a dtype of torch, as its text."""
    return value if isinstance(value, str | int | float | list | tuple | Mapping | None) else str(value)


def _check_bounds(who: str, config: object) -> None:
    """Raise ConfigError for more values, deeper nesting or larger numbers than a config has."""
    values, left = [(config, 0)], MAX_VALUES
    while values:
        value, depth = values.pop()
        left -= 1
        is_large = isinstance(value, int | float) and not -MAX_NUMBER <= value < MAX_NUMBER
        if left < 0 or depth > MAX_DEPTH or is_large:
            raise ConfigError(
                f"{who}: must have at most {MAX_VALUES:,} values, {MAX_DEPTH} levels deep, and numbers of at most 64 "
                f"bits{f', got {shown(value)}' if is_large else ''}; is it a config?"
            )
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        values += [(each, depth + 1) for each in inside]


def _flattened(who: str, found: dict[str, Any]) -> SAELensConfig:
    """The config with all fields side by side. `dtype` and `device` of the SAE become `sae.dtype` and `sae.device`."""
    if isinstance(found.get("dtype"), str):
        found["dtype"] = found["dtype"].removeprefix("torch.")
    sae, logger, metadata = (found.get(name) for name in ("sae", "logger", "metadata"))
    if sae is None and isinstance(metadata, Mapping) and "architecture" in found and "model_name" not in found:
        runner = {name: value for name, value in metadata.items() if name in RUNNER and value is not None}
        details = metadata.get("training_architecture_details")
        trained = metadata.get("training_architecture") or found["architecture"]
        sae = found | (dict(details) if isinstance(details, Mapping) else {}) | {"architecture": trained}
        return SAELensConfig(who=who, given=runner | _of_sae(sae), is_flat=False, of_sae_alone=True)
    runner = {name: value for name, value in found.items() if name not in (CLASS, "sae", "logger")}
    if sae is None:
        of_sae_alone = "activation_fn_str" in found and "lr" not in found
        return SAELensConfig(who=who, given=runner, is_flat=found.get(CLASS) != CLASSES[1], of_sae_alone=of_sae_alone)
    if not isinstance(sae, Mapping) or not isinstance(logger, Mapping | None):
        raise ConfigError(f"{who}: sae and logger must be configs of their own, got {shown(sae)} and {shown(logger)}")
    of_logger = {str(name): value for name, value in (logger or {}).items() if name != CLASS}
    return SAELensConfig(who=who, given=runner | _of_sae(sae) | of_logger, is_flat=False)


def _of_sae(sae: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an SAE's config, with the architecture that its class says."""
    stem = re.sub(r"(Training)?SAEConfig$", "", str(sae.get(CLASS, "")))
    named = {"architecture": _OF_CLASS.get(stem, stem or None)} | dict(sae)
    return {
        f"sae.{name}" if f"sae.{name}" in SAE else str(name): value for name, value in named.items() if name != CLASS
    }
