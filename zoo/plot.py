"""The figure: accuracy against measured state, on a log2 byte axis, with direct labels."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zoo.errors import ConfigError
from zoo.frontier import COVERAGE, frontier_table, information_limit, split_by_data, staircase
from zoo.frontier import by_slice as frontiers_by_slice
from zoo.overlay import read_overlay
from zoo.placement import Label, place
from zoo.record import Record

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Style(NamedTuple):
    """How a family is drawn, in every figure: its name in print, colour and marker."""

    name: str
    colour: str
    marker: str


# Hue by kind of mixer, lightness and marker by member: any two differ in the marker or clearly in grey.
STYLES = {
    "attention": Style("attention", "#111111", "o"),
    "sliding_window": Style("sliding window", "#7a7a7a", "s"),
    "linear_attention": Style("linear attention", "#4a94d6", "o"),
    "based": Style("BASED", "#1257a6", "D"),
    "based+sliding_window": Style("BASED + window", "#0a2a5c", "P"),
    "retnet": Style("RetNet", "#3f9fb8", "v"),
    "gla": Style("GLA", "#14687d", "^"),
    "delta_net": Style("DeltaNet", "#3fa06f", "D"),
    "gated_delta_net": Style("Gated DeltaNet", "#00603a", "p"),
    "mamba": Style("Mamba", "#e0701a", "^"),
    "mamba2": Style("Mamba-2", "#a8410a", "v"),
    "h3": Style("H3", "#c08326", ">"),
    "s4d": Style("S4D", "#8a5a12", "P"),
    "rwkv4": Style("RWKV-4", "#bd79c6", "d"),
    "rwkv6": Style("RWKV-6", "#a352b0", "X"),
    "rwkv7": Style("RWKV-7", "#5e1f7a", "*"),
    "hyena": Style("Hyena", "#a81e3c", "h"),
    "gated_conv": Style("gated conv", "#d9657f", "<"),
    "mingru": Style("minGRU", "#b5307a", "8"),
}
# Markers of one size in points cover different areas.
MARKER_AREA = {"*": 2.1, "X": 1.4, "P": 1.4, "d": 1.4, "p": 1.3, "h": 1.2, "D": 0.85, "s": 0.9}
# For a plugin's family: by its name alone, so that it looks the same in every run.
OTHER_COLOURS = ("#c2185b", "#00838f", "#6d4c41", "#558b2f", "#4527a0", "#ad6800")
OTHER_MARKERS = ("*", "8", "d", "P", "X", "H", ">")
# Seeds from which on an interval is drawn: that of two is 12.7 standard errors to each side, often the whole figure.
BARRED = 3

GREY, PALE = "#6f6f6f", "#e6e6e6"
_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "zoo",
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "path.simplify": False,
}


def style(family: str) -> Style:
    """The family's name, colour and marker: fixed for the built-in ones, derived from the name for any other."""
    if family in STYLES:
        return STYLES[family]
    digest = hashlib.sha256(family.encode()).digest()
    name = " + ".join(STYLES[part].name if part in STYLES else part for part in family.split("+"))
    return Style(name, OTHER_COLOURS[digest[0] % len(OTHER_COLOURS)], OTHER_MARKERS[digest[1] % len(OTHER_MARKERS)])


def draw(records: Sequence[Record], base: Path, overlay: str | None = None, by_slice: bool = False) -> list[Path]:
    """Write the figure of some records: one panel a data setting, or a test slice. Returns the files.

    overlay: points to draw hollow, as `zoo plot --overlay` takes them.
    """
    points = read_overlay(overlay, records) if overlay else None
    if by_slice:
        return save(figure(frontiers_by_slice(records), points), base)
    settings = split_by_data(records)
    if len(settings) > 1:
        return save(figure({title: frontier_table(part) for title, part in settings.items()}, points), base)
    return save(figure(frontier_table(records), points, limit=information_limit(records)), base)


