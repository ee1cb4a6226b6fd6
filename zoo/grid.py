"""From a YAML file to points of a grid: every list is an axis, except where the field itself is a list."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from zoo.errors import ConfigError
from zoo.mixers import mixers
from zoo.tasks import tasks

MOST_TRIALS = 20_000
"""Of one sweep: more are a slip of the pen more often than a plan, and take minutes to list."""
# A little less than what a float holds.
_LARGEST_EXPONENT = 300


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `1e-3` is a number, `no` and `1:30` are text; a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _regexp, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9]\d*)", "-+0123456789"),
    ("float", r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)", "-+0123456789."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_regexp})$"), list(_first))


def read_yaml(text: str, name: str) -> Any:
    """Plain data from YAML text. Raises ConfigError that names the file, line and column of a syntax error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        lines = text.splitlines()
        mark = error.problem_mark
        if mark is None or (mark.line >= len(lines) and error.context_mark is not None):
            # What never ends is best shown where it begins.
            mark = error.context_mark
        where = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        line = lines[mark.line].rstrip() if mark and mark.line < len(lines) else ""
        raise ConfigError(f"{where}: not valid YAML: {error.problem}.\n    {line}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}.") from None


def merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`: mappings merge key by key, anything else replaces."""
    if isinstance(base, dict) and isinstance(over, dict):
        merged = {key: merge(value, over[key]) if key in over else _copy(value) for key, value in base.items()}
        return merged | {key: _copy(value) for key, value in over.items() if key not in base}
    return _copy(over)


def _copy(value: Any) -> Any:
    # Not deepcopy: it would keep two aliases of one YAML anchor the same object, and an override would change both.
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def apply_override(data: dict[str, Any], override: str) -> None:
    """Set `path.to.key=value` in place; `v1,v2` makes an axis, a number in the path picks a list's item.

    Raises ConfigError when the text is no override or the path leads through a plain value.
    """
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {override!r} is not of the form path.to.key=value, such as model.d_model=64,128.")
    values = read_yaml(f"[{text}]", f"override {override!r}")
    if not values:
        raise ConfigError(f"override {override!r} has no value; write null for none.")
    value = values[0] if len(values) == 1 else values
    *parents, last = path.split(".")
    node: Any = data
    for part in parents:
        if isinstance(node, dict):
            # `null` leaves a part out; a setting below it puts the part in.
            node[part] = {} if node.get(part) is None else node[part]
            node = node[part]
        else:
            node = _item(node, part, override)
    if isinstance(node, dict):
        node[last] = value
    else:
        _item(node, last, override)
        node[int(last)] = value


def _item(node: Any, part: str, override: str) -> Any:
    if not isinstance(node, list):
        raise ConfigError(f"override {override!r}: {part!r} is below the plain value {node!r}; shorten the path.")
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"override {override!r}: {part!r} is no index into a list of {len(node)}; use 0 to {len(node) - 1}."
        )
    return node[int(part)]


def expand(data: Any, schema: Any) -> list[Any]:
    """Every point of the grid `data`, for the pydantic class `schema`, first axis slowest.

    Raises ConfigError on an axis without values, and at more than MOST_TRIALS points, before they are made.
    """
    if isinstance(data, dict):
        if data.keys() == {"logspace"}:
            return _logspace(data["logspace"])
        if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
            return [data]
        if "options" in schema.model_fields:
            return _expand_polymorphic(data, schema)
        return _product(data, {name: field.annotation for name, field in schema.model_fields.items()})
    return [data]


def check_count(trials: int, what: str) -> None:
    """Raise ConfigError when a sweep has more than MOST_TRIALS trials; `what` makes them so many."""
    if trials > MOST_TRIALS:
        raise ConfigError(
            f"the grid has {trials:,} trials ({what}), more than the {MOST_TRIALS:,} of one sweep; shorten an axis, or "
            "split it into several sweeps, which may share a run folder."
        )


def _product(data: dict[str, Any], annotations: dict[str, Any]) -> list[dict[str, Any]]:
    axes = [_expand_field(value, annotations.get(key)) for key, value in data.items()]
    for key, axis in zip(data, axes, strict=True):
        if not axis:
            raise ConfigError(f"the grid is empty: {key!r} is an axis without values; give it at least one.")
    check_count(
        math.prod(map(len, axes)), ", ".join(f"{key} {len(a)}" for key, a in zip(data, axes, strict=True) if len(a) > 1)
    )
    return [dict(zip(data, point, strict=True)) for point in itertools.product(*axes)]


def _expand_field(value: Any, annotation: Any) -> list[Any]:
    """The values that one field takes: a list is an axis, or, in a field that is a list, a list of lists is."""
    item = _item_type(annotation)
    if not isinstance(value, list):
        return expand(value, _model_type(annotation))
    if item is None:
        return [point for element in value for point in expand(element, _model_type(annotation))]
    if value and all(isinstance(element, list) for element in value):
        return [point for element in value for point in _expand_field(element, annotation)]
    items = [expand(element, item) for element in value]
    check_count(math.prod(map(len, items)), " x ".join(str(len(axis)) for axis in items if len(axis) > 1))
    return [list(point) for point in itertools.product(*items)]


def _expand_polymorphic(data: dict[str, Any], schema: type[BaseModel]) -> list[Any]:
    """A layer or a slice: its first key names the class whose fields the other keys are."""
    registry, kind = (mixers, "mixer") if "mixer" in schema.model_fields else (tasks, "task")
    if kind not in data:
        return [data]
    names = data[kind] if isinstance(data[kind], list) else [data[kind]]
    points = []
    for name in names:
        cls: Any = registry.get(name)
        fields = (cls.Config if kind == "mixer" else cls).model_fields
        annotations = {key: field.annotation for key, field in fields.items()}
        points += _product({**data, kind: name}, annotations)
    return points


def _item_type(annotation: Any) -> Any:
    """The item type of a list or tuple annotation (also inside a union), or None for any other."""
    for option in (annotation, *get_args(annotation)):
        if get_origin(option) in (list, tuple):
            return get_args(option)[0] if get_args(option) else Any
    return None


def _model_type(annotation: Any) -> Any:
    options = (annotation, *get_args(annotation))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _logspace(value: Any) -> list[float]:
    if not (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
        and isinstance(value[2], int)
        and value[2] >= 1
        and max(map(abs, value[:2])) <= _LARGEST_EXPONENT
    ):
        raise ConfigError(
            f"logspace: {value!r} must be [first exponent, last exponent, count], such as [-4, -2, 4], "
            f"with exponents from -{_LARGEST_EXPONENT} to {_LARGEST_EXPONENT}."
        )
    first, last, count = value
    check_count(count, f"logspace {value}")
    exponents = [first] if count == 1 else [first + (last - first) * i / (count - 1) for i in range(count)]
    # Eight digits: the same text, so the same key, whatever the machine's pow() rounds to.
    return [float(f"{10.0**e:.8g}") for e in exponents]
