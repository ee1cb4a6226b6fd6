"""Examples of a task as text, for a person to look at before a run is spent on it."""

from __future__ import annotations

from zoo.tasks.base import IGNORE, Split, Task


def render(task: Task, n: int = 2, seed: int = 0, split: Split = "train") -> str:
    """The first `n` examples of a stream, under the task's settings. Raises ConfigError as `sample` does."""
    batch = task.sample(n, seed, split)
    settings = ", ".join(f"{name}={value}" for name, value in task.model_dump().items())
    lines = [
        f"{type(task).__name__}({settings})",
        f"slice {task.slice_name!r}: {task.length} tokens of a vocabulary of {task.vocabulary}, "
        f"{batch.context_len} of them context; {split} split, seed {seed}",
    ]
    bits = task.information_limit_bits(0.99)
    if bits is not None:
        lines.append(f"accuracy 0.99 needs {bits:.0f} bits of state at least")
    for i in range(n):
        questions = int((batch.answers[i] != IGNORE).sum())
        lines += ["", f"example {i}, {questions} question{'s' if questions != 1 else ''}", task.describe(batch, i)]
    return "\n".join(lines)