def figure(
    frontier: pd.DataFrame | Mapping[str, pd.DataFrame],
    overlay: pd.DataFrame | None = None,
    title: str = "Recall against recurrent state",
    *,
    limit: pd.DataFrame | None = None,
    steps: bool = False,
) -> Figure:
    """Draw a `frontier_table`, or several (`by_slice`, `split_by_data`) as small multiples under their names.

    overlay: see `zoo.overlay.read_overlay`. limit: see `zoo.frontier.information_limit`; a line, or a remark when it is
    left of all points. steps: a family's line is the staircase of its Pareto points instead of joining them. A model
    without state stands at the left, at half the least state: a log axis has no zero.
    Raises ConfigError when no model has a point, or when several frontiers are given with an overlay or a limit.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = dict(frontier) if isinstance(frontier, Mapping) else {"": frontier}
    if len(panels) > 1 and (overlay is not None or limit is not None):
        raise ConfigError("an overlay or a limit belongs to one data setting; plot the panels one by one.")
    if not any((panel["status"] == "ok").any() for panel in panels.values()):
        raise ConfigError("no model has an accuracy to plot: every trial failed or diverged; see `zoo table`.")
    placed = _off_zero([*panels.values(), *([] if overlay is None else [overlay])])
    panels = dict(zip(panels, placed, strict=False))
    overlay = None if overlay is None else placed[-1]
    columns = math.ceil(len(panels) ** 0.5) if len(panels) != 3 else 3
    rows = math.ceil(len(panels) / columns)
    single = len(panels) == 1
    width, height = (9.2, 5.9) if single else (4.7 * columns, 3.5 * rows + 0.9)
    with matplotlib.rc_context(_RC):
        fig = Figure(figsize=(width, height), dpi=200, facecolor="white")
        FigureCanvasAgg(fig)
        left, top, bottom = 0.62 / width, 1 - (0.86 if single else 0.9) / height, 0.98 / height
        fig.subplots_adjust(
            left=left, right=1 - 0.18 / width, top=top, bottom=bottom, wspace=0.16, hspace=0.34 if rows > 1 else 0
        )
        axes = [fig.add_subplot(rows, columns, i + 1) for i in range(len(panels))]
        extent = _extent(panels.values(), overlay)
        remark = None
        if limit is not None and limit["bytes"].max() < extent[0]:
            remark = f"information limit: {format_bytes(math.ceil(limit['bytes'].max()))} for accuracy 1"
            limit = None
        elif limit is not None:
            extent = (min(extent[0], float(limit["bytes"][limit["accuracy"] >= 0.5].min()) / 1.7), extent[1])
        for ax, (name, panel) in zip(axes, panels.items(), strict=True):
            _panel(fig, ax, panel[panel["status"] == "ok"], overlay, limit, steps, extent, small=not single)
            ax.set_title(name, loc="left", fontsize=9.5, color="#222222")
        inch = 1 / height
        fig.text(left, 1 - 0.36 * inch, title, fontsize=14, fontweight="bold", color="#111111")
        first = next(iter(panels.values()))
        if single:
            fig.text(left, 1 - 0.62 * inch, first.attrs.get("data", ""), fontsize=9.5, color=GREY)
        lengths = sorted({int(t) for panel in panels.values() for t in panel["state_seq_len"].dropna()})
        at = f" at T = {lengths[0]}" if len(lengths) == 1 else ""
        fig.text(
            (left + 1 - 0.18 / width) / 2, 0.5 * inch, f"measured recurrent state of one sequence{at}", ha="center"
        )
        fig.text(0.14 / width, (top + bottom) / 2, "test accuracy", rotation=90, va="center")
        caption = _caption(list(panels.values()), overlay, remark, int(14.5 * width))
        fig.text(left, 0.12 * inch, caption, fontsize=7.5, color=GREY, linespacing=1.4)
    return fig


def _off_zero(frames: Sequence[pd.DataFrame]) -> list[pd.DataFrame]:
    columns = ["state_bytes" if "state_bytes" in frame else "bytes" for frame in frames]
    sizes = [f[column].to_numpy(dtype=float, na_value=math.nan) for f, column in zip(frames, columns, strict=True)]
    left = min((float(size) / 2 for size in np.concatenate(sizes) if size > 0), default=1.0)
    moved = [np.where(size == 0, left, size) for size in sizes]
    return [f.assign(**{column: size}) for f, column, size in zip(frames, columns, moved, strict=True)]


def _caption(panels: list[pd.DataFrame], overlay: pd.DataFrame | None, remark: str | None, columns: int) -> str:
    seeds = max(int(panel["n"].max()) for panel in panels)
    parts = ["marker: mean over seeds", "pale: one seed"] if seeds > 1 else ["marker: one seed"]
    if seeds >= BARRED:
        parts.append(f"bar: {COVERAGE:.0%} t interval, {BARRED} seeds or more")
    parts.append("grey steps: Pareto frontier of all")
    if any(panel["grows"].any() for panel in panels):
        parts.append("dotted: state grows with T")
    if any((panel["state_elements"] == 0).any() for panel in panels):
        parts.append("leftmost: no state")
    if overlay is not None:
        parts.append(f"hollow: {overlay.attrs.get('name', 'overlay')}")
    if remark is not None:
        parts.append(remark)
    lost = sum(int((panel["status"] != "ok").sum()) for panel in panels)
    if lost:
        parts.append(f"not shown: {lost} whose every trial diverged or failed")
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}  ·  {part}"
        lines[-1:] = [longer] if len(longer) <= columns else [lines[-1], part]
    return "\n".join(lines)


def _extent(panels: Iterable[pd.DataFrame], overlay: pd.DataFrame | None) -> tuple[float, float]:
    """The ends of the byte axis, the same for all panels: room on the right for labels."""
    sizes = np.concatenate([panel.loc[panel["status"] == "ok", "state_bytes"].astype(float) for panel in panels])
    if overlay is not None:
        sizes = np.append(sizes, overlay["bytes"])
    return float(sizes.min()) / 1.7, float(sizes.max()) * 1.9


def _panel(
    fig: Figure,
    ax: Axes,
    points: pd.DataFrame,
    overlay: pd.DataFrame | None,
    limit: pd.DataFrame | None,
    steps: bool,
    extent: tuple[float, float],
    small: bool,
) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xlim(*extent)
    ax.set_ylim(-0.03, 1.05)
    _dress(ax, small)
    _draw_steps(ax, points["state_bytes"].to_numpy(dtype=float), points["accuracy"].to_numpy(dtype=float))
    if limit is not None:
        ax.plot(limit["bytes"], limit["accuracy"], color=GREY, linewidth=1.2, linestyle=(0, (5, 1.5)), zorder=1.5)
        middle = limit[limit["accuracy"] >= 0.7].iloc[0]
        ax.annotate(
            "information limit",
            (middle["bytes"], middle["accuracy"]),
            (6, -3),
            textcoords="offset points",
            fontsize=8,
            color=GREY,
        )

    names: dict[str, tuple[Any, bool]] = {}
    obstacles: list[tuple[float, float, float, str]] = []
    if overlay is not None:
        for name in sorted(set(overlay["family"])):
            members = overlay[overlay["family"] == name].sort_values("bytes")
            xy = members[["bytes", "accuracy"]].to_numpy(dtype=float)
            _draw_overlay(ax, style(name), xy, members["uncertainty"].to_numpy(dtype=float))
            names[name] = (xy, True)
            obstacles += [(x, y, 2.0, name) for x, y in xy] + _along(xy, 0.25, name)
    for name in sorted(set(points["family"])):
        members = points[points["family"] == name].sort_values(["state_bytes", "accuracy"])
        line = members[members["on_family_frontier"]][["state_bytes", "accuracy"]].to_numpy(dtype=float)
        _draw_family(ax, style(name), members, line, steps, small)
        names[name] = (line, False)
        means = members[["state_bytes", "accuracy"]].to_numpy(dtype=float)
        obstacles += [(x, y, 6.0, name) for x, y in means] + _along(line, 0.6, name)
        obstacles += [(x, y, 1.0, name) for x, ys in zip(means[:, 0], members["accuracies"], strict=True) for y in ys]
    _draw_labels(fig, ax, names, obstacles, 7.5 if small else 9.5)


def _dress(ax: Axes, small: bool) -> None:
    low, high = (math.log2(edge) for edge in ax.get_xlim())
    step = max(1, round((high - low) / (4 if small else 8)))
    ticks = [p for p in range(math.ceil(low), math.floor(high) + 1) if p % step == 0]
    ax.set_xticks([2.0**p for p in ticks], [format_bytes(2.0**p) for p in ticks])
    ax.set_xticks([2.0**p for p in range(math.ceil(low), math.floor(high) + 1)], minor=True)
    ax.tick_params(axis="x", which="minor", length=2, labelbottom=False)
    ax.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    ax.grid(axis="y", color=PALE, linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def format_bytes(size: float) -> str:
    """`512 B`, `4 KiB`, `1.5 MiB`."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.3g} B"


