"""How a sweep goes, on stderr: a live display on a terminal, one line a finished trial elsewhere."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from zoo.executors import Job
from zoo.record import Epoch, Record
from zoo.results import error_text, longest_state
from zoo.text import clock

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Silent:
    """No output; also the base of the displays, which keep count here."""

    def __init__(self, name: str, jobs: Sequence[Job]) -> None:
        self.name = name
        self.total = len(jobs)
        self.cost = sum(job.cost for job in jobs)
        self.width = max(len(job.label) for job in jobs)
        self.running: dict[str, tuple[Job, float, Epoch | None]] = {}
        self.count = {"ok": 0, "diverged": 0, "failed": 0}
        self.cost_done = 0.0
        self.begin = time.monotonic()
        self.first: float | None = None

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def started(self, job: Job) -> None:
        self.first = self.first or time.monotonic()
        self.running[job.key] = (job, time.monotonic(), None)

    def epoch(self, job: Job, epoch: Epoch) -> None:
        self.running[job.key] = (job, self.running[job.key][1], epoch)

    def finished(self, job: Job, record: Record) -> None:
        self.running.pop(job.key, None)
        self.count[record.status] += 1
        self.cost_done += job.cost

    def lost(self, job: Job, reason: str) -> None:
        self.running.pop(job.key, None)

    @property
    def done(self) -> int:
        return sum(self.count.values())

    def fraction(self) -> float:
        """The share of the sweep's cost that is done, running trials by their epochs."""
        # A copy, because a display asks from a thread of its own.
        parts = [(job, epoch) for job, _, epoch in dict(self.running).values() if epoch is not None]
        partly = sum(job.cost * (epoch.epoch + 1) / _epochs(job) for job, epoch in parts)
        return (self.cost_done + partly) / self.cost

    def seconds_left(self) -> float | None:
        """None while nothing is done."""
        done = self.fraction()
        return (time.monotonic() - self.first) * (1 - done) / done if done and self.first else None


def _epochs(job: Job) -> int:
    return job.trial["training"]["epochs"]


class Lines(Silent):
    """One line a finished trial: for logs and pipes."""

    def finished(self, job: Job, record: Record) -> None:
        super().finished(job, record)
        print(f"{self._position()} {job.label:<{self.width}} {result_text(record)}", file=sys.stderr, flush=True)

    def lost(self, job: Job, reason: str) -> None:
        super().lost(job, reason)
        print(
            f"{' ' * len(self._position())} {job.label:<{self.width}} {lost_text(reason)}", file=sys.stderr, flush=True
        )

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

        self.console.print(Text(f"{job.label:<{self.width}} ").append(text, style), soft_wrap=True)

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
            epochs = _epochs(job)
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
            ProgressBar(total=1, completed=self.fraction(), width=32),
            f"{self.done} of {self.total} trials",
            *(Text(trouble, self.STYLES[trouble.split()[1]]) for trouble in troubles),
            clock(time.monotonic() - self.begin) + (f", about {clock(left)} left" if left is not None else ""),
        )
        notes = []
        if len(shown) > room:
            notes.append(Text(f"and {len(shown) - room} more", "dim"))
        if self.first is None:
            notes.append(Text("starting workers ...", "dim"))
        return Group(running, *notes, whole)


def make_progress(name: str, jobs: Sequence[Job], enabled: bool = True) -> Silent:
    """The display that fits stderr."""
    if not enabled:
        return Silent(name, jobs)
    if not sys.stderr.isatty():
        return Lines(name, jobs)
    from rich.console import Console

    return Display(name, jobs, console=Console(stderr=True, highlight=False))


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
