"""The figure: the right points at the right places, legible without colour, labels apart, the same bytes every time."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from synthetic_records import make_record, make_trial, make_zoo

from zoo.errors import ConfigError
from zoo.frontier import by_slice, frontier_table, split_by_data
from zoo.mixers import mixers
from zoo.overlay import read_overlay
from zoo.placement import Label, place
from zoo.plot import (
    OTHER_COLOURS,
    OTHER_MARKERS,
    STYLES,
    figure,
    format_bytes,
    save,
    style,
    to_svg,
)
from zoo.results import RunStore


@pytest.fixture(scope="module")
def zoo_frontier():
    return frontier_table(make_zoo())


@pytest.fixture(scope="module")
def zoo_figure(zoo_frontier):
    return figure(zoo_frontier, read_overlay("based_figure2"))


def crowd():
    """Four sizes of every built-in family, close to each other."""
    records = []
    for i, name in enumerate(STYLES):
        for k in range(4):
            size = int(2 ** (11 + 2 * k + (7 * i + 3 * k) % 10 / 7))
            trial = make_trial("gated_conv", d_model=64 * (k + 1))
            if name != "gated_conv":
                trial["model"]["layers"] += [{"mixer": mixer, "dial": k} for mixer in name.split("+")]
            accuracy = 1 / (1 + (2 ** (11 + 6 * i / len(STYLES)) / size) ** 1.1)
            records.append(make_record(trial, test=accuracy, state_bytes=size))
    return records


# --- style ------------------------------------------------------------------------------------------------------------


def luminance(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def lightness(colour):
    return 116 * luminance(colour) ** (1 / 3) - 16


def test_every_built_in_mixer_has_a_style_and_no_other():
    assert set(mixers._builtins) == {part for family in STYLES for part in family.split("+")}


def test_families_differ_in_grey():
    for a, b in itertools.combinations(STYLES.values(), 2):
        assert a.marker != b.marker or abs(lightness(a.colour) - lightness(b.colour)) > 18, (a, b)
    assert len({look.name for look in STYLES.values()}) == len(STYLES)


@pytest.mark.parametrize("colour", [*(look.colour for look in STYLES.values()), *OTHER_COLOURS])
def test_colours_stand_out_on_white(colour):
    assert 1.05 / (luminance(colour) + 0.05) >= 3


def test_an_unknown_family_has_a_style_of_its_own_that_never_changes():
    look = style("my_mixer")
    assert look == style("my_mixer") == ("my_mixer", look.colour, look.marker)
    assert look.colour in OTHER_COLOURS
    assert look.marker in OTHER_MARKERS
    assert len({style(f"mixer_{i}")[1:] for i in range(40)}) > 15
    assert style("based+mamba").name == "BASED + Mamba"


@pytest.mark.parametrize(
    ("size", "text"), [(512, "512 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (3 * 2**30, "3 GiB")]
)
def test_format_bytes(size, text):
    assert format_bytes(size) == text


# --- what is drawn ----------------------------------------------------------------------------------------------------


def drawn_points(ax):
    return {tuple(np.round(xy, 9)) for collection in ax.collections for xy in np.asarray(collection.get_offsets())}


def test_every_mean_every_seed_and_every_overlay_point_is_drawn(zoo_frontier, zoo_figure):
    (ax,) = zoo_figure.axes
    points = drawn_points(ax)
    for row in zoo_frontier.to_dict("records"):
        for accuracy in (row["accuracy"], *row["accuracies"]):
            assert tuple(np.round((row["state_bytes"], accuracy), 9)) in points
    for row in read_overlay("based_figure2").itertuples():
        assert (row.bytes, round(row.accuracy, 9)) in points
    assert ax.get_xscale() == "log"
    assert ax.get_xlim()[0] < zoo_frontier["state_bytes"].min()
    assert ax.get_xlim()[1] > read_overlay("based_figure2")["bytes"].max()
    assert ax.get_ylim()[0] < 0 < 1 < ax.get_ylim()[1]


@pytest.mark.parametrize(("sizes", "left"), [((0, 4096), 2048.0), ((0,), 1.0)])
def test_a_model_without_state_stands_at_the_left(sizes, left):
    records = [make_record(make_trial("based", {"feature_dim": size}), state_bytes=size, test=0.5) for size in sizes]
    fig = figure(frontier_table(records))
    (ax,) = fig.axes
    assert {(left, 0.5), *((size, 0.5) for size in sizes if size)} <= drawn_points(ax)
    assert ax.get_xlim()[0] < left
    assert "leftmost: no state" in " ".join(text.get_text() for text in fig.texts)


def test_an_overlay_without_state_stands_at_the_left_too(tmp_path):
    store = RunStore(tmp_path, create=True)
    store.write(make_record(test=0.25, state_bytes=0))
    fig = figure(frontier_table([make_record(state_bytes=4096)]), read_overlay(tmp_path))
    assert (2048.0, 0.25) in drawn_points(fig.axes[0])


def test_the_grey_steps_are_the_frontier(zoo_frontier):
    (ax,) = figure(zoo_frontier).axes
    xs, ys = max((line.get_data() for line in ax.lines), key=lambda data: len(data[0]))
    on = zoo_frontier[zoo_frontier["on_frontier"]]
    corners = {tuple(np.round(xy, 9)) for xy in zip(xs, ys, strict=True)}
    assert len(on) >= 4
    for size, accuracy in zip(on["state_bytes"], on["accuracy"], strict=True):
        assert tuple(np.round((size, accuracy), 9)) in corners


def label_boxes(fig):
    renderer = fig.canvas.get_renderer()
    for ax in fig.axes:
        yield ax, [(t.get_text(), t.get_window_extent(renderer)) for t in ax.texts if t.get_text()]


@pytest.mark.parametrize("records", [make_zoo(), make_zoo(seeds=1), crowd()], ids=["zoo", "one seed", "crowd"])
def test_labels_name_every_family_and_never_overlap(records):
    fig = figure(frontier_table(records))
    ((_, boxes),) = label_boxes(fig)
    expected = {style(name).name for name in frontier_table(records)["family"]}
    assert {text for text, _ in boxes} == expected
    for (a, box), (b, other) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other), (a, b)
    page = fig.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and box.y1 <= page.y1 for _, box in boxes)


def test_nothing_is_cut_off(zoo_figure):
    renderer = zoo_figure.canvas.get_renderer()
    for text in zoo_figure.texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= zoo_figure.bbox.x1
        assert box.y1 <= zoo_figure.bbox.y1


def test_the_caption_says_what_the_marks_mean(zoo_frontier, zoo_figure):
    def caption(fig):
        return fig.texts[-1].get_text()

    assert "hollow: based_figure2 (published, its state by formula)" in caption(zoo_figure)
    assert "interval" not in caption(zoo_figure)
    assert "dotted: state grows with T" in caption(zoo_figure)
    lone = frontier_table([make_record(), make_record(make_trial(options={"feature_dim": 4}), status="diverged")])
    text = caption(figure(lone))
    assert "marker: one seed" in text
    assert "not shown: 1 whose every trial diverged or failed" in text
    assert "interval" not in text
    assert "hollow" not in text


def test_three_seeds_have_an_interval_and_two_have_dots():
    def bars(seeds):
        (ax,) = figure(frontier_table([make_record(make_trial(seed=seed)) for seed in range(seeds)])).axes
        return [line for line in ax.lines if len(set(line.get_xdata())) == 1 and len(line.get_xdata()) == 2]

    assert not bars(2)
    assert bars(3)
    three = figure(frontier_table([make_record(make_trial(seed=seed)) for seed in range(3)]))
    assert "bar: 95% t interval, 3 seeds or more" in three.texts[-1].get_text()


def test_a_limit_is_a_line_or_a_remark(zoo_frontier):
    near = pd.DataFrame({"bytes": [600.0, 900.0, 1500.0], "accuracy": [0.1, 0.6, 1.0]})
    fig = figure(zoo_frontier, limit=near)
    (ax,) = fig.axes
    assert any(list(line.get_xdata()) == [600.0, 900.0, 1500.0] for line in ax.lines)
    assert "information limit" in [text.get_text() for text in ax.texts]
    fig = figure(zoo_frontier, limit=near.assign(bytes=[6.0, 9.0, 15.0]))
    assert fig.axes[0].get_xlim()[0] > 100
    assert "information limit: 15 B for accuracy 1" in fig.texts[-1].get_text()


def test_steps_draw_each_familys_staircase():
    records = [make_record(make_trial(options={"feature_dim": f}), test=f / 20, state_bytes=64 * f) for f in (8, 16)]

    def has_corner(fig):
        lines = [np.round(line.get_xydata(), 9).tolist() for line in fig.axes[0].lines[1:]]
        return any([1024.0, 0.4] in line for line in lines)

    assert has_corner(figure(frontier_table(records), steps=True))
    assert not has_corner(figure(frontier_table(records)))


def test_small_multiples():
    records = make_zoo(seeds=1)
    fig = figure(by_slice(records))
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["T=64 n=4", "T=128 n=8", "T=256 n=16"]
    assert len({ax.get_xlim() for ax in fig.axes}) == 1
    for _, boxes in label_boxes(fig):
        assert len(boxes) == 13
        assert not any(a.overlaps(b) for (_, a), (_, b) in itertools.combinations(boxes, 2))
    others = [make_record(make_trial(slices=((64, n),))) for n in (4, 8)]
    settings = {title: frontier_table(part) for title, part in split_by_data(others).items()}
    assert len(figure(settings).axes) == 2
    with pytest.raises(ConfigError, match="plot the panels one by one"):
        figure(settings, read_overlay("based_figure2"))


def test_a_panel_without_points_is_empty_and_a_figure_without_points_is_an_error():
    good, bad = frontier_table([make_record()]), frontier_table([make_record(status="diverged")])
    assert len(figure({"good": good, "bad": bad}).axes) == 2
    with pytest.raises(ConfigError, match="every trial failed or diverged"):
        figure(bad)


# --- files ------------------------------------------------------------------------------------------------------------


def test_png_svg_and_pdf(zoo_figure, tmp_path):
    png, svg, pdf = save(zoo_figure, tmp_path / "new" / "run-1.5")
    assert [path.name for path in (png, svg, pdf)] == ["run-1.5.png", "run-1.5.svg", "run-1.5.pdf"]
    assert png.read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    data = pdf.read_bytes()
    # TrueType, whole: an editor can change the text, and no Type 3 font upsets a publisher.
    assert b"/FontFile2" in data
    assert b"/Type3" not in data
    assert b"CreationDate" not in data
    assert b"date" not in svg.read_bytes()
    element = to_svg(zoo_figure)
    assert element.startswith("<svg")
    ElementTree.fromstring(element)


SCRIPT = """
import sys, hashlib
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from synthetic_records import make_zoo
from zoo.frontier import frontier_table
from zoo.plot import figure, save
for path in save(figure(frontier_table(make_zoo())), sys.argv[2]):
    print(hashlib.sha256(path.read_bytes()).hexdigest())
