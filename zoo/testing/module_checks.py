"""The contract of a mixer, second half: gradients, precision, randomness, configuration, copies, places in a model.

Each function is one check: it returns what it measured, or raises ConformanceError. Any other exception is a failed
check too (report.run_check).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
from collections.abc import Callable

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from zoo.mixers import MixerConfig
from zoo.state import named_tensors
from zoo.testing.subject import Subject, fail, require_close, require_same_bits
from zoo.testing.tolerances import TOLERANCES


def gradients_reach_every_parameter(s: Subject) -> str:
    """In training mode every parameter, and the input, gets a finite gradient that is not zero throughout."""
    for perturb in (False, True):
        mixer, x = s.build(perturb=perturb).train(), s.input().requires_grad_()
        (mixer(x) * s.input(seed=1)).sum().backward()
        leaves = {"the input": x, **{f"parameter {n!r}": p for n, p in mixer.named_parameters() if p.requires_grad}}
        for name, leaf in leaves.items():
            if leaf.grad is None:
                fail(f"{name} {tuple(leaf.shape)} gets no gradient: the output does not depend on it")
            if not leaf.grad.isfinite().all():
                bad = int((~leaf.grad.isfinite()).sum())
                where = "with perturbed parameters" if perturb else "as initialised"
                fail(f"the gradient of {name} {tuple(leaf.shape)} has {bad} NaN or infinite elements, {where}")
            # As initialised a zero is legitimate: a zero matrix further on stops the gradient.
            if perturb and not leaf.grad.any():
                fail(f"the gradient of {name} {tuple(leaf.shape)} is zero throughout, with perturbed parameters")
    return f"{len(leaves) - 1} parameters, {sum(p.numel() for p in mixer.parameters()):,} numbers"


def gradients_match_finite_differences(s: Subject) -> str:
    """In fp64, along a random direction of each parameter and of the input, the gradient predicts the loss's change."""
    if torch.float64 not in s.dtypes:
        return f"fp64 is not supported on {s.device.type}; checked on a CPU"
    mixer = s.build(dtype=torch.float64).train()
    x = s.input(2, dtype=torch.float64).requires_grad_()
    weight = s.input(2, seed=1, dtype=torch.float64)

    def loss() -> Tensor:
        with torch.random.fork_rng():  # the same numbers each time, where training draws any
            torch.manual_seed(s.seed)
            return (mixer(x) * weight).sum()

    loss().backward()
    step, tolerance, worst = 1e-7, TOLERANCES["finite difference"][torch.float64], 0.0
    leaves = {"the input": x, **{f"parameter {n!r}": p for n, p in mixer.named_parameters()}}
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for i, (name, gradient) in enumerate(gradients.items()):
        leaf, generator = leaves[name], torch.Generator().manual_seed(s.seed + i)
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
        with torch.no_grad():
            value, ends = leaf.clone(), []
            for sign in (1, -1):
                leaf.copy_(value + sign * step * direction)
                ends.append(loss().item())
            leaf.copy_(value)
        measured = (ends[0] - ends[1]) / (2 * step)
        predicted = (gradient.conj() * direction).real.sum().item()
        # A random direction meets a gradient g with a product of typically |g|.
        error = abs(measured - predicted) / max(gradient.norm().item(), 1e-30)
        worst = max(worst, error)
        if not error <= tolerance:
            fail(
                f"the gradient of {name} {tuple(leaf.shape)} is wrong by {error:.1e} of its norm (allowed "
                f"{tolerance:.0e}): along a random direction the loss changes at a rate of {measured:.6g}, "
                f"the gradient says {predicted:.6g}"
            )
    return f"{len(gradients)} directions, error {worst:.0e}"


@torch.no_grad()
def float64(s: Subject) -> str:
    """`module.double()` works, its state is fp64 too, and the fp32 module computes the same but for rounding."""
    if torch.float64 not in s.dtypes:
        return f"fp64 is not supported on {s.device.type}; checked on a CPU"
    mixer, x = s.build(dtype=torch.float64), s.input(dtype=torch.float64)
    whole = mixer(x)
    start = mixer.init_state(s.batch)
    y_t, state = mixer.step(x[:, 0], start)
    for name, y in {"forward": whole, "prefill": mixer.prefill(x)[0], "step": y_t}.items():
        if y.dtype != torch.float64:
            fail(f"{name} gives {y.dtype} for a module and an input in fp64")
    for when, tensors in {"of init_state": named_tensors(start), "after a step": named_tensors(state)}.items():
        for name, tensor in tensors:
            if tensor.is_floating_point() and tensor.dtype != torch.float64:
                fail(
                    f"state tensor {name!r} {when} is {tensor.dtype} in a module in fp64; follow the parameters' dtype"
                )
    # What is computed in fp32 inside cannot follow a change of 1e-10: it stands still, or jumps.
    direction = s.input(seed=1, dtype=torch.float64)
    slopes = [(mixer(x + change * direction) - whole) / change for change in (1e-6, 1e-10)]
    what = "the effect of a change of 1e-10 in the input, against one of 1e-6 (is something computed in fp32?)"
    require_close(slopes[1], slopes[0], "slope", what, torch.float64)
    single = copy.deepcopy(mixer).float()
    worst = require_close(single(x.float()), whole, "two forms", "forward in fp32, against the same in fp64")
    return f"fp32 against fp64: error {worst:.0e}"


