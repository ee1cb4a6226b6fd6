"""What a user can cause. Every message names the value, what is allowed and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """Base of every error that a user's input can cause; the command line prints its message without a traceback."""


class ConfigError(ZooError):
    """A sweep, trial, task, model or mixer setting is not valid."""


class UnknownNameError(ConfigError):
    """A name that no registry holds; the message suggests the nearest one."""


class PluginError(ZooError):
    """A plugin cannot be loaded, or its name is taken."""


class UnsupportedError(ZooError):
    """An operation exists but not for these arguments, this backend or this device."""


class RecordError(ZooError):
    """A stored record cannot be read."""


class SchemaError(RecordError):
    """A stored record was written by another version of zoo. It is not broken, and is left where it is."""


class DeviceLostError(ZooError):
    """The device no longer answers this process: whatever runs on it next would fail."""


class ConformanceError(ZooError):
    """A mixer or task breaks the contract; the message says which part and where."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest of `known`, or `""` when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
