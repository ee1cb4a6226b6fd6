"""Where to put the labels of lines in a figure: beside a point of the line, where they cover least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

DIRECTIONS = np.array([(1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1)], dtype=float)
# A little dearer the less usual the side is: right, right above, right below, left, ...
DIRECTION_COST = np.array([0.0, 1.0, 1.5, 1.0, 2.0, 2.5, 1.5, 2.0])
GAPS = np.array([7.0, 11.0, 16.0, 24.0, 36.0, 52.0, 72.0])
PADDING = 2.0
NEIGHBOURHOOD = 9.0
COST_OF_DISTANCE = 0.45
COST_OF_OVERLAP = 1e4


class Label(NamedTuple):
    """A label of `width` x `height` pixels for a line with the points `anchors` (n, 2), the preferred one last."""

    width: float
    height: float
    anchors: Points


class Place(NamedTuple):
    """The label's centre, and the anchor that it belongs to."""

    x: float
    y: float
    anchor: int


def place(
    labels: Sequence[Label], obstacles: Points, weights: Points, owners: NDArray[np.int64], bounds: Sequence[float]
) -> list[Place]:
    """A place for each label, so that labels do not overlap, cover few obstacles and stand near their own line.

    obstacles (n, 2): points not to cover, with `weights` (n,) and the index of the label they belong to, `owners` (n,),
    -1 for none. bounds: left, bottom, right, top, which no label leaves. All in pixels. Deterministic: every label
    moves in turn to its cheapest candidate until none moves.
    """
    candidates = [_candidates(label, bounds) for label in labels]
    costs = [
        cost + _covering(centres, label, obstacles, weights, owners == index)
        for index, (label, (centres, cost, _)) in enumerate(zip(labels, candidates, strict=True))
    ]
    # The label with the dearest best place chooses first.
    order = sorted(range(len(labels)), key=lambda i: (-costs[i].min(), i))
    chosen: dict[int, int] = {}
    for _ in range(12):
        before = dict(chosen)
        for i in order:
            total = costs[i].copy()
            for j, at in chosen.items():
                if j != i:
                    total += COST_OF_OVERLAP * _overlaps(candidates[i][0], labels[i], candidates[j][0][at], labels[j])
            chosen[i] = int(total.argmin())
        if chosen == before:
            break
    return [
        Place(float(centres[at, 0]), float(centres[at, 1]), int(anchors[at]))
        for (centres, _, anchors), at in zip(candidates, (chosen[i] for i in range(len(labels))), strict=True)
    ]


def _candidates(label: Label, bounds: Sequence[float]) -> tuple[Points, Points, NDArray[np.int64]]:
    """Centres (m, 2), their cost before anything is in the way (m,), and each one's anchor (m,)."""
    half = np.array([label.width, label.height]) / 2
    steps = DIRECTIONS[:, None] * (half + GAPS[:, None] / np.linalg.norm(DIRECTIONS, axis=1)[:, None, None])
    centres = label.anchors[:, None, None] + steps
    earlier = np.arange(len(label.anchors))[::-1, None, None] * 1.5
    cost = earlier + DIRECTION_COST[:, None] + COST_OF_DISTANCE * (GAPS - GAPS[0])
    anchor = np.broadcast_to(np.arange(len(label.anchors))[:, None, None], cost.shape)
    centres, cost, anchor = centres.reshape(-1, 2), cost.ravel(), anchor.ravel()
    outside = np.maximum(0, np.array(bounds[:2]) - (centres - half)) + np.maximum(
        0, (centres + half) - np.array(bounds[2:])
    )
    return centres, cost + COST_OF_OVERLAP * outside.sum(axis=1), anchor


def _covering(centres: Points, label: Label, obstacles: Points, weights: Points, own: NDArray[np.bool_]) -> Points:
    """The weight of the obstacles under each candidate; another line's near it count a little, its own do not."""
    half = np.array([label.width, label.height]) / 2
    distance = np.abs(obstacles[None] - centres[:, None]) - half
    under = (distance < PADDING).all(axis=2)
    near = (distance < NEIGHBOURHOOD).all(axis=2) & ~own
    return (under + 0.2 * near) @ weights


def _overlaps(centres: Points, label: Label, other: Points, other_label: Label) -> NDArray[np.bool_]:
    room = np.array([label.width + other_label.width, label.height + other_label.height]) / 2 + PADDING
    return np.all(np.abs(centres - other) < room, axis=1)
