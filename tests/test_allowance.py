"""Tensors that are too large are refused before they are made, whichever way they are asked for."""

from __future__ import annotations

import pytest
import torch

from zoo.allowance import Allowance
from zoo.errors import ConfigError

HUGE = 10**15


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(HUGE),
        lambda: torch.zeros(HUGE // 8, 8),
        lambda: torch.randn(2, HUGE),
        lambda: torch.ones(3).new_zeros(HUGE),
        lambda: torch.nn.Linear(10**8, 10**8),
        lambda: torch.ones(1, 3).expand(HUGE, 3).exp(),
        lambda: torch.arange(101),
        lambda: torch.ones(11, 1) * torch.ones(1, 10),
        lambda: [torch.ones(10) for _ in range(11)],
    ],
)
def test_more_than_the_allowance_is_refused(make):
    message = r"^the model takes more than 100 numbers, with a tensor of [0-9,x ]+; lower d_model\.$"
    with pytest.raises(ConfigError, match=message), Allowance(100, "the model", "lower d_model"):
        make()


def test_views_and_changes_in_place_are_free():
    with Allowance(100, "the model", "lower d_model"):
        x = torch.zeros(5, 10)
        for _ in range(100):
            x.add_(1)
            x.view(10, 5).expand(HUGE, 10, 5)
    assert torch.equal(x, torch.full((5, 10), 100.0))