assert "matplotlib.pyplot" not in sys.modules
"""


def test_the_same_records_give_the_same_bytes_in_any_process(tmp_path):
    here = [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in save(figure(frontier_table(make_zoo())), tmp_path / "a")
    ]
    folder = str(Path(__file__).parent)
    env = {**os.environ, "PYTHONHASHSEED": "123", "TZ": "Asia/Tokyo", "PYTHONPATH": str(Path(folder).parent)}
    command = [sys.executable, "-c", SCRIPT, folder, str(tmp_path / "b")]
    there = subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout.split()
    assert here == there
    in_another_order = to_svg(figure(frontier_table(make_zoo()[::-1])))
    assert in_another_order in (tmp_path / "a.svg").read_text()


def test_no_global_settings_are_left_changed():
    before = dict(matplotlib.rcParams)
    to_svg(figure(frontier_table([make_record()])))
    assert dict(matplotlib.rcParams) == before


# --- placement --------------------------------------------------------------------------------------------------------


def boxes(labels, places):
    return [
        (p.x - n.width / 2, p.y - n.height / 2, p.x + n.width / 2, p.y + n.height / 2)
        for n, p in zip(labels, places, strict=True)
    ]


def test_labels_of_one_point_spread_around_it():
    labels = [Label(60.0, 12.0, np.array([[200.0, 200.0]])) for _ in range(6)]
    places = place(labels, np.empty((0, 2)), np.empty(0), np.empty(0, dtype=int), (0, 0, 400, 400))
    for a, b in itertools.combinations(boxes(labels, places), 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert all(np.hypot(p.x - 200, p.y - 200) < 120 for p in places)


def test_a_label_keeps_off_obstacles_and_inside_the_bounds():
    wall = np.array([[x, y] for x in np.arange(105, 190, 4.0) for y in np.arange(60, 140, 4.0)])
    label = Label(60.0, 12.0, np.array([[100.0, 100.0]]))
    (spot,) = place([label], wall, np.ones(len(wall)), np.full(len(wall), -1), (0, 0, 200, 200))
    assert spot.x + 30 < 105
    (spot,) = place([label], wall, np.ones(len(wall)), np.full(len(wall), -1), (90, 0, 200, 200))
    assert spot.x - 30 >= 90


def test_a_label_stands_at_the_last_anchor_when_all_is_free():
    label = Label(60.0, 12.0, np.array([[50.0, 50.0], [100.0, 100.0]]))
    (spot,) = place([label], np.empty((0, 2)), np.empty(0), np.empty(0, dtype=int), (0, 0, 300, 300))
    assert spot.anchor == 1
    assert spot.x > 130
    assert spot.y == 100
