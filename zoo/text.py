"""Plans, records, frontiers and registries as text for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from zoo.record import Epoch, Outcome, Record
    from zoo.registry import Registry
    from zoo.sweep import PlannedTrial


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> str:
    """Rows as columns, two spaces apart; the columns in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    )


def plan_text(plan: Sequence[PlannedTrial], runs: Sequence[Path | str]) -> str:
    """The trials of a sweep, what each would cost, and their sum. runs: where their records may be."""
    rows = [["key", "trial", "record", "parameters", "tokens", "FLOPs", "seconds"]]
    for p in plan:
        status = "run again" if p.will_run and p.record else p.record.status if p.record else "-"
        cost = [f"{p.cost.parameters:,}", f"{p.cost.tokens:.2g}", f"{p.cost.flops:.2g}"] if p.cost else ["", "", ""]
        seconds = "" if p.seconds is None else f"{p.seconds:.3g}"
        rows.append([p.trial.key[:8], p.label, status, *cost, seconds])
    due = [p for p in plan if p.will_run]
    tokens = sum(p.cost.tokens for p in due if p.cost)
    flops = sum(p.cost.flops for p in due if p.cost)
    lines = [
        aligned(rows, right=range(3, 7)),
        f"{len(plan)} trials: {len(plan) - len(due)} have a record in {' or '.join(map(str, runs))}, "
        f"{len(due)} to run.",
    ]
    if due:
        lines.append(f"To run, without early stops: {tokens:.3g} training tokens, {flops:.3g} matmul FLOPs.")
    known = [p.seconds for p in due if p.seconds is not None]
    if known:
        rest = f"; {len(due) - len(known)} are of families without a finished trial" if len(known) < len(due) else ""
        lines.append(f"About {clock(sum(known))} on one slot, as finished trials of the same family took{rest}.")
    return "\n".join(lines)