def _draw_steps(ax: Axes, sizes: Any, accuracy: Any) -> None:
    """The Pareto frontier of all families: the edge of what is reached, to the right end of the axis."""
    if not len(sizes):
        return
    xs, ys = staircase(sizes, accuracy)
    xs, ys = np.append(xs, ax.get_xlim()[1]), np.append(ys, ys[-1])
    xs, ys = np.insert(xs, 0, xs[0]), np.insert(ys, 0, ax.get_ylim()[0])
    ax.fill_between(xs, ys, ax.get_ylim()[0], color="#f6f6f4", linewidth=0, zorder=0)
    ax.plot(xs, ys, color="#b9b9b4", linewidth=2.4, solid_joinstyle="miter", zorder=1)


def _draw_family(ax: Axes, look: Style, members: pd.DataFrame, line: Any, steps: bool, small: bool) -> None:
    scale = 0.75 if small else 1.0
    grows = bool(members["grows"].any())
    dots = (0, (1, 1.4)) if grows else "-"
    path = staircase(*line.T) if steps else line.T
    ax.plot(*path, color=look.colour, linewidth=1.5 * scale, linestyle=dots, zorder=3)
    for _, row in members.iterrows():
        x = float(row["state_bytes"])
        if row["n"] > 1:
            if row["n"] >= BARRED:
                ax.plot([x, x], [row["low"], row["high"]], color=look.colour, linewidth=1.1, alpha=0.3, zorder=2)
            xs = [x] * row["n"]
            ax.scatter(xs, row["accuracies"], s=11 * scale, c=look.colour, alpha=0.35, linewidths=0, zorder=4)
    means = members[["state_bytes", "accuracy"]].to_numpy(dtype=float)
    area = 46 * scale * MARKER_AREA.get(look.marker, 1.0)
    ax.scatter(
        means[:, 0], means[:, 1], area, look.colour, marker=look.marker, edgecolors="white", linewidths=0.7, zorder=5
    )


