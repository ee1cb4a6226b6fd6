"""`check_task` and `TaskConformance`: does a task keep the contract of zoo.tasks.base? Neither imports pytest."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NoReturn, cast, get_args, get_origin

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from zoo.errors import ConformanceError, PluginError, ZooError
from zoo.tasks import tasks
from zoo.tasks.base import BLOCK, IGNORE, Batch, Split, Task
from zoo.tasks.show import render
from zoo.testing.report import Check, run_check

SPLITS: tuple[Split, ...] = get_args(Split)


def fail(message: str) -> NoReturn:
    raise ConformanceError(message)


def arrays(batch: Batch) -> dict[str, NDArray[Any]]:
    return {name: getattr(batch, name) for name in ("tokens", "positions", "answers")}


def require_same(got: Batch, expected: Batch, what: str) -> None:
    """Raises ConformanceError at the first array and row that differ."""
    for name, array in arrays(got).items():
        other = arrays(expected)[name]
        if array.shape != other.shape or array.dtype != other.dtype:
            fail(f"{what}: {name} are {array.shape} {array.dtype}, not {other.shape} {other.dtype}")
        differ = np.flatnonzero((array != other).reshape(len(array), -1).any(axis=1))
        if differ.size:
            fail(f"{what}: {name} differ in {differ.size} of {len(array)} examples, first in number {differ[0]}")
    if got.context_len != expected.context_len:
        fail(f"{what}: context_len is {got.context_len}, not {expected.context_len}")


def stretch(batch: Batch, start: int, stop: int) -> Batch:
    cut = slice(start, stop)
    return Batch(batch.tokens[cut], batch.positions[cut], batch.answers[cut], batch.context_len)


def fingerprint(task: Task) -> str:
    """A digest of examples of every split, on both sides of a block's edge."""
    digest = hashlib.sha256(type(task).__name__.encode())
    for split in SPLITS:
        batch = task.sample(40, 11, split, BLOCK - 20)
        for array in arrays(batch).values():
            digest.update(f"{array.shape} {array.dtype} {batch.context_len}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def shapes_and_types(task: Task) -> str:
    """Tokens (N, T), positions and answers (N, Q), all int64, with T the task's length."""
    for n in (1, 10):
        batch = task.sample(n, 0, "train")
        for name, array in arrays(batch).items():
            if not isinstance(array, np.ndarray) or array.dtype != np.int64 or array.ndim != 2 or len(array) != n:
                kind = f"{array.shape} {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
                fail(f"{name} of {n} examples are {kind}; a batch holds int64 arrays with one row an example")
        if batch.tokens.shape[1] != task.length:
            fail(f"examples have {batch.tokens.shape[1]} tokens, but the task's length is {task.length}")
        if batch.positions.shape != batch.answers.shape:
            fail(f"positions are {batch.positions.shape}, answers {batch.answers.shape}; each answer has a position")
    return f"tokens {batch.tokens.shape}, answers {batch.answers.shape}"


def tokens_in_vocabulary(task: Task) -> str:
    """Every token and every answer lies in [0, vocabulary); an answer may be -100 instead."""
    batch = task.sample(BLOCK, 0, "train")
    for name, values in (("token", batch.tokens), ("answer", batch.answers[batch.answers != IGNORE])):
        wrong = values[(values < 0) | (values >= task.vocabulary)]
        if wrong.size:
            fail(f"the {name} {wrong.flat[0]} is not in [0, {task.vocabulary}), nor are {wrong.size - 1} others")
    return f"tokens {batch.tokens.min()} to {batch.tokens.max()} of {task.vocabulary}"


def positions_in_sequence(task: Task) -> str:
    """Positions lie in the sequence and no two questions of an example share one; padding stands at position 0."""
    batch = task.sample(BLOCK, 0, "train")
    asked = batch.answers != IGNORE
    wrong = batch.positions[(batch.positions < 0) | (batch.positions >= task.length)]
    if wrong.size:
        fail(f"the position {wrong[0]} is not in [0, {task.length}), nor are {wrong.size - 1} others")
    if batch.positions[~asked].any():
        fail("a position whose answer is -100 is not 0; that is what pads")
    # Padding is made different from everything, so that only questions can collide.
    numbered = np.where(asked, batch.positions, -1 - np.arange(asked.shape[1]))
    twice = np.flatnonzero((np.diff(np.sort(numbered, axis=1), axis=1) == 0).any(axis=1))
    if twice.size:
        fail(f"two answers are asked at one position in {twice.size} of {BLOCK} examples, first in number {twice[0]}")
    return f"positions {batch.positions[asked].min(initial=task.length)} to {batch.positions[asked].max(initial=0)}"


def every_example_asks(task: Task) -> str:
    """Every example has at least one answer that is not -100."""
    questions = (task.sample(BLOCK, 0, "train").answers != IGNORE).sum(axis=1)
    silent = np.flatnonzero(questions == 0)
    if silent.size:
        fail(f"{silent.size} of {BLOCK} examples ask nothing, first number {silent[0]}")
    return f"{questions.min()} to {questions.max()} questions an example"


def context_comes_first(task: Task) -> str:
    """context_len lies in [0, T], and nothing is asked inside the context (a mixer may read that non-causally)."""
    batch = task.sample(BLOCK, 0, "train")
    length = batch.context_len
    if isinstance(length, bool) or not isinstance(length, int) or not 0 <= length <= task.length:
        fail(f"context_len {length!r} is not an integer in [0, {task.length}]")
    inside = (batch.answers != IGNORE) & (batch.positions < length)
    if inside.any():
        position = batch.positions[inside][0]
        fail(f"an answer is asked at position {position}, inside the context of {length} tokens")
    return f"{length} of {task.length} tokens"


def answers_need_memory(task: Task) -> str:
    """No table from the token at the asked position to the answer is right throughout: that takes no memory."""
    batch = task.sample(BLOCK, 0, "train")
    asked = batch.answers != IGNORE
    tokens = np.take_along_axis(batch.tokens, batch.positions, axis=1)
    halves = slice(None, BLOCK // 2), slice(BLOCK // 2, None)
    first, second = (np.stack([tokens[half][asked[half]], batch.answers[half][asked[half]]], axis=1) for half in halves)
    pairs, counts = np.unique(first, axis=0, return_counts=True)
    # The most frequent answer comes last, and stays.
    table = dict(pairs[np.argsort(counts, kind="stable")].tolist())
    known = [(token, answer) for token, answer in second.tolist() if token in table]
    right = sum(table[token] == answer for token, answer in known)
    # Of a few, all may be right by chance.
    if right == len(known) >= 20:
        fail(
            f"a table from the token at the asked position to the answer, made of {BLOCK // 2} examples, is right in "
            f"all {right} questions about its tokens in the next {BLOCK // 2}: there is nothing to remember"
        )
    return f"a table from asked token to answer is right in {right} of {len(known)} questions about its tokens"


def same_bytes_again(task: Task) -> str:
    """The same seed and split give the same examples, also from another object with the same settings."""
    for split in SPLITS:
        first = task.sample(20, 5, split)
        require_same(task.sample(20, 5, split), first, f"{split} sampled again")
        again = type(task).model_validate(task.model_dump())
        require_same(again.sample(20, 5, split), first, f"{split} sampled from a second object")
    return f"{len(SPLITS)} splits"


def any_stretch_is_the_same(task: Task) -> str:
    """Example i is the same whatever n and start it is sampled with, on both sides of a block's edge."""
    for split in SPLITS:
        few = stretch(task.sample(10, 1, split), 3, 7)
        require_same(task.sample(4, 1, split, 3), few, f"{split} sample(4, start=3) against sample(10)[3:7]")
        many = task.sample(BLOCK + 6, 1, split)
        for start, n in ((0, 10), (BLOCK - 4, 10), (BLOCK, 6)):
            expected = stretch(many, start, start + n)
            require_same(
                task.sample(n, 1, split, start), expected, f"{split} sample({n}, start={start}) against the whole"
            )
    return f"{BLOCK + 6} examples, 4 stretches, {len(SPLITS)} splits"


def same_bytes_in_another_process(task: Task) -> str:
    """A fresh interpreter with another hash seed gives the same examples."""
    here = fingerprint(task)
    cls = type(task)
    module = sys.modules[cls.__module__]
    plugin = getattr(module, "__file__", None) if cls.__module__.startswith("zoo_plugin_") else None
    program = (
        "import pickle, sys\n"
        "sys.path[:], plugin, task = pickle.load(sys.stdin.buffer)\n"
        "if plugin:\n"
        "    from zoo.registry import load_file\n"
        "    load_file(plugin)\n"
        "from zoo.testing.task import fingerprint\n"
        "print(fingerprint(pickle.loads(task)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((sys.path, plugin, pickle.dumps(task))),
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "4321"},
        timeout=300,
    )
    if run.returncode:
        error = run.stderr.decode(errors="replace").strip().splitlines()[-1]
        fail(f"cannot be sampled in another process: {error}; define the class in a module that can be imported")
    if run.stdout.decode().strip() != here:
        fail("another process gives other examples: something but the settings, seed and split goes in (a hash? time?)")
    return here[:12]


def splits_and_seeds_differ(task: Task) -> str:
    """Splits share no examples, and neither do seeds, beyond what chance gives in a small task."""
    n = BLOCK // 2

    def rows(seed: int, split: Split, start: int = 0) -> list[bytes]:
        batch = task.sample(n, seed, split, start)
        return [row.tobytes() for row in np.concatenate([batch.tokens, batch.answers], axis=1)]

    train = set(rows(0, "train"))
    by_chance = sum(row in train for row in rows(0, "train", n)) / n
    allowed = by_chance + 5 * math.sqrt((by_chance + 1 / n) / n)
    others: tuple[tuple[int, Split], ...] = ((0, "validation"), (0, "test"), (1, "train"))
    for seed, split in others:
        shared = sum(row in train for row in rows(seed, split))
        if shared / n > allowed:
            fail(
                f"{shared} of {n} {split} examples of seed {seed} are also train examples of seed 0; "
                f"by chance it would be about {by_chance * n:.0f}"
            )
    return f"{by_chance:.1%} of examples repeat by chance"


def global_generators_are_left_alone(task: Task) -> str:
    """Sampling neither moves nor reads the generators of random, numpy and torch."""
    import torch

    def state() -> dict[str, bytes]:
        return {
            "random": pickle.dumps(random.getstate()),
            "numpy.random": pickle.dumps(np.random.get_state()),
            "torch": torch.random.get_rng_state().numpy().tobytes(),
        }

    saved = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        found = []
        for seed in (1, 2):
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            before = state()
            found.append(task.sample(20, 0, "train"))
            moved = [name for name, value in state().items() if value != before[name]]
            if moved:
                fail(f"sampling draws from the global generator of {', '.join(moved)}; draw from `rng` only")
        require_same(found[1], found[0], "with the global generators seeded otherwise")
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.random.set_rng_state(saved[2])
    return "random, numpy.random, torch"


def config_round_trip(task: Task) -> str:
    """The settings survive JSON with the same examples, an unknown key is refused, and none can be changed."""
    cls = type(task)
    text = json.dumps(task.model_dump(mode="json"))
    again = cls.model_validate(json.loads(text))
    if again != task:
        fail(f"the task {task!r} comes back from JSON as {again!r}")
    require_same(again.sample(10, 0, "train"), task.sample(10, 0, "train"), "after a round trip through JSON")
    try:
        cls.model_validate({**json.loads(text), "no_such_option": 1})
    except ValidationError:
        pass
    else:
        fail("the unknown key 'no_such_option' is taken in silence; keep extra='forbid' of Task")
    for name in cls.model_fields:
        try:
            setattr(again, name, getattr(again, name))
        except ValidationError:
            continue
        fail(f"the field {name!r} can be set; keep frozen=True of Task")
    return text


def pickling(task: Task) -> str:
    """A pickled and loaded task is equal and gives the same examples."""
    data = pickle.dumps(task)
    again = pickle.loads(data)
    if again != task:
        fail(f"the task {task!r} comes back from pickle as {again!r}")
    require_same(again.sample(10, 0, "train"), task.sample(10, 0, "train"), "after pickling")
    return f"{len(data)} bytes"


def slice_names_differ(task: Task) -> str:
    """Changing any one setting changes slice_name: results are told apart by it."""
    names = {task.slice_name: "the settings given"}
    for field in type(task).model_fields:
        other = next(_variations(task, field), None)
        if other is None:
            continue
        setting = f"{field}={getattr(other, field)!r}"
        if other.slice_name in names:
            fail(f"slice_name {other.slice_name!r} stands for {names[other.slice_name]}, and with {setting} too")
        names[other.slice_name] = setting
    return f"{task.slice_name!r} and {len(names) - 1} others"


def _variations(task: Task, field: str) -> Iterator[Task]:
    """Valid tasks that differ from `task` in one field."""
    value, annotation = getattr(task, field), type(task).model_fields[field].annotation
    candidates: list[Any] = []
    if get_origin(annotation) is Literal:
        candidates = list(get_args(annotation))
    elif isinstance(value, bool):
        candidates = [not value]
    elif isinstance(value, int):
        candidates = [value + 1, value + 2, value * 2, value - 1, value - 2, value // 2]
    elif isinstance(value, float):
        candidates = [value / 2, value * 2, value + 1]
    for candidate in candidates:
        if candidate == value:
            continue
        try:
            yield type(task).model_validate({**task.model_dump(), field: candidate})
        except (ZooError, ValidationError):
            continue


def information_limit(task: Task) -> str:
    """information_limit_bits is None throughout, or finite, at least 0, and never falls as accuracy rises."""
    bits = [task.information_limit_bits(k / 20) for k in range(21)]
    if all(b is None for b in bits):
        return "none stated"
    known = [math.nan if b is None else b for b in bits]
    for k, b in enumerate(known):
        if not (math.isfinite(b) and b >= 0):
            fail(
                f"information_limit_bits({k / 20}) is {bits[k]}; it is None for every accuracy, or a finite number >= 0"
            )
        if k and b < known[k - 1] - 1e-9:
            fail(f"information_limit_bits falls from {known[k - 1]:g} at accuracy {(k - 1) / 20} to {b:g} at {k / 20}")
    return f"{known[18]:.0f} bits at accuracy 0.9, {known[20]:.0f} at 1"


def shown_as_text(task: Task) -> str:
    """`describe` gives text for any example, and another one for another example."""
    batch = task.sample(2, 0, "train")
    texts = [task.describe(batch, i) for i in range(2)]
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            fail(f"describe gives {text!r}; it must give text")
    if texts[0] == texts[1] and (batch.tokens[0] != batch.tokens[1]).any():
        fail("describe gives the same text for two different examples")
    return f"{len(render(task, 1).splitlines())} lines"


CHECKS: dict[str, Callable[[Task], str]] = {
    check.__name__.replace("_", " "): check
    for check in (
        shapes_and_types,
        tokens_in_vocabulary,
        positions_in_sequence,
        every_example_asks,
        context_comes_first,
        answers_need_memory,
        same_bytes_again,
        any_stretch_is_the_same,
        same_bytes_in_another_process,
        splits_and_seeds_differ,
        global_generators_are_left_alone,
        config_round_trip,
        pickling,
        slice_names_differ,
        information_limit,
        shown_as_text,
    )
}
"""Name -> check, in the order in which they run."""


def check_task(task: str | Task | type[Task], config: Mapping[str, Any] | None = None) -> list[Check]:
    """Every check of the contract, in order; one that fails or crashes does not stop the others.

    Args:
        task: a task; or a class, a registered name, `file.py:Class` or `module:Class`, built with the options `config`.

    Raises:
        PluginError, UnknownNameError: the task cannot be found or loaded.
        ConfigError: it refuses the options, or needs some.
    """
    if not isinstance(task, Task):
        from zoo.config import parse

        cls = tasks.get(task) if isinstance(task, str) else task
        if not (isinstance(cls, type) and issubclass(cls, Task)):
            raise PluginError(f"{cls!r} is not a subclass of zoo.Task; give one, a task, or a task's name.")
        task = cast(Task, parse(cls, dict(config or {}), cls.__name__))
    return [run_check(name, functools.partial(check, task)) for name, check in CHECKS.items()]


class TaskConformance:
    """Subclass, give the task under test, inherit every test:

        class TestMyTask(TaskConformance):
            @pytest.fixture
            def task(self):
                return MyTask(seq_len=64)

    A fixture with `params=` tests several settings.
    """


def _as_test(check: Callable[[Task], str]) -> Callable[[TaskConformance, Task], None]:
    def test(self: TaskConformance, task: Task) -> None:
        check(task)

    test.__doc__ = check.__doc__
    return test


for _check in CHECKS.values():
    setattr(TaskConformance, f"test_{_check.__name__}", _as_test(_check))