def clock(seconds: float) -> str:
    """`1:05:09`, `5:09`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def epoch_text(epoch: Epoch) -> str:
    return (
        f"epoch {epoch.epoch + 1}  step {epoch.step}  lr {epoch.learning_rate:.2e}  "
        f"train loss {epoch.train_loss:z.4f}  validation loss {epoch.validation_loss:z.4f}  "
        f"accuracy {epoch.validation_accuracy:.4f}  {epoch.seconds:.1f} s"
    )


def trials_text(records: Sequence[Record]) -> str:
    """One line a trial."""
    from zoo.results import error_text, labels, longest_state, model_family

    rows = [["key", "status", "model", "settings", "lr", "seed", "validation", "test", "state B", "seconds", ""]]
    for record, label in zip(records, labels(records), strict=True):
        outcome, state = record.outcome, longest_state(record)
        error = error_text(record)
        rows.append(
            [
                record.key[:8],
                record.status,
                model_family(record),
                label,
                f"{record.trial['optimizer']['lr']:.3g}",
                str(record.trial["seed"]),
                _fraction(outcome.validation_accuracy if outcome else None),
                _fraction(outcome.test_accuracy if outcome else None),
                f"{state.bytes:,}" if state else "",
                f"{record.provenance.seconds:.1f}",
                textwrap.shorten(error, 80, placeholder=" ...") if error else "",
            ]
        )
    return aligned(rows, right=range(4, 10))


def frontier_text(records: Sequence[Record]) -> str:
    """One line a model: its state, its test accuracy over seeds; a block for each data setting."""
    from zoo.frontier import SAME_ANSWERS, frontier_table, split_by_data

    blocks = []
    for title, part in split_by_data(records).items():
        frame = frontier_table(part)
        rows = [["", "model", "settings", "state B", "accuracy", "95 % interval", "seeds", "lr", ""]]
        for row in frame.to_dict("records"):
            ok = row["status"] == "ok"
            notes = [] if ok else [row["status"]]
            notes += ["learning rate at the edge of its grid"] if row["lr_at_edge"] else []
            notes += [f"{row['bad_trials']} of {row['trials']} trials bad"] if ok and row["bad_trials"] else []
            if row["agreement"] < SAME_ANSWERS:
                notes.append(f"only {row['agreement']:.0%} same answers through the state")
            rows.append(
                [
                    "*" if row["on_frontier"] else "",
                    row["family"],
                    row["label"],
                    f"{row['state_bytes']:,}" if ok else "",
                    _fraction(row["accuracy"]),
                    _interval(row),
                    str(row["n"]),
                    ", ".join(f"{lr:.2g}" for lr in sorted(set(row["lrs"]))),
                    "; ".join(notes),
                ]
            )
        blocks.append(f"{title}\n{aligned(rows, right=(3, 4, 6))}")
    return "\n\n".join([*blocks, "* on the Pareto frontier: no other model is as accurate with as little state."])


def comparison_text(records: Sequence[Record], source: str) -> str:
    """Each model that the overlay `source` has as well: accuracies, their difference, states; medians by family."""
    from zoo.frontier import compare, frontier_table
    from zoo.overlay import read_overlay

    overlay = read_overlay(source, records)
    frame = compare(frontier_table(records), overlay)
    if frame.empty:
        raise ConfigError(f"none of the {len(overlay)} points of overlay {source!r} is of a model of these records.")
    rows = [["model", "settings", "accuracy", "95 % interval", source, "difference", "state B", f"B, {source}"]]
    for row in frame.to_dict("records"):
        rows.append(
            [
                row["family"],
                row["label"],
                _fraction(row["accuracy"]),
                _interval(row),
                _fraction(row["point_accuracy"]),
                f"{row['difference']:+.3f}",
                f"{row['state_bytes']:,}",
                f"{row['point_bytes']:,.0f}",
            ]
        )
    sizes = frame["difference"].abs()
    medians = [["model", "points", "median |difference|", "largest"]]
    for family, part in [*sizes.groupby(frame["family"]), ("all", sizes)]:
        medians.append([str(family), str(len(part)), f"{part.median():.3f}", f"{part.max():.3f}"])
    return f"{aligned(rows, right=(2, 4, 5, 6, 7))}\n\n{aligned(medians, right=(1, 2, 3))}"


def _interval(row: Mapping[Any, Any]) -> str:
    return "" if math.isnan(row["low"]) else f"{row['low']:.3f} .. {row['high']:.3f}"


def _fraction(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3f}"


def record_text(record: Record) -> str:
    """Everything that one trial left."""
    import yaml

    lines = [f"{record.key}  {record.status}", ""]
    if record.failure is not None:
        lines += [f"{record.failure.error}: {record.failure.message}", "", record.failure.traceback.rstrip(), ""]
    if record.outcome is not None:
        lines += [*_outcome_lines(record.outcome), ""]
    lines += ["settings", _indent(yaml.safe_dump(record.trial, sort_keys=False, default_flow_style=None)), ""]
    lines += ["versions", *(f"  {name}: {version}" for name, version in record.versions.items()), ""]
    about = record.provenance.model_dump() | {"seconds": f"{record.provenance.seconds:.1f}"}
    lines += ["run", *(f"  {name}: {value}" for name, value in about.items())]
    return "\n".join(lines)


def _outcome_lines(outcome: Outcome) -> list[str]:
    lines = [
        f"{outcome.message}; {outcome.steps} steps, {outcome.parameters:,} parameters; seconds: data "
        f"{outcome.timing.data:.1f}, training {outcome.timing.train:.1f}, evaluation {outcome.timing.evaluate:.1f}"
    ]
    slices = [("validation", part) for part in outcome.validation] + [("test", part) for part in outcome.test]
    if slices:
        rows = [["split", "slice", "accuracy", "loss", "examples", "answers"]]
        for split, part in slices:
            numbers = [f"{part.accuracy:.4f}", f"{part.loss:z.4f}", f"{part.examples:,}", f"{part.answers:,}"]
            rows.append([split, part.name, *numbers])
        lines += ["", _indent(aligned(rows, right=range(2, 6)))]
    for state in outcome.state:
        lines += [
            "",
            f"state of one sequence after {state.seq_len} tokens: {state.bytes:,} B, {state.elements:,} elements",
        ]
        rows = [
            [f"layer {layer.layer}", layer.mixer, t.name, str(list(t.shape)), t.dtype, f"{t.bytes:,} B"]
            for layer in state.layers
            for t in layer.tensors
        ]
        lines += [_indent(aligned(rows, right=(5,)))] if rows else []
    if outcome.agreement is not None:
        a = outcome.agreement
        lines += [
            "",
            f"through the state, on {a.answers} answers of {a.slice_name}: {a.same_answers:.2%} the same answers, "
            f"accuracy {a.accuracy_state:.4f} (parallel form {a.accuracy_parallel:.4f}), "
            f"logits within {a.max_logit_error:.1e}",
        ]
    if outcome.history:
        lines += ["", "history", *(f"  {epoch_text(epoch)}" for epoch in outcome.history)]
    return lines


def _indent(text: str) -> str:
    return textwrap.indent(text.rstrip(), "  ")


def names_text(registry: Registry[Any], verbose: bool = False, skip: Collection[str] = ()) -> str:
    """Every name with its first line of documentation; verbose: its options, their types, defaults and meaning."""
    names = [name for name in registry if name not in skip]
    lines = [f"{registry.kind}s"]
    width = max((len(name) for name in names), default=0)
    for name in names:
        lines.append(f"  {name:<{width}}  {registry.summary(name)}".rstrip())
        if verbose:
            cls: Any = registry.get(name)
            fields = getattr(cls, "Config", cls).model_fields
            rows = [
                [
                    f"{option}: {_type(field)}",
                    "required" if field.is_required() else f"= {field.default!r}",
                    field.description or "",
                ]
                for option, field in fields.items()
            ]
            lines += [textwrap.indent(aligned(rows), "      ")] if rows else []
    return "\n".join(lines)


def _type(field: Any) -> str:
    return getattr(field.annotation, "__name__", None) or str(field.annotation).replace("typing.", "")
