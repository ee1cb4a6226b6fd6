"""The page: whole in one file, every point traceable, every failure named, text escaped, and a grid that repeats it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import yaml
from synthetic_records import make_record, make_trial, make_zoo

from zoo.config import Sweep
from zoo.errors import ConfigError
from zoo.frontier import frontier_table
from zoo.grid import read_yaml
from zoo.report import reproducing_grid, write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects text and links."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.text, self.links, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(scope="module")
def records():
    return [
        *make_zoo(rates=(1e-3, 3e-3)),
        make_record(make_trial("retnet", seed=0), agreement=0.9),
        make_record(make_trial("retnet", seed=1), status="diverged"),
        make_record(make_trial("<script>alert(1)</script>"), status="failed"),
        make_record(make_trial(slices=((512, 64),))),
    ]


@pytest.fixture(scope="module")
def html(records, tmp_path_factory):
    return write_report(records, tmp_path_factory.mktemp("report") / "new" / "page.html").read_text()


def test_the_page_is_whole_in_one_file(html):
    page = Page(html)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"@import|url\((?!#)", html)
    assert page.tags.count("svg") == 2
    assert page.tags.count("html") == page.tags.count("body") == 1


def test_every_point_shows_the_keys_behind_it(records, html):
    frame = frontier_table(records[:-1])
    assert frame["keys"].map(len).sum() > 50
    for key in (key for keys in frame["keys"] for key in keys):
        assert f'title="{key}"' in html


def test_what_a_reader_must_know_is_said(html):
    text = " ".join(Page(html).text)
    assert re.search(r"RetNet d64.*same answer as the parallel form in only 90.0% of cases", text)
    assert "RetNet d64: no trial of seed 1 ended well" in text
    assert "not in the figure: all of its 1 trials failed" in text
    assert "trials without an accuracy" in text
    assert "RuntimeError: shapes <2> & <3> differ" in text
    assert "Traceback ...\n  File <x>, line 1" in text
    assert "diverged: the training loss became nan at step 17, epoch 0" in text
    assert "cpu" in text
    assert "abc1234" in text
    assert "mixer based" in text


def test_text_is_escaped(html):
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert Page(html).tags.count("script") == 1


def test_the_same_records_give_the_same_page(records, html, tmp_path):
    assert write_report(records, tmp_path / "page.html").read_text() == html


def test_a_run_without_any_result_still_has_a_page(tmp_path):
    text = write_report([make_record(status="failed")], tmp_path / "page.html").read_text()
    page = Page(text)
    assert "svg" not in page.tags
    assert "1 trials without an accuracy" in " ".join(page.text)
    with pytest.raises(ConfigError, match="no records"):
        write_report([], tmp_path / "page.html")


def small_grid(**changes):
    return {
        "data": {
            "train": [{"task": "mqar", "seq_len": 32, "num_pairs": 2, "vocab_size": 64, "examples": 128}],
            "test": [{"task": "mqar", "seq_len": 32, "num_pairs": 2, "vocab_size": 64, "examples": 64}],
        },
        "model": {"d_model": [16, 32], "layers": ["gated_conv"]},
        "optimizer": {"lr": [1e-3, 3e-3], "weight_decay": 0.1},
        "training": {"epochs": 1},
        "seed": [0, 1],
        **changes,
    }


@pytest.mark.parametrize(
    ("grid", "variants"),
    [
        (small_grid(), 2),
        (small_grid(variants=[{"seed": 0, "optimizer": {"lr": 1e-3}}, {"seed": 1, "optimizer": {"lr": 5e-4}}]), 4),
        (small_grid(model={"d_model": 16, "layers": ["gated_conv"]}, seed=0, optimizer={"lr": 1e-3}), 1),
        (small_grid(optimizer={"lr": 1e-3, "betas": [[0.9, 0.99], [0.9, 0.999]]}), 8),
        (small_grid(variants=[{"training": {"epochs": 2}}, {"data": {"seed": 3}}]), 4),
    ],
    ids=["grid", "pairs", "one", "lists", "settings"],
)
def test_the_grid_on_the_page_gives_the_same_trials(grid, variants):
    sweep = Sweep.from_dict(grid)
    records = [
        make_record().model_copy(update={"trial": t.model_dump(mode="json"), "key": t.key}) for t in sweep.trials
    ]
    found = reproducing_grid(records)
    assert len(found["variants"]) == variants
    text = yaml.safe_dump(found, sort_keys=False, default_flow_style=None)
    again = Sweep.from_dict(read_yaml(text, "grid"))
    assert {trial.key for trial in again.trials} == {trial.key for trial in sweep.trials}
