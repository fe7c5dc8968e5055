"""The YAML file of a sweep: `base` with a `grid` or with `runs`. It is checked, and then resolved against a cache.

A file gives the settings of each run that the user cares about. `SweepConfig.expand` alone adds the cache's facts
(widths, input scales, variance), the length of training and every default. No setting is assigned later.
"""

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from actcache.arguments import field_types, local_path, one_of, shown, type_fields_, typed
from actcache.errors import CacheMismatch, ConfigError
from actcache.interop.yaml_file import read_yaml
from trainer.config.presets import PRESETS, Facts, HookFacts, default_preset, preset_settings
from trainer.config.settings import (
    PENALISED,
    TOPK_FAMILY,
    TRANSCODERS,
    RowFilter,
    SAEConfig,
    TrainConfig,
    check_settings,
)

MAX_RUNS, MAX_VALUES = 10_000, 1_000_000  # the largest sweeps have hundreds of runs, each of tens of values

_FROM_CACHE = (
    *("d_in", "d_out", "hook_widths", "input_scale", "output_scale", "hook_scales"),
    *("total_variance", "training_tokens", "n_steps"),
)
_NEEDED = ("name", "architecture", "hook_name", "d_sae")
_USED_BY = {
    "hook_names": ("crosscoder",),
    "hook_name_out": TRANSCODERS,
    "k": TOPK_FAMILY,
    "k_anneal_start": TOPK_FAMILY,
    "k_anneal_steps": TOPK_FAMILY,
    "aux_coefficient": TOPK_FAMILY,
    "k_aux": TOPK_FAMILY,
    "encoder_dtype": TOPK_FAMILY,
    "matryoshka_widths": ("matryoshka_batchtopk",),
    "sparsity_coefficient": PENALISED,
    "sparsity_warm_up_steps": PENALISED,
    "jumprelu_bandwidth": ("jumprelu",),
    "jumprelu_init_threshold": ("jumprelu",),
    "jumprelu_sparsity_loss_mode": ("jumprelu",),
    "jumprelu_tanh_scale": ("jumprelu",),
    "pre_act_loss_coefficient": ("jumprelu",),
    "target_l0": ("jumprelu",),
}


@runtime_checkable
class InputStatistics(Protocol):
    """What a config needs of a hook's statistics; `actcache.format.stats.HookStatistics` is one."""

    @property
    def mean_norm(self) -> float: ...
    @property
    def mean_square_norm(self) -> float: ...
    @property
    def total_variance(self) -> float: ...


