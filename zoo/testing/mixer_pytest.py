"""`MixerConformance`: the checks of zoo.testing.mixer_checks as a pytest class for a plugin's own tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from zoo.mixers import Mixer
from zoo.testing.mixer import CHECKS, mixer_subject
from zoo.testing.subject import Subject


class MixerConformance:
    """Subclass, name the class under test, inherit every test:

        class TestMyMixer(MixerConformance):
            @pytest.fixture
            def mixer_class(self):
                return MyMixer

    `mixer_class` may also give a registered name. Override `mixer_config` to test other options than the defaults
    (a fixture with `params=` tests several), `d_model` when the mixer needs another width.
    """

    @pytest.fixture
    def mixer_class(self) -> type[Mixer] | str:
        raise NotImplementedError(f"{type(self).__name__} must override the fixture mixer_class.")

    @pytest.fixture
    def mixer_config(self) -> Mapping[str, Any]:
        return {}

    @pytest.fixture
    def d_model(self) -> int:
        return 64

    @pytest.fixture
    def subject(self, mixer_class: type[Mixer] | str, mixer_config: Mapping[str, Any], d_model: int) -> Subject:
        return mixer_subject(mixer_class, mixer_config, d_model=d_model)


def _as_test(check: Callable[[Subject], str]) -> Callable[[MixerConformance, Subject], None]:
    def test(self: MixerConformance, subject: Subject) -> None:
        check(subject)

    test.__doc__ = check.__doc__
    return test


for _check in CHECKS.values():
    setattr(MixerConformance, f"test_{_check.__name__}", _as_test(_check))