def train_is_eval(s: Subject) -> str:
    """Training mode, with autograd recording, gives what evaluation mode gives: no dropout inside a mixer."""
    mixer, x = s.build(), s.input()
    with torch.no_grad():
        evaluated = mixer(x)
    worst = require_close(mixer.train()(x), evaluated, "two forms", "forward in train(), against eval()")
    return f"error {worst:.0e}"


def determinism(s: Subject) -> str:
    """The same seed gives the same parameters, outputs and gradients, to the last bit."""
    runs = []
    for _ in range(2):
        mixer, x = s.build(perturb=False), s.input().requires_grad_()
        y = mixer(x)
        (y * s.input(seed=1)).sum().backward()
        initial = {f"{name!r} as initialised": tensor for name, tensor in mixer.state_dict().items()}
        gradients = {f"the gradient of {n!r}": p.grad for n, p in mixer.named_parameters() if p.grad is not None}
        runs.append({**initial, "the output": y, **gradients})
    for name, tensor in runs[0].items():
        require_same_bits(runs[1][name], tensor, f"{name}, built and run again with the same seed")
    return f"{len(runs[0])} tensors with the same bits"


@torch.no_grad()
def no_random_numbers(s: Subject) -> str:
    """forward, prefill, init_state and step draw nothing from a global generator."""
    mixer, x = s.build(), s.input()
    state = mixer.init_state(s.batch)
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: mixer(x),
        "prefill": lambda: mixer.prefill(x),
        "init_state": lambda: mixer.init_state(s.batch),
        "step": lambda: mixer.step(x[:, 0], state),
    }
    for name, call in calls.items():
        before = _generators(s.device)
        call()
        for generator, now in _generators(s.device).items():
            if now != before[generator]:
                fail(f"{name} draws from {generator}'s generator; what a mixer computes must not depend on one")
    return "the generators of torch, numpy and random stand still"


def _generators(device: torch.device) -> dict[str, bytes]:
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": pickle.dumps(np.random.get_state()),
        "random": pickle.dumps(random.getstate()),
    }
    if device.type == "cuda":
        states["CUDA"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    return states


def config_round_trip(s: Subject) -> str:
    """A config survives JSON, refuses what it does not know, cannot be changed, and is the one the mixer keeps."""
    cls = s.cls.Config
    if not issubclass(cls, MixerConfig):
        fail(f"{s.cls.__name__}.Config is not a zoo.MixerConfig; derive it from Mixer.Config")
    text = json.dumps(s.config.model_dump(mode="json"))
    again = cls.model_validate(json.loads(text))
    if again != s.config:
        fail(f"the config {s.config!r} comes back from JSON as {again!r}")
    try:
        cls.model_validate({**json.loads(text), "no_such_option": 1})
    except ValidationError:
        pass
    else:
        fail("the unknown key 'no_such_option' is taken in silence; keep extra='forbid' of Mixer.Config")
    for name in cls.model_fields:
        try:
            setattr(again, name, getattr(again, name))
        except ValidationError:
            continue
        fail(f"the field {name!r} of a config can be set; keep frozen=True of Mixer.Config")
    mixer = s.build()
    if mixer.config != s.config or mixer.layer != s.layer:
        fail(f"the mixer keeps {mixer.config!r}, {mixer.layer!r}, but was given {s.config!r}, {s.layer!r}")
    return text


@torch.no_grad()
def pickle_and_deepcopy(s: Subject) -> str:
    """A pickled and a deep-copied mixer give the same bits."""
    mixer, x = s.build(), s.input()
    whole = mixer(x)
    require_same_bits(copy.deepcopy(mixer)(x), whole, "the output of a deep copy")
    data = pickle.dumps(mixer)
    require_same_bits(pickle.loads(data)(x), whole, "the output of a mixer pickled and loaded")
    return f"{len(data):,} bytes"


@torch.no_grad()
def every_layer(s: Subject) -> str:
    """The mixer is sound as the only, the first, a middle and the last layer, with rotary positions, twice as wide."""
    places = {
        "the only layer": s.at(index=0, depth=1),
        "the first of 4": s.at(index=0, depth=4),
        "the second of 4": s.at(index=1, depth=4),
        "the last of 4": s.last_of(4),
        "a layer with rotary positions": s.at(rotary=True),
        f"a layer of d_model {2 * s.layer.d_model}": s.at(d_model=2 * s.layer.d_model),
    }
    for name, layer in places.items():
        there = dataclasses.replace(s, layer=layer)
        try:
            mixer, x = there.build(perturb=False), there.input(2, 20)
            y_t, _ = mixer.step(x[:, 0], mixer.init_state(2))
            tensors = {**mixer.state_dict(), "the output": mixer(x), "the output of step": y_t}
        except Exception as error:
            error.add_note(f"as {name}")
            raise
        bad = [n for n, tensor in tensors.items() if not tensor.isfinite().all()]
        if bad:
            fail(f"as {name}, {bad[0]} has NaN or infinite elements at initialisation")
    return ", ".join(places)