@runtime_checkable
class DescribesHooks(Protocol):
    """What a config needs of a cache; `actcache.store.cache.Cache` is one."""

    def hook(self, hook_name: str) -> Any: ...
    def statistics(
        self, hook_name: str, *, split: str = "train", row_filter: RowFilter = "no_special_tokens"
    ) -> InputStatistics: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """A sweep file with `base`, `grid` and `runs` expanded.

    Attributes:
        train: what all SAEs share.
        runs: the settings that the file gives for each SAE, with its `name`.

    Raises:
        ConfigError: there is no run, two have one name, or a setting is wrong.
    """

    train: TrainConfig = field(default_factory=TrainConfig)
    runs: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        type_fields_("sweep", self)
        if not self.runs:
            raise ConfigError("sweep: names no run; give base: {...}, a grid: {...} or runs: [...]")
        for run in self.runs:
            _check_run(run)
        _check_names([str(run["name"]) for run in self.runs])

    @classmethod
    def from_yaml(cls, path: str | Path) -> "SweepConfig":
        """Read a sweep file. Raises ConfigError for anything wrong in it; the error names the file."""
        loaded = read_yaml(local_path(path))
        try:
            return cls.from_dict(loaded)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, mapping: object) -> "SweepConfig":
        """Make the config from what a YAML file holds. Raises ConfigError for anything wrong in it."""
        sweep = _mapping("sweep", mapping)
        shared = field_types(TrainConfig)
        _check_keys("sweep", sweep, [*shared, "base", "grid", "runs"])
        train = {key: typed("sweep", key, value, shared[key]) for key, value in sweep.items() if key in shared}
        return cls(train=TrainConfig(**train), runs=tuple(_named(_expanded(sweep))))

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The hooks that the runs read, each once, in the order of their first use."""
        return tuple(dict.fromkeys(name for run in self.runs for name in _run_hooks(run)))

    def expand(self, cache: DescribesHooks, training_tokens: int) -> tuple[SAEConfig, ...]:
        """Give every setting of every run its value, from the run, its preset and the facts of the cache.

        Args:
            cache: describes the hooks.
            training_tokens: how many rows each SAE trains on.

        Raises:
            ConfigError: a setting is wrong, or a warm-up, decay or anneal takes more steps than the run has.
            CacheMismatch: the cache does not hold a hook, or the rows of a hook have no variance.
        """
        configs = tuple(_resolve(run, self._facts(cache, run, training_tokens)) for run in self.runs)
        for config in configs:
            config.check_ramps()
        return configs

    def _facts(self, cache: DescribesHooks, run: Mapping[str, Any], training_tokens: int) -> Facts:
        return Facts(
            inputs=tuple(self._hook_facts(cache, name) for name in _input_hooks(run)),
            outputs=tuple(self._hook_facts(cache, name) for name in _output_hooks(run)),
            training_tokens=training_tokens,
            n_steps=math.ceil(training_tokens / self.train.batch_tokens),
        )

    def _hook_facts(self, cache: DescribesHooks, hook_name: str) -> HookFacts:
        statistics = cache.statistics(hook_name, split="train", row_filter=self.train.row_filter)
        if not statistics.total_variance > 0:
            raise CacheMismatch(
                f"{hook_name}: training rows must differ from each other, got variance {statistics.total_variance} "
                f"over the rows of filter {self.train.row_filter!r}; harvest more text or keep special tokens"
            )
        facts = HookFacts(
            d_in=cache.hook(hook_name).d_in,
            mean_norm=statistics.mean_norm,
            mean_square_norm=statistics.mean_square_norm,
            total_variance=statistics.total_variance,
        )
        if not facts.is_scalable:
            raise CacheMismatch(
                f"{hook_name}: training rows must have lengths that can be scaled to 1, got a mean norm of "
                f"{facts.mean_norm} and a mean squared norm of {facts.mean_square_norm}; verify the cache"
            )
        return facts


def _run_hooks(run: Mapping[str, Any]) -> tuple[str, ...]:
    return (*_input_hooks(run), *_output_hooks(run))


def _input_hooks(run: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(run["hook_names"]) if run.get("hook_names") else (run["hook_name"],)


def _output_hooks(run: Mapping[str, Any]) -> tuple[str, ...]:
    return (run["hook_name_out"],) if run.get("hook_name_out") else _input_hooks(run)


# Stands for the cache while a sweep file is checked before any cache is open. No rule depends on these values.
_ANY_HOOK = HookFacts(d_in=2, mean_norm=1.0, mean_square_norm=1.0, total_variance=1.0)


def _any_facts(run: Mapping[str, Any]) -> Facts:
    n_inputs = len(run.get("hook_names") or "x")
    return Facts(inputs=(_ANY_HOOK,) * n_inputs, outputs=(_ANY_HOOK,) * n_inputs, training_tokens=1, n_steps=1)


def _check_run(run: Mapping[str, Any]) -> None:
    """Raise ConfigError for a run whose settings are wrong whatever the cache."""
    _resolve(run, _any_facts(_checked_run(run)))


def _resolve(run: Mapping[str, Any], facts: Facts) -> SAEConfig:
    """One SAE from the run's settings, those of its preset and the facts of the cache."""
    given = _checked_run(run)
    name, usual = given["name"], preset_settings(given.pop("preset"), given["d_sae"], facts)
    settings = usual | {key: v for key, v in given.items() if v is not None or key not in _USED_BY}
    _check_sparsity_is_given(name, settings)
    _check_optimizer(name, given, settings, usual)
    _check_schedules(name, settings)
    if settings["architecture"] == "jumprelu":
        _check_jumprelu_scale(name, given, settings, usual)
        _check_jumprelu_mode(name, settings)
    return SAEConfig(
        **settings, **_scales(settings, facts), training_tokens=facts.training_tokens, n_steps=facts.n_steps
    )


