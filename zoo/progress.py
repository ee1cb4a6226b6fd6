"""How a sweep goes, on stderr: a live display on a terminal, one line a finished trial elsewhere."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.executors import Job
from zoo.record import Epoch, Record
from zoo.results import error_text, longest_state
from zoo.text import clock

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Silent:
    """No output; also the base of the displays, which keep count here."""

    def __init__(self, name: str, costs: Mapping[str, float], epochs: Mapping[str, int]) -> None:
        """costs, epochs: by key, of every trial that will run. Costs only weigh the trials for the time left."""
        self.name = name
        self.costs = costs
        self.epochs = epochs
        self.running: dict[str, tuple[Job, float, Epoch | None]] = {}
        self.count = {"ok": 0, "diverged": 0, "failed": 0}
        self.cost_done = 0.0
        self.begin = time.monotonic()

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def started(self, job: Job) -> None:
        self.running[job.key] = (job, time.monotonic(), None)

    def epoch(self, job: Job, epoch: Epoch) -> None:
        self.running[job.key] = (job, self.running[job.key][1], epoch)

    def finished(self, job: Job, record: Record) -> None:
        self.running.pop(job.key, None)
        self.count[record.status] += 1
        self.cost_done += self.costs[job.key]

    def lost(self, job: Job, reason: str) -> None:
        self.running.pop(job.key, None)

    @property
    def total(self) -> int:
        return len(self.costs)

    @property
    def done(self) -> int:
        return sum(self.count.values())

    def seconds_left(self) -> float | None:
        """From the cost done so far, running trials by their epochs; None while nothing is."""
        # A copy, because a display asks from a thread of its own.
        epochs = {key: epoch.epoch + 1 for key, (_, _, epoch) in dict(self.running).items() if epoch is not None}
        done = self.cost_done + sum(self.costs[key] * n / self.epochs[key] for key, n in epochs.items())
        elapsed = time.monotonic() - self.begin
        return elapsed * (sum(self.costs.values()) - done) / done if done else None


class Lines(Silent):
    """One line a finished trial: for logs and pipes."""

    def finished(self, job: Job, record: Record) -> None:
        super().finished(job, record)
        print(f"{self._position()} {job.label:<44} {result_text(record)}", file=sys.stderr, flush=True)

    def lost(self, job: Job, reason: str) -> None:
        super().lost(job, reason)
        print(f"{' ' * len(self._position())} {job.label:<44} {lost_text(reason)}", file=sys.stderr, flush=True)

    def _position(self) -> str:
        return f"[{self.done:>{len(str(self.total))}}/{self.total}]"


class Display(Silent):
    """Finished trials scroll by; below them, redrawn in place, the running ones and the sweep as a whole."""

    STYLES = {"ok": "default", "diverged": "yellow", "failed": "bold red"}

    def __init__(self, *args: Any, console: Console) -> None:
        from rich.live import Live

        super().__init__(*args)
        self.console = console
        self.live = Live(console=console, get_renderable=self._render, refresh_per_second=5, transient=True)

    def __enter__(self) -> Display:
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.live.stop()

    def finished(self, job: Job, record: Record) -> None:
        super().finished(job, record)
        self._print(job, result_text(record), self.STYLES[record.status])

    def lost(self, job: Job, reason: str) -> None:
        super().lost(job, reason)
        self._print(job, lost_text(reason), "yellow")

    def _print(self, job: Job, text: str, style: str) -> None:
        from rich.text import Text

        self.console.print(Text(f"{job.label:<44} ").append(text, style), soft_wrap=True)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        running = Table.grid(padding=(0, 2))
        running.add_column(no_wrap=True, overflow="ellipsis")
        for _ in range(5):
            running.add_column(no_wrap=True, justify="right")
        room = max(1, self.console.height - 4)
        shown = list(self.running.values())
        for job, begin, epoch in shown[:room]:
            epochs = self.epochs[job.key]
            done = 0 if epoch is None else epoch.epoch + 1
            running.add_row(
                Text(job.label, "cyan"),
                f"epoch {done:>{len(str(epochs))}}/{epochs}",
                ProgressBar(total=epochs, completed=done, width=16),
                "" if epoch is None else f"accuracy {epoch.validation_accuracy:.3f}",
                "" if epoch is None else f"loss {epoch.train_loss:.3f}",
                clock(time.monotonic() - begin),
            )
        whole = Table.grid(padding=(0, 2))
        left = self.seconds_left()
        troubles = [f"{n} {status}" for status, n in self.count.items() if n and status != "ok"]
        whole.add_row(
            Text(self.name, "bold"),
            ProgressBar(total=self.total, completed=self.done, width=32),
            f"{self.done} of {self.total} trials",
            *(Text(trouble, self.STYLES[trouble.split()[1]]) for trouble in troubles),
            clock(time.monotonic() - self.begin) + (f", about {clock(left)} left" if left is not None else ""),
        )
        more = [Text(f"and {len(shown) - room} more", "dim")] if len(shown) > room else []
        return Group(running, *more, whole)


def make_progress(name: str, costs: Mapping[str, float], epochs: Mapping[str, int], enabled: bool = True) -> Silent:
    """The display that fits stderr."""
    if not enabled:
        return Silent(name, costs, epochs)
    if not sys.stderr.isatty():
        return Lines(name, costs, epochs)
    from rich.console import Console

    return Display(name, costs, epochs, console=Console(stderr=True, highlight=False))


def result_text(record: Record) -> str:
    """What came of a trial, on one line."""
    seconds = f"{record.provenance.seconds:.1f} s"
    error = error_text(record)
    if error is not None:
        first = textwrap.shorten(error, 100, placeholder=" ...")
        return f"FAILED  {first}" if record.status == "failed" else first
    state = longest_state(record)
    accuracy = record.outcome.test_accuracy if record.outcome else None
    parts = [f"accuracy {accuracy:.3f}"] if accuracy is not None else []
    return "  ".join([*parts, *([f"state {state.bytes:>9,} B"] if state else []), seconds])


def lost_text(reason: str) -> str:
    return f"its worker died ({reason}); it is tried again at the end"