def _draw_overlay(ax: Axes, look: Style, xy: Any, uncertainty: Any) -> None:
    ax.plot(*xy.T, color=look.colour, linewidth=0.9, linestyle=(0, (4, 2.5)), alpha=0.65, zorder=2)
    ax.vlines(xy[:, 0], xy[:, 1] - uncertainty, xy[:, 1] + uncertainty, color=look.colour, linewidth=0.9, alpha=0.5)
    area = 34 * MARKER_AREA.get(look.marker, 1.0)
    ax.scatter(
        xy[:, 0], xy[:, 1], area, "white", marker=look.marker, edgecolors=look.colour, linewidths=1.0, zorder=2.5
    )


def _along(xy: Any, weight: float, name: str) -> list[tuple[float, float, float, str]]:
    """Points along a line in the figure's log axis, dense enough that a label cannot slip between them."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(xy):
        for t in np.linspace(0, 1, 40):
            found.append((2 ** (math.log2(x0) * (1 - t) + math.log2(x1) * t), y0 * (1 - t) + y1 * t, weight, name))
    return found


def _draw_labels(
    fig: Figure,
    ax: Axes,
    names: dict[str, tuple[Any, bool]],
    obstacles: list[tuple[float, float, float, str]],
    size: float,
) -> None:
    """One label a family, beside a point of its line: placed in pixels, fixed to the point in printer's points."""
    from matplotlib.patheffects import withStroke

    if not names:
        return
    order = sorted(names)
    texts, wanted = [], []
    for name in order:
        xy, hollow = names[name]
        look = style(name)
        text = ax.annotate(
            look.name,
            xy[-1],
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size,
            fontstyle="italic" if hollow else "normal",
            color=look.colour,
            zorder=7,
            path_effects=[withStroke(linewidth=2.4, foreground="white")],
        )
        box = text.get_window_extent(fig.canvas.get_renderer())  # type: ignore[attr-defined]
        texts.append(text)
        wanted.append(Label(box.width, box.height, ax.transData.transform(xy)))
    frame = ax.get_window_extent()
    points = 72 / fig.dpi
    places = place(
        [Label(label.width * points, label.height * points, label.anchors * points) for label in wanted],
        ax.transData.transform([(x, y) for x, y, _, _ in obstacles]) * points,
        np.array([weight for _, _, weight, _ in obstacles]),
        np.array([order.index(name) for *_, name in obstacles]),
        [edge * points for edge in (frame.x0 + 4, frame.y0 + 4, frame.x1, frame.y1 + 10)],
    )
    for text, label, spot, name in zip(texts, wanted, places, order, strict=True):
        anchor = label.anchors[spot.anchor] * points
        text.xy = tuple(names[name][0][spot.anchor])
        text.set_position((spot.x - anchor[0], spot.y - anchor[1]))
        half = np.array([label.width, label.height]) * points / 2
        centre = np.array([spot.x, spot.y])
        edge = np.clip(anchor, centre - half, centre + half)
        if np.hypot(*(edge - anchor)) > 13:
            ax.annotate(
                "",
                text.xy,
                edge - anchor,
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "-",
                    "color": style(name).colour,
                    "linewidth": 0.6,
                    "alpha": 0.7,
                    "shrinkA": 0,
                    "shrinkB": 5,
                },
                zorder=4,
            )


def save(fig: Figure, path: str | Path) -> list[Path]:
    """Write PATH.png, PATH.svg and PATH.pdf. The same figure gives the same bytes: no date, fixed ids, own fonts."""
    import matplotlib

    base = Path(path)
    base.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(_RC):
        for suffix, metadata in _METADATA.items():
            # with_suffix would cut a name such as run-1.5 short.
            written.append(base.with_name(f"{base.name}.{suffix}"))
            fig.savefig(written[-1], format=suffix, metadata=metadata)
    return written


def to_svg(fig: Figure) -> str:
    """The figure as an <svg> element, without the XML declaration, to be put into a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        fig.savefig(buffer, format="svg", metadata=_METADATA["svg"])
    text = buffer.getvalue()
    return text[text.index("<svg") :]


_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
