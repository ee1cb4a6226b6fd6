"""Trials and sweeps: what is run, fully resolved, and the grid that it comes from."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_serializer, model_validator

from zoo.errors import ConfigError, did_you_mean
from zoo.grid import apply_override, check_count, expand, merge, read_yaml
from zoo.mixers import MixerConfig, mixers
from zoo.record import family_name
from zoo.results import DIALS, flatten, varying
from zoo.settings import Settings
from zoo.tasks import Task, tasks

ENGINE_VERSION = 3
"""Raise it with every edit of the model, training or evaluation that changes results: it is in every key."""


class LayerConfig(Settings):
    """One layer of the pattern: `based`, or `{mixer: based, feature_dim: 16}`; other keys are the mixer's Config."""

    mixer: str
    options: MixerConfig

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: Any) -> Any:
        value = {"mixer": value} if isinstance(value, str) else value
        if not isinstance(value, dict) or "mixer" not in value:
            raise ConfigError(
                f"model.layers: {value!r} is no layer; write a mixer's name, or {{mixer: NAME, OPTION: VALUE}}."
            )
        name, flat = value["mixer"], {k: v for k, v in value.items() if k != "mixer"}
        if isinstance(flat.get("options"), MixerConfig):
            return value
        return {"mixer": name, "options": parse(mixers.get(name).Config, flat, f"model.layers, mixer {name}")}

    @model_serializer
    def _to_flat(self) -> dict[str, Any]:
        return {"mixer": self.mixer, **self.options.model_dump(mode="json")}


class MLPConfig(Settings):
    """The feed-forward half of a block: `expand` times d_model wide; `identity` has no width, the branch is norm(x)."""

    expand: float = Field(default=4, gt=0, le=1000)
    activation: Literal["gelu", "swiglu", "identity"] = "gelu"


class ModelConfig(Settings):
    """Token embedding, then `depth` blocks whose mixers repeat the pattern `layers`, then a tied head.

    positions: `learned` adds an embedding; `rotary` makes mixers with queries and keys rotate them.
    """

    d_model: int = Field(gt=0, le=2**14)
    layers: tuple[LayerConfig, ...] = Field(min_length=1, max_length=1000)
    depth: int | None = Field(default=None, gt=0, le=1000)
    mlp: MLPConfig | None = None
    positions: Literal["none", "learned", "rotary"] = "none"
    norm: Literal["layer", "rms"] = "layer"

    @property
    def blocks(self) -> tuple[LayerConfig, ...]:
        """The layer of each block, the pattern repeated over the depth."""
        return tuple(self.layers[i % len(self.layers)] for i in range(self.depth or len(self.layers)))

    @property
    def family(self) -> str:
        """What a figure calls the model."""
        return family_name(layer.mixer for layer in self.layers)


class DataEntry(Settings):
    """One slice of a mixture: `{task: mqar, seq_len: 64, num_pairs: 8, examples: 20000}`."""

    task: str
    examples: int = Field(gt=0)
    options: Task

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not {"task", "examples"} <= value.keys():
            raise ConfigError(f"data: {value!r} is no slice; write {{task: NAME, examples: N, OPTION: VALUE}}.")
        if isinstance(value.get("options"), Task):
            return value
        name, flat = value["task"], {k: v for k, v in value.items() if k not in ("task", "examples")}
        return {
            "task": name,
            "examples": value["examples"],
            "options": parse(tasks.get(name), flat, f"data, task {name}"),
        }

    @model_serializer
    def _to_flat(self) -> dict[str, Any]:
        return {"task": self.task, "examples": self.examples, **self.options.model_dump(mode="json")}


