"""What to train: `SAEConfig` (one SAE, resolved), `TrainConfig` (what a sweep shares), `SweepConfig` (the YAML file).

A sweep file names runs by the settings that the user cares about; `SweepConfig.expand` is the only place where the
cache's facts (d_in, input scale, variance), the length of training and every default enter. Nothing is assigned later.
"""

import difflib
import itertools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import yaml

from actcache.errors import CacheMismatch, ConfigError

Architecture = Literal["standard", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated"]
SparsityLossMode = Literal["step", "tanh", "quadratic"]
Normalization = Literal["none", "expected_average_only_in", "unit_mean_square"]
DecoderBiasInit = Literal["zeros", "mean", "geometric_median"]
RowFilter = Literal["all", "no_special_tokens"]

BATCH_FAMILY = ("batchtopk", "matryoshka_batchtopk")  # k is a mean over the batch: used with a threshold, as jumprelu
TOPK_FAMILY = ("topk", "abstopk", *BATCH_FAMILY)
PENALISED = ("standard", "jumprelu", "gated")


def subtracts_b_dec(architecture: str) -> bool:
    """Whether the encoder sees x - b_dec (TopK family, gated) or x (standard, jumprelu)."""
    return architecture in (*TOPK_FAMILY, "gated")


_FROM_CACHE = ("d_in", "input_scale", "total_variance", "training_tokens", "n_steps")
_USED_BY = {
    "k": TOPK_FAMILY,
    "aux_coefficient": TOPK_FAMILY,
    "k_aux": TOPK_FAMILY,
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
    """What a config needs of a hook's statistics (`actcache.stats.HookStatistics` has more)."""

    @property
    def mean_norm(self) -> float: ...
    @property
    def mean_square_norm(self) -> float: ...
    @property
    def total_variance(self) -> float: ...


@runtime_checkable
class DescribesHooks(Protocol):
    """What a config needs of a cache (`actcache.cache.Cache` has more)."""

    def hook(self, hook_name: str) -> Any: ...
    def statistics(
        self, hook_name: str, *, split: str = "train", row_filter: RowFilter = "no_special_tokens"
    ) -> InputStatistics: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SAEConfig:
    """One SAE with every default resolved; `asdict` of it is JSON and `SAEConfig(**json)` gives it back.

    Steps count optimiser steps, tokens count rows. Widths of what an architecture does not use are 0 or None.
    Raises ConfigError when built with a value that breaks a rule.
    """

    name: str
    architecture: Architecture
    hook_name: str
    d_in: int
    d_sae: int
    k: int | None  # mean active latents a token (TopK family)
    matryoshka_widths: Sequence[int] | None  # ascending prefixes of the latents, each to reconstruct x; last: d_sae
    sparsity_coefficient: float | None  # lambda of the L1 (standard, gated) or L0 (jumprelu) term
    lr: float
    seed: int
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    lr_warm_up_steps: int
    lr_decay_steps: int
    max_grad_norm: float | None
    sparsity_warm_up_steps: int
    normalize_activations: Normalization
    input_scale: float  # x is multiplied by it before the SAE
    b_dec_init: DecoderBiasInit
    decoder_init_norm: float
    aux_coefficient: float
    k_aux: int
    dead_window: int  # tokens without firing after which a latent is dead
    jumprelu_bandwidth: float | None
    jumprelu_init_threshold: float | None
    jumprelu_sparsity_loss_mode: SparsityLossMode | None  # which penalty of jumprelu
    jumprelu_tanh_scale: float | None  # c of mode tanh
    pre_act_loss_coefficient: float | None  # lambda_P of mode tanh, whose dead latents it revives
    target_l0: float | None  # of mode quadratic
    total_variance: float  # of the scaled input, summed over d_in
    training_tokens: int
    n_steps: int

    def __post_init__(self) -> None:
        if self.matryoshka_widths is not None:  # JSON has lists
            object.__setattr__(self, "matryoshka_widths", tuple(self.matryoshka_widths))
        for setting, rule in _RULES.items():
            rule.check(self.name, setting, getattr(self, setting))
        if self.matryoshka_widths is not None and self.matryoshka_widths[-1] != self.d_sae:
            raise ConfigError(
                f"{self.name}: the last of matryoshka_widths must be d_sae={self.d_sae}, got {self.matryoshka_widths}"
            )
        for setting in ("k", "k_aux"):
            value = getattr(self, setting)
            if value is not None and value > self.d_sae:
                raise ConfigError(
                    f"{self.name}: {setting} must be at most d_sae={self.d_sae}, got {setting}={value}; "
                    f"take a smaller {setting} or a wider SAE"
                )

    @property
    def has_unit_norm_decoder(self) -> bool:
        """Whether decoder rows are held at norm 1 (all but those whose penalty weighs the norms instead)."""
        return self.architecture != "standard" and self.jumprelu_sparsity_loss_mode != "tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What all SAEs of a sweep share: the order and amount of data, and how often to write."""

    batch_tokens: int = 4096
    seed: int = 0
    tokens: int | None = None  # rows to train on; None: every row of every epoch
    epochs: int = 1
    exclude_special_tokens: bool = True
    log_every: int = 100  # steps
    checkpoint_every: int = 1000  # steps

    def __post_init__(self) -> None:
        for setting, rule in _TRAIN_RULES.items():
            rule.check("train", setting, getattr(self, setting))

    @property
    def row_filter(self) -> RowFilter:
        """Name of the cache statistics that describe the rows this sweep trains on."""
        return "no_special_tokens" if self.exclude_special_tokens else "all"

    def training_tokens(self, n_rows: int) -> int:
        """Rows to train on, of a cache that serves `n_rows` an epoch. Raises ConfigError if `tokens` asks for more."""
        available = n_rows * self.epochs
        if self.tokens is None:
            return available
        if self.tokens > available:
            raise ConfigError(
                f"train: {self.tokens} tokens asked, but {self.epochs} epoch(s) of this cache serve {available} "
                f"({n_rows} each); take fewer, harvest more, or allow epochs={math.ceil(self.tokens / max(n_rows, 1))}"
            )
        return self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepConfig:
    """A sweep file after `base` + `grid`/`runs` expansion: raw settings of each SAE, `name` included."""

    train: TrainConfig = field(default_factory=TrainConfig)
    runs: tuple[dict[str, Any], ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("sweep: names no run; give base: {...}, a grid: {...} or runs: [...]")
        for run in self.runs:
            _resolve(run, _ANY_HOOK)
        _check_names([str(run["name"]) for run in self.runs])

    @classmethod
    def from_yaml(cls, path: str | Path) -> "SweepConfig":
        """Read a sweep file. Raises ConfigError naming the file for anything wrong in it."""
        try:
            loaded = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_SweepLoader)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); name an existing sweep file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
        try:
            return cls.from_dict(loaded)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, mapping: object) -> "SweepConfig":
        """Build from what the YAML file holds: TrainConfig's keys, `base`, and `grid` or `runs`."""
        sweep = _mapping("sweep", mapping)
        shared = _field_types(TrainConfig)
        _check_keys("sweep", sweep, [*shared, "base", "grid", "runs"])
        train = {key: _typed("sweep", key, value, shared[key]) for key, value in sweep.items() if key in shared}
        return cls(train=TrainConfig(**train), runs=tuple(_named(_expanded(sweep))))

    @property
    def hook_names(self) -> tuple[str, ...]:
        """Hooks that the runs read, each once, in order of first use."""
        return tuple(dict.fromkeys(str(run["hook_name"]) for run in self.runs))

    def expand(self, cache: DescribesHooks, training_tokens: int) -> tuple[SAEConfig, ...]:
        """Resolve every run against a cache: the only place where d_in, input scale, variance and defaults enter.

        Raises ConfigError for a wrong setting, CacheMismatch (from the cache) for a hook that it does not hold.
        """
        return tuple(_resolve(run, self._facts(cache, str(run["hook_name"]), training_tokens)) for run in self.runs)

    def _facts(self, cache: DescribesHooks, hook_name: str, training_tokens: int) -> "_Facts":
        d_in = cache.hook(hook_name).d_in
        statistics = cache.statistics(hook_name, split="train", row_filter=self.train.row_filter)
        if not statistics.total_variance > 0:
            raise CacheMismatch(
                f"{hook_name}: training rows must differ from each other, got variance {statistics.total_variance} "
                f"over the rows of filter {self.train.row_filter!r}; harvest more text or keep special tokens"
            )
        return _Facts(
            d_in=d_in,
            mean_norm=statistics.mean_norm,
            mean_square_norm=statistics.mean_square_norm,
            total_variance=statistics.total_variance,
            training_tokens=training_tokens,
            n_steps=math.ceil(training_tokens / self.train.batch_tokens),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What the cache and the length of training add to a run's settings."""

    d_in: int
    mean_norm: float
    mean_square_norm: float
    total_variance: float
    training_tokens: int
    n_steps: int


# Stands in for the cache while a sweep file is checked before any cache is open: no rule depends on these values.
_ANY_HOOK = _Facts(d_in=2, mean_norm=1.0, mean_square_norm=1.0, total_variance=1.0, training_tokens=1, n_steps=1)


@dataclass(frozen=True, slots=True)
class _Rule:
    holds: Callable[[Any], bool]
    text: str

    def check(self, who: str, setting: str, value: object) -> None:
        if value is not None and not self.holds(value):
            raise ConfigError(f"{who}: {setting} must be {self.text}, got {setting}={value!r}")


_AT_LEAST_ONE = _Rule(lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE = _Rule(lambda value: 0 <= value < math.inf, "at least 0")
_POSITIVE = _Rule(lambda value: 0 < value < math.inf, "above 0")
_BETA = _Rule(lambda value: 0 <= value < 1, "in [0, 1)")
_SEED = _Rule(lambda value: 0 <= value < 2**63, "in [0, 2**63)")
_NAME = _Rule(
    lambda value: re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}", value) is not None,
    "a plain file name (letters, digits, . _ + = -)",
)


def _one_of(choices: object) -> _Rule:
    names = typing.get_args(choices)
    return _Rule(lambda value: value in names, f"one of {', '.join(names)}")


_RULES = {
    "name": _NAME,
    "architecture": _one_of(Architecture),
    "normalize_activations": _one_of(Normalization),
    "b_dec_init": _one_of(DecoderBiasInit),
    "jumprelu_sparsity_loss_mode": _one_of(SparsityLossMode),
    **dict.fromkeys(("d_in", "d_sae", "k", "dead_window", "training_tokens", "n_steps"), _AT_LEAST_ONE),
    **dict.fromkeys(("lr", "adam_eps", "max_grad_norm", "input_scale", "decoder_init_norm"), _POSITIVE),
    **dict.fromkeys(("jumprelu_bandwidth", "jumprelu_init_threshold", "total_variance"), _POSITIVE),
    **dict.fromkeys(("jumprelu_tanh_scale", "target_l0"), _POSITIVE),
    **dict.fromkeys(("sparsity_coefficient", "aux_coefficient", "k_aux", "pre_act_loss_coefficient"), _NOT_NEGATIVE),
    **dict.fromkeys(("lr_warm_up_steps", "lr_decay_steps", "sparsity_warm_up_steps"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BETA),
    "matryoshka_widths": _Rule(
        lambda widths: len(widths) > 0 and all(0 < a < b for a, b in itertools.pairwise((0.5, *widths))),
        "an ascending list of widths",
    ),
    "seed": _SEED,
}
_TRAIN_RULES = {
    **dict.fromkeys(("batch_tokens", "tokens", "epochs", "log_every", "checkpoint_every"), _AT_LEAST_ONE),
    "seed": _SEED,
}


def _resolve(run: Mapping[str, Any], facts: _Facts) -> SAEConfig:
    """One run's settings + the architecture's defaults + the cache's facts."""
    given = _checked_run(run)
    name, architecture = given["name"], given["architecture"]
    chosen: dict[str, Any] = {key: v for key, v in given.items() if v is not None or key not in _USED_BY}
    settings = _defaults(architecture, given["d_sae"], facts) | chosen
    _check_sparsity_is_given(name, architecture, settings)
    if architecture == "jumprelu":
        _check_jumprelu_preset(name, given, settings)
        _check_jumprelu_mode(name, settings)
    scale = _input_scale(settings["normalize_activations"], facts)
    return SAEConfig(
        d_in=facts.d_in,
        input_scale=scale,
        total_variance=facts.total_variance * scale**2,
        training_tokens=facts.training_tokens,
        n_steps=facts.n_steps,
        **settings,
    )


def _input_scale(normalize_activations: Normalization, facts: _Facts) -> float:
    """Factor that gives the input E||x|| = sqrt(d_in) or E||x||^2 = 1."""
    if normalize_activations == "expected_average_only_in":
        return math.sqrt(facts.d_in) / facts.mean_norm
    if normalize_activations == "unit_mean_square":
        return 1 / math.sqrt(facts.mean_square_norm)
    return 1.0


def _defaults(architecture: Architecture, d_sae: int, facts: _Facts) -> dict[str, Any]:
    """Every setting that a run may leave out."""
    common = {
        "k": None,
        "matryoshka_widths": None,
        "sparsity_coefficient": None,
        "seed": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,
        "lr_warm_up_steps": 0,
        "lr_decay_steps": 0,
        "max_grad_norm": None,
        "sparsity_warm_up_steps": 0,
        "normalize_activations": "expected_average_only_in",
        "b_dec_init": "zeros",
        "decoder_init_norm": 1.0,
        "aux_coefficient": 0.0,
        "k_aux": 0,
        "dead_window": max(1, min(10_000_000, facts.training_tokens // 10)),
        "jumprelu_bandwidth": None,
        "jumprelu_init_threshold": None,
        "jumprelu_sparsity_loss_mode": None,
        "jumprelu_tanh_scale": None,
        "pre_act_loss_coefficient": None,
        "target_l0": None,
    }
    return common | _DEFAULTS[architecture](d_sae, facts)


def _standard_defaults(d_sae: int, facts: _Facts) -> dict[str, Any]:
    """Anthropic, "Circuits Updates - April 2024", on training SAEs."""
    return {
        "sparsity_coefficient": 5.0,
        "lr": 5e-5,
        "lr_decay_steps": facts.n_steps // 5,
        "max_grad_norm": 1.0,
        "sparsity_warm_up_steps": facts.n_steps // 20,
        "decoder_init_norm": 0.1,
    }


def _topk_defaults(d_sae: int, facts: _Facts) -> dict[str, Any]:
    """Gao et al. 2024 (arXiv:2406.04093): lr falls with the root of the width; k_aux: a power of two near d_in / 2."""
    return {
        "lr": 2e-4 / math.sqrt(d_sae / 2**14),
        "adam_eps": 6.25e-10,
        "b_dec_init": "geometric_median",
        "aux_coefficient": 1 / 32,
        "k_aux": min(d_sae, 2 ** max(0, round(math.log2(facts.d_in / 2)))),
    }


def _batchtopk_defaults(d_sae: int, facts: _Facts) -> dict[str, Any]:
    """Bussmann et al. 2024 (arXiv:2412.06410); AuxK as for topk."""
    return _topk_defaults(d_sae, facts) | {"lr": 3e-4, "adam_beta2": 0.99, "adam_eps": 1e-8}


def _matryoshka_defaults(d_sae: int, facts: _Facts) -> dict[str, Any]:
    """Bussmann et al. 2025 (arXiv:2503.17547): prefixes of 1/32, 3/32, 7/32, 15/32 and all of the latents."""
    widths = sorted({max(1, d_sae * share // 32) for share in (1, 3, 7, 15, 32)})
    return _batchtopk_defaults(d_sae, facts) | {"matryoshka_widths": tuple(widths)}


def _gated_defaults(d_sae: int, facts: _Facts) -> dict[str, Any]:
    """Adam without momentum, as in arXiv:2404.16014; lr as for batchtopk, decay and warm-up as for standard."""
    return {
        "lr": 3e-4,
        "adam_beta1": 0.0,
        "lr_warm_up_steps": min(1_000, facts.n_steps // 10),
        "lr_decay_steps": facts.n_steps // 5,
        "sparsity_warm_up_steps": facts.n_steps // 20,
    }


def _jumprelu_defaults(d_sae: int, facts: _Facts) -> dict[str, Any]:
    """Rajamanoharan et al. 2024 (arXiv:2407.14435); warm-ups are at most a tenth of the run."""
    return {
        "lr": 7e-5,
        "adam_beta1": 0.0,
        "lr_warm_up_steps": min(1_000, facts.n_steps // 10),
        "sparsity_warm_up_steps": min(10_000, facts.n_steps // 10),
        "normalize_activations": "unit_mean_square",
        "jumprelu_bandwidth": 0.001,
        "jumprelu_init_threshold": 0.001,
        "jumprelu_sparsity_loss_mode": "step",
    }


_DEFAULTS: dict[str, Callable[[int, _Facts], dict[str, Any]]] = {
    "standard": _standard_defaults,
    "topk": _topk_defaults,
    "abstopk": _topk_defaults,
    "batchtopk": _batchtopk_defaults,
    "matryoshka_batchtopk": _matryoshka_defaults,
    "jumprelu": _jumprelu_defaults,
    "gated": _gated_defaults,
}


def _checked_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings with every key known, every value of its type, and none that its architecture ignores."""
    who = str(run.get("name", "run"))
    settable = {key: kind for key, kind in _field_types(SAEConfig).items() if key not in _FROM_CACHE}
    _check_keys(who, run, settable)
    missing = [key for key in ("name", "architecture", "hook_name", "d_sae") if run.get(key) is None]
    if missing:
        raise ConfigError(f"{who}: needs {', '.join(missing)}; add them to base or to the run")
    given = {key: _typed(who, key, value, settable[key]) for key, value in run.items()}
    for key, rule in _RULES.items():  # before the defaults, which depend on architecture and d_sae
        rule.check(who, key, given.get(key))
    for key, users in _USED_BY.items():
        if given.get(key) is not None and given["architecture"] not in users:
            raise ConfigError(
                f"{who}: {key} is a setting of {', '.join(users)}, got {key}={given[key]} for "
                f"{given['architecture']}; take it out or give it to those runs only"
            )
    return given


def _check_sparsity_is_given(name: str, architecture: Architecture, settings: Mapping[str, Any]) -> None:
    needed = "k" if architecture in TOPK_FAMILY else "sparsity_coefficient"
    if settings[needed] is None:
        raise ConfigError(f"{name}: {architecture} needs {needed}; add it to base or to the run")


def _check_jumprelu_preset(name: str, given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """The paper's bandwidth and threshold presume E||x||^2 = 1: with another scale they must be given."""
    preset = [key for key in ("jumprelu_bandwidth", "jumprelu_init_threshold") if given.get(key) is None]
    if settings["normalize_activations"] != "unit_mean_square" and preset:
        raise ConfigError(
            f"{name}: the default {' and '.join(preset)} hold for normalize_activations=unit_mean_square only, got "
            f"{settings['normalize_activations']}; use that scale or give {' and '.join(preset)}"
        )


_MODE_NEEDS = {"step": (), "tanh": ("jumprelu_tanh_scale", "pre_act_loss_coefficient"), "quadratic": ("target_l0",)}


def _check_jumprelu_mode(name: str, settings: Mapping[str, Any]) -> None:
    """Every setting of the penalty must be there, and none of another."""
    mode = settings["jumprelu_sparsity_loss_mode"]
    for setting in sorted({setting for needed in _MODE_NEEDS.values() for setting in needed}):
        if (settings[setting] is not None) != (setting in _MODE_NEEDS[mode]):
            wrong = "needs" if setting in _MODE_NEEDS[mode] else "ignores"
            raise ConfigError(f"{name}: jumprelu_sparsity_loss_mode={mode} {wrong} {setting}, got {settings[setting]}")


def _expanded(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`base` joined with each point of `grid` (first key slowest), with each of `runs`, or alone."""
    base = _mapping("base", sweep.get("base", {}))
    if "grid" in sweep and "runs" in sweep:
        raise ConfigError("sweep: give grid or runs, not both")
    if "runs" in sweep:
        runs = _sequence("runs", sweep["runs"])
        return [base | _mapping(f"runs[{i}]", run) for i, run in enumerate(runs)]
    if "grid" in sweep:
        grid = {key: _sequence(f"grid.{key}", values) for key, values in _mapping("grid", sweep["grid"]).items()}
        if not grid:
            raise ConfigError("sweep: grid is empty; name at least one setting and its values")
        return [base | dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]
    return [base] if base else []


def _named(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs, each with a name: its own, or one made of its architecture, sparsity, width and what varies."""
    settings = [key for key in _field_types(SAEConfig) if key not in ("name", "architecture", "d_sae", "k")]
    settings.remove("sparsity_coefficient")
    unnamed = [run for run in runs if run.get("name") is None]
    varying = [key for key in settings if len({repr(run.get(key)) for run in unnamed}) > 1]
    return [{**run, "name": _default_name(run, varying)} if run in unnamed else run for run in runs]


def _default_name(run: Mapping[str, Any], varying: Iterable[str]) -> str:
    """For example `topk-k16-d1024-lr0.001`."""
    parts = [str(run.get("architecture", "sae"))]
    parts += [f"k{run['k']}"] if run.get("k") is not None else []
    parts += [f"l{run['sparsity_coefficient']}"] if run.get("sparsity_coefficient") is not None else []
    parts += [f"d{run.get('d_sae')}"]
    for key in varying:
        if run.get(key) is not None:
            parts.append(str(run[key]) if key == "hook_name" else f"{key}{run[key]}")
    return re.sub(r"[^A-Za-z0-9._+=-]", "-", "-".join(parts))


def _check_names(names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:  # compared without case: two such folders are one on some file systems
        if name.lower() in seen:
            raise ConfigError(
                f"sweep: run names must differ, got {name!r} twice; give each run its own name or another setting"
            )
        seen[name.lower()] = name


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {each.name: hints[each.name] for each in fields(cls) if each.init or each.default is not MISSING}


def _typed(who: str, key: str, value: object, kind: Any) -> Any:
    """`value` as the field's type (an int serves as a float), or ConfigError."""
    options = (
        typing.get_args(kind) if isinstance(kind, types.UnionType) or type(None) in typing.get_args(kind) else (kind,)
    )
    if value is None and type(None) in options:
        return None
    accepted = next(option for option in options if option is not type(None))
    if typing.get_origin(accepted) is Sequence:
        return tuple(_typed(who, key, each, typing.get_args(accepted)[0]) for each in _sequence(f"{who}: {key}", value))
    accepted = str if typing.get_origin(accepted) is Literal else accepted
    if type(value) is accepted:
        return value
    if accepted is float and type(value) is int:
        return float(value)
    raise ConfigError(f"{who}: {key} must be {accepted.__name__}, got {value!r} ({type(value).__name__})")


def _check_keys(who: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"{who}: unknown setting {key!r}; {hint}")


def _mapping(who: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{who}: must be a mapping of settings, got {value!r}")
    return {str(key): item for key, item in value.items()}


def _sequence(who: str, value: object) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise ConfigError(f"{who}: must be a list of at least one entry, got {value!r}")
    return list(value)


class _SweepLoader(yaml.SafeLoader):
    """YAML 1.2 floats (`3e-4` is a number, not a string) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_SweepLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)