def _scales(settings: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """The settings that come from the hooks: widths, scales and variance."""
    normalized = settings["normalize_activations"]
    inputs, outputs = ([h.scale(normalized) for h in side] for side in (facts.inputs, facts.outputs))
    is_crosscoder = settings["hook_names"] is not None
    return {
        "d_in": facts.d_in,
        "d_out": sum(hook.d_in for hook in facts.outputs),
        "hook_widths": tuple(hook.d_in for hook in facts.inputs) if is_crosscoder else None,
        "input_scale": 1.0 if is_crosscoder else inputs[0],
        "output_scale": 1.0 if is_crosscoder else outputs[0],
        "hook_scales": tuple(inputs) if is_crosscoder else None,
        "total_variance": sum(h.total_variance * scale**2 for h, scale in zip(facts.outputs, outputs, strict=True)),
    }


def _checked_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings, checked, with both the architecture and the preset, either of which gives the other.

    Raises ConfigError for an unknown key, a value of a wrong type, or a setting that the architecture ignores.
    """
    who = str(run.get("name", "run"))[:200]  # a name may be no longer
    settable = {key: kind for key, kind in field_types(SAEConfig).items() if key not in _FROM_CACHE}
    settable["preset"] = str | None
    _check_keys(who, run, settable)
    present = {key: value for key, value in run.items() if value is not None or key not in _NEEDED}
    checked = {key: typed(who, key, value, settable[key]) for key, value in present.items()}
    given = _with_hook_name(who, _with_preset(who, checked))
    missing = [key for key in _NEEDED if key not in given]
    if missing:
        raise ConfigError(f"{who}: needs {', '.join(missing)}; add them to base or to the run")
    check_settings(who, given)  # before the defaults, which depend on architecture and d_sae
    for key, users in _USED_BY.items():
        if given.get(key) is not None and given["architecture"] not in users:
            raise ConfigError(
                f"{who}: {key} is a setting of {', '.join(users)}, got {key}={shown(given[key])} for "
                f"{given['architecture']}; take it out or give it to those runs only"
            )
    return given


def _with_preset(who: str, given: dict[str, Any]) -> dict[str, Any]:
    """The run's settings with the architecture of its preset, or the preset of its architecture, added."""
    architecture, preset = given.get("architecture"), given.get("preset")
    if preset is None:
        check_settings(who, {"architecture": architecture})
        return given if architecture is None else {**given, "preset": default_preset(architecture)}
    one_of(who, "preset", preset, PRESETS)
    may_be = PRESETS[preset].architectures
    if architecture is not None and architecture not in may_be:
        raise ConfigError(f"{who}: preset {preset} is one of {', '.join(may_be)}, got architecture {architecture!r}")
    return {**given, "architecture": architecture or may_be[0]}


def _with_hook_name(who: str, given: dict[str, Any]) -> dict[str, Any]:
    """The run's settings with hook_name, which is a crosscoder's first hook. A transcoder must name its second."""
    architecture = given.get("architecture")
    needed = "hook_names" if architecture == "crosscoder" else "hook_name_out"
    if architecture in ("crosscoder", *TRANSCODERS) and not given.get(needed):
        raise ConfigError(f"{who}: {architecture} needs {needed}; add it to base or to the run")
    if architecture != "crosscoder":
        return given
    if given.get("hook_name") is not None:
        raise ConfigError(f"{who}: crosscoder takes hook_names, got hook_name={given['hook_name']} too; leave it out")
    return {**given, "hook_name": given["hook_names"][0]}


def _check_sparsity_is_given(name: str, settings: Mapping[str, Any]) -> None:
    needed = "k" if settings["architecture"] in TOPK_FAMILY else "sparsity_coefficient"
    if settings[needed] is None:
        raise ConfigError(f"{name}: {settings['architecture']} needs {needed}; add it to base or to the run")


_MOMENTUM_OF = ("signum", "muon")
_DECAY_OF = ("adamw", "signum", "muon", "schedule_free")


def _check_optimizer(
    name: str, given: Mapping[str, Any], settings: Mapping[str, Any], usual: Mapping[str, Any]
) -> None:
    """Raise ConfigError for a preset's lr with another optimizer, or for momentum or weight decay that it lacks."""
    optimizer = settings["optimizer"]
    if given.get("lr") is None and optimizer != usual["optimizer"]:
        raise ConfigError(f"{name}: the default lr={settings['lr']} is not of optimizer={optimizer}; give lr")
    if (settings["momentum"] is not None) != (optimizer in _MOMENTUM_OF):
        raise ConfigError(
            f"{name}: momentum is a setting of {' and '.join(_MOMENTUM_OF)}, which need it, got "
            f"momentum={settings['momentum']} for {optimizer}; 0.95 is usual"
        )
    if settings["weight_decay"] and optimizer not in _DECAY_OF:
        raise ConfigError(f"{name}: weight_decay is a setting of {', '.join(_DECAY_OF)}, got it for {optimizer}")


def _check_schedules(name: str, settings: Mapping[str, Any]) -> None:
    if (settings["lr_end"] is not None) != (settings["lr_scheduler_name"] == "cosineannealing"):
        raise ConfigError(
            f"{name}: lr_end is where lr_scheduler_name=cosineannealing ends and must be given with it, got "
            f"lr_end={settings['lr_end']} for {settings['lr_scheduler_name']}; a tenth of lr is usual"
        )
    if (settings["k_anneal_start"] is not None) != (settings["k_anneal_steps"] > 0):
        raise ConfigError(
            f"{name}: k_anneal_start and k_anneal_steps go together, got {settings['k_anneal_start']} and "
            f"{settings['k_anneal_steps']}"
        )


def _check_jumprelu_scale(
    name: str, given: Mapping[str, Any], settings: Mapping[str, Any], usual: Mapping[str, Any]
) -> None:
    """Raise ConfigError if the run changes the input scale that the preset's bandwidth and threshold are made for."""
    unasked = [key for key in ("jumprelu_bandwidth", "jumprelu_init_threshold") if given.get(key) is None]
    scale = usual["normalize_activations"]
    if settings["normalize_activations"] != scale and unasked:
        raise ConfigError(
            f"{name}: the default {' and '.join(unasked)} hold for normalize_activations={scale} only, got "
            f"{settings['normalize_activations']}; use that scale or give {' and '.join(unasked)}"
        )


_MODE_NEEDS = {"step": (), "tanh": ("jumprelu_tanh_scale", "pre_act_loss_coefficient"), "quadratic": ("target_l0",)}


def _check_jumprelu_mode(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError unless exactly the settings of the run's penalty are given."""
    mode = settings["jumprelu_sparsity_loss_mode"]
    for setting in sorted({setting for needed in _MODE_NEEDS.values() for setting in needed}):
        if (settings[setting] is not None) != (setting in _MODE_NEEDS[mode]):
            wrong = "needs" if setting in _MODE_NEEDS[mode] else "ignores"
            raise ConfigError(f"{name}: jumprelu_sparsity_loss_mode={mode} {wrong} {setting}, got {settings[setting]}")


def _expanded(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`base` joined with each point of `grid` (the first key changes slowest), or with each of `runs`, or alone."""
    base = _mapping("base", sweep.get("base", {}))
    if "grid" in sweep and "runs" in sweep:
        raise ConfigError("sweep: give grid or runs, not both")
    if "runs" in sweep:
        runs = _sequence("runs", sweep["runs"])
        _check_size(len(runs) * _n_values(base))
        return [base | _mapping(f"runs[{i}]", run) for i, run in enumerate(runs)]
    if "grid" in sweep:
        grid = {key: _sequence(f"grid.{key}", values) for key, values in _mapping("grid", sweep["grid"]).items()}
        if not grid:
            raise ConfigError("sweep: grid is empty; name at least one setting and its values")
        n_runs = math.prod(map(len, grid.values()))
        if n_runs > MAX_RUNS:
            raise ConfigError(f"sweep: grid must make at most {MAX_RUNS:,} runs, it makes {n_runs:,}")
        _check_size(n_runs * _n_values(base) + sum(n_runs // len(each) * _n_values(each) for each in grid.values()))
        return [base | dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    return [base] if base else []


def _n_values(value: object) -> int:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return 1 + sum(map(_n_values, inside))


def _check_size(n_values: int) -> None:
    """Raise ConfigError if the runs that a sweep is to make hold more values than anybody waits for."""
    if n_values > MAX_VALUES:
        raise ConfigError(f"sweep: its runs must hold at most {MAX_VALUES:,} values, they hold {n_values:,}")


def _named(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs, each with a name: its own, or one made of its architecture, sparsity, width and what differs."""
    settings = [key for key in field_types(SAEConfig) if key not in ("name", "architecture", "d_sae", "k")]
    settings.remove("sparsity_coefficient")
    unnamed = [run for run in runs if run.get("name") is None]
    varying = [key for key in settings if len({repr(run.get(key)) for run in unnamed}) > 1]
    return [{**run, "name": _default_name(run, varying)} if run.get("name") is None else run for run in runs]


def _default_name(run: Mapping[str, Any], varying: Iterable[str]) -> str:
    """The name of a run that has none, such as `topk-k16-d1024-lr0.001`."""
    parts = [str(run.get("preset") or run.get("architecture") or "sae")]
    parts += [f"k{run['k']}"] if run.get("k") is not None else []
    parts += [f"l{run['sparsity_coefficient']}"] if run.get("sparsity_coefficient") is not None else []
    parts += [f"d{run.get('d_sae')}"]
    for key in varying:
        if run.get(key) is not None:
            value = "+".join(map(str, run[key])) if isinstance(run[key], list) else str(run[key])
            parts.append(value if key.startswith("hook_name") else f"{key}{value}")
    return re.sub(r"[^A-Za-z0-9._+=-]", "-", "-".join(parts))


def _check_names(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:  # without case, because some file systems do not tell such folders apart
        if name.lower() in seen:
            raise ConfigError(
                f"sweep: run names must differ, got {name!r} twice; give each run its own name or another setting"
            )
        seen[name.lower()] = name


def _check_keys(who: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3, cutoff=0.7)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{who}: unknown setting {shown(key)}; {hint}")


def _mapping(who: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{who}: must be a mapping of settings, got {shown(value)}")
    return {str(key): item for key, item in value.items()}


def _sequence(who: str, value: object) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{who}: must be a list of at least one entry, got {shown(value)}")
    return list(value)
