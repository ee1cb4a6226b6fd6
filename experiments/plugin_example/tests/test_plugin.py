"""What a plugin's own repository needs: zoo's conformance tests, inherited."""

from __future__ import annotations

import pytest
from zoo_plugin_example.induction import Induction
from zoo_plugin_example.leaky_average import LeakyAverage

from zoo.testing import MixerConformance, TaskConformance


class TestLeakyAverage(MixerConformance):
    @pytest.fixture
    def mixer_class(self):
        return LeakyAverage

    @pytest.fixture(params=[{}, {"num_heads": 2}], ids=["default", "2-heads"])
    def mixer_config(self, request):
        return request.param


class TestInduction(TaskConformance):
    @pytest.fixture
    def task(self):
        return Induction()