class DataConfig(Settings):
    """Mixtures for training, validation and test, each from streams of its own.

    `validation` left out is the test mixture, drawn from the validation streams. `seed` picks the streams.
    """

    train: tuple[DataEntry, ...] = Field(min_length=1)
    test: tuple[DataEntry, ...] = Field(min_length=1)
    validation: tuple[DataEntry, ...] = Field(default=(), validate_default=False)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _default_validation(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.get("validation"):
            return {**value, "validation": value.get("test", ())}
        return value

    @property
    def entries(self) -> tuple[DataEntry, ...]:
        return self.train + self.validation + self.test

    @property
    def vocabulary(self) -> int:
        return max(entry.options.vocabulary for entry in self.entries)

    @property
    def max_seq_len(self) -> int:
        return max(entry.options.length for entry in self.entries)


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """AdamW; weight decay on matrices only (not on norms, biases, or what a mixer exempts).

    schedule: `cosine` falls to 0 over all steps, `cosine_per_epoch` the same in one step an epoch (the published
    setting). warmup_steps: linear. clip: largest gradient norm, None = unclipped.
    """

    lr: float = Field(gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    schedule: Literal["cosine", "cosine_per_epoch", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)


class TrainingConfig(Settings):
    """How long. stop_accuracy: stop at the end of an epoch whose mean validation accuracy reaches it, None = never."""

    epochs: int = Field(gt=0)
    batch_size: int = Field(default=64, gt=0)
    stop_accuracy: float | None = Field(default=0.99, gt=0, le=1)
    dtype: Literal["float32", "bfloat16"] = "float32"


class Trial(Settings):
    """One training run, fully resolved: everything that its result depends on."""

    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    seed: int = Field(default=0, ge=0)

    @field_validator("seed")
    @classmethod
    def _seed_fits(cls, value: int) -> int:
        if value >= 2**63:
            raise ValueError("must be below 2**63")
        return value

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """The versions that the key holds: the engine's and those of every task and mixer in the trial."""
        used = {f"mixer {layer.mixer}": mixers.version(layer.mixer) for layer in self.model.layers}
        used |= {f"task {entry.task}": tasks.version(entry.task) for entry in self.data.entries}
        return {"engine": str(ENGINE_VERSION), **dict(sorted(used.items()))}

    @functools.cached_property
    def key(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the trial and its versions."""
        canonical = json.dumps(
            {"trial": self.model_dump(mode="json"), "versions": self.versions}, sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def label(self) -> str:
        """A short name: what sets the size of the state, and the mixers' options that are not their defaults."""
        options: dict[str, None] = {}
        for layer in self.model.layers:
            if layer.mixer == "gated_conv" and len(self.model.layers) > 1:
                continue
            changed = layer.options.model_dump(exclude_defaults=True)
            for name, value in layer.options.model_dump().items():
                if name in changed or (name in DIALS and value is not None):
                    options[f"{name}={value}"] = None
        return " ".join(
            [self.model.family, f"d={self.model.d_model}", *options, f"lr={self.optimizer.lr:.2g}", f"seed={self.seed}"]
        )


class Sweep:
    """A grid of trials: shared settings, and variants that each change some of them; every list is an axis."""

    def __init__(self, name: str, trials: list[Trial], source: dict[str, Any]) -> None:
        self.name = name
        self.trials = trials
        self.source = source

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Sweep:
        """Read a YAML grid. Raises ConfigError, naming the file and the line or the key, before anything runs."""
        file = Path(path)
        if not file.is_file():
            known = [str(p) for p in sorted(file.parent.glob("*.yaml"))] if file.parent.is_dir() else []
            what = "is a folder, not a YAML file" if file.is_dir() else "does not exist"
            raise ConfigError(f"sweep file {str(path)!r} {what}.{did_you_mean(str(path), known)}")
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: is not text in UTF-8 ({error.reason} at byte {error.start}).") from None
        try:
            return cls.from_dict(read_yaml(text, str(path)), overrides, default_name=file.stem)
        except RecursionError:
            raise ConfigError(f"{path}: a value is nested too deeply, or is an alias of what holds it.") from None
        except ConfigError as error:
            raise type(error)(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error

    @classmethod
    def from_dict(cls, source: Any, overrides: list[str] | None = None, default_name: str = "sweep") -> Sweep:
        """A sweep from plain data; `overrides` are `path.to.key=v1,v2`. Raises ConfigError, also on an empty grid."""
        if not isinstance(source, dict):
            raise ConfigError(f"a sweep is a mapping with the keys {', '.join(_SWEEP_KEYS)}, not {source!r}.")
        for key in source:
            if key not in _SWEEP_KEYS:
                raise ConfigError(
                    f"unknown key {key!r}.{did_you_mean(str(key), _SWEEP_KEYS)} Allowed: {', '.join(_SWEEP_KEYS)}."
                )
        base = {k: v for k, v in source.items() if k not in ("name", "variants")}
        variants = source.get("variants", [{}])
        if not isinstance(variants, list) or not all(isinstance(v, dict) for v in variants):
            raise ConfigError(
                f"variants: {variants!r} must be a list of mappings, each merged over the shared settings."
            )
        points = []
        for variant in variants:
            merged = merge(base, variant)
            for override in overrides or []:
                apply_override(merged, override)
            points += expand(merged, Trial)
        check_count(len(points), f"variants {len(variants)}")
        trials: dict[str, Trial] = {}
        for point in points:
            trial = parse(Trial, point, "")
            trials.setdefault(trial.key, trial)
        if not trials:
            raise ConfigError("the grid is empty: `variants` has no entries; give it at least one, or leave it out.")
        name = source.get("name", default_name)
        if not isinstance(name, str | int | float) or str(name) in ("", ".", "..") or set(str(name)) & {"/", "\\"}:
            raise ConfigError(
                f"name: {name!r} must be text without slashes, for the folder runs/NAME; for another: --run FOLDER."
            )
        return cls(str(name), list(trials.values()), source)

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """By key: a trial's label, and whatever else is not the same in all trials of the sweep. All are distinct."""
        patterns: dict[str, set[str]] = {}
        for trial in self.trials:
            patterns.setdefault(trial.model.family, set()).add(_pattern(trial.model))
        data = [trial.data.model_copy(update={"seed": 0}) for trial in self.trials]
        titles = {setting: _title(setting) for setting in dict.fromkeys(data)}
        in_short = len(set(titles.values())) == len(titles)
        rest = [_beyond_label(trial, in_short) for trial in self.trials]
        named = varying(rest)
        labels = {}
        for trial, setting, settings in zip(self.trials, data, rest, strict=True):
            parts = [trial.label]
            parts += [f"layers={_pattern(trial.model)}"] if len(patterns[trial.model.family]) > 1 else []
            parts += [f"on {titles[setting]}"] if in_short and len(titles) > 1 else []
            # Of what a trial does not have, nothing is said.
            parts += [f"{name}={settings[name]}" for name in named if settings.get(name) not in (None, "none")]
            labels[trial.key] = " ".join(parts)
        # A label is short: of rates, for one, it has two digits.
        alike = Counter(labels.values())
        return {key: f"{label} key={key[:8]}" if alike[label] > 1 else label for key, label in labels.items()}


def _pattern(model: ModelConfig) -> str:
    return "+".join(layer.mixer for layer in model.layers)


def _beyond_label(trial: Trial, data_in_short: bool) -> dict[str, Any]:
    """Flat settings that a trial's label leaves out."""
    settings = trial.model_dump(
        mode="json", exclude={"model": {"d_model", "layers"}, "optimizer": {"lr"}, "seed": True}
    )
    flat = {f"data.{name}": value for name, value in flatten(settings.pop("data")).items()}
    if data_in_short:
        flat = {"data.seed": trial.data.seed}
    for part in settings.values():
        flat |= flatten(part)
    return flat


def _title(data: DataConfig) -> str:
    names = [entry.options.slice_name for entry in data.test]
    return names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"


_SWEEP_KEYS = ("name", *Trial.model_fields, "variants")


def parse(cls: type[BaseModel], data: Any, where: str) -> Any:
    """`cls` from plain data; pydantic's errors become one ConfigError that names key, value, allowed values, remedy."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        # An item that is refused is missing from its list: one error of the two is enough.
        details = [d for d in error.errors() if d["type"] != "too_short" or not d["input"]]
        lines = [_explain(cls, detail, where) for detail in details]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _explain(cls: type[BaseModel], detail: Any, where: str) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    place = ": ".join(part for part in (where, path) if part)
    if detail["type"] == "extra_forbidden":
        known = list(_fields_at(cls, detail["loc"][:-1]))
        name = str(detail["loc"][-1])
        allowed = f" Allowed: {', '.join(known)}." if known else " It takes no options."
        prefix = f"{where}: " if where else ""
        return f"{prefix}unknown key {path!r}.{did_you_mean(name, known)}{allowed}"
    if detail["type"] == "missing":
        return f"{place}: is missing; give it a value."
    message = detail["msg"].removeprefix("Value error, ")
    # A file has lists, and no tuples.
    message = f"{message[0].lower()}{message[1:]}".replace("tuple", "list")
    return f"{place}: {detail['input']!r} is not allowed: {message}."


def _fields_at(cls: Any, loc: tuple[Any, ...]) -> dict[str, Any]:
    for part in loc:
        field = cls.model_fields.get(part) if hasattr(cls, "model_fields") else None
        if field is None:
            return {}
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        cls = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return getattr(cls, "model_fields", {})
