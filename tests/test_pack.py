"""Packs: trials that train together get what they would get alone."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from test_train import comparable, trial
from torch import nn
from torch.nn import functional as F

import zoo.executors
import zoo.mixers.attention
import zoo.train
from zoo.config import Sweep
from zoo.errors import ConfigError, DeviceLostError
from zoo.evaluate import load_slices
from zoo.executors import Job, Setting, execute
from zoo.fit import mean_loss
from zoo.kernels.adamw import adamw, bias_corrections
from zoo.mixers import LayerInfo, Mixer
from zoo.model import Model, build_model
from zoo.optimizer import Moments, OneByOne, Stacked, decayed
from zoo.pack import Pack
from zoo.state import State
from zoo.sweep import make_packs, parse_shard, plan_sweep, run_sweep
from zoo.train import run_pack, run_trial


def test_a_pack_gives_each_member_the_bits_it_gets_alone() -> None:
    trials = [trial(optimizer={"lr": lr, "weight_decay": decay}, seed=seed) for lr, decay, seed in [
        (1e-2, 0.1, 0), (3e-3, 0.1, 0), (1e-2, 0.0, 0), (1e-2, 0.1, 1), (1e-2, 0.1, 2),
    ]]  # fmt: skip
    together = run_pack(trials)
    assert [comparable(outcome) for outcome in together] == [comparable(run_trial(one)) for one in trials]
    assert len({outcome.history[-1].train_loss for outcome in together}) == len(trials)


def test_members_that_end_early_leave_the_others_as_they_are() -> None:
    def one(lr: float, **training: Any) -> Any:
        return trial(optimizer={"lr": lr, "clip": None}, training={"epochs": 4, **training})

    heard: list[tuple[int, int]] = []
    outcomes = run_pack([one(1e30), one(1e-2), one(1e29)], on_epoch=lambda i, epoch: heard.append((i, epoch.epoch)))
    assert [outcome.status for outcome in outcomes] == ["diverged", "ok", "diverged"]
    assert comparable(outcomes[1]) == comparable(run_trial(one(1e-2)))
    assert [epoch for i, epoch in heard if i == 1] == [0, 1, 2, 3]

    # The accuracy that the better of two reaches after its second epoch, and the other never.
    history = {lr: [e.validation_accuracy for e in run_trial(one(lr)).history] for lr in (1e-2, 1e-5)}
    enough = history[1e-2][1]
    assert enough > max(history[1e-5] + history[1e-2][:1])
    fast, slow = run_pack([one(1e-2, stop_accuracy=enough), one(1e-5, stop_accuracy=enough)])
    assert (len(fast.history), len(slow.history)) == (2, 4)
    assert comparable(fast) == comparable(run_trial(one(1e-2, stop_accuracy=enough)))


class Plain(Mixer):
    """A mixer as an author writes it who has never heard of packs."""

    def __init__(self, d_model: int) -> None:
        super().__init__(Mixer.Config(), LayerInfo(d_model))
        self.mix = torch.nn.Linear(d_model, d_model)
        self.register_buffer("scale", torch.rand(d_model))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.mix(x) * self.scale).cumsum(1) / torch.arange(1, 1 + x.shape[1])[:, None]

    def init_state(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scale.new_zeros(batch_size, len(self.scale)), self.scale.new_zeros(batch_size, 1)

    def step(self, x_t: torch.Tensor, state: State) -> tuple[torch.Tensor, State]:
        total, count = state[0] + F.silu(self.mix(x_t) * self.scale), state[1] + 1
        return total / count, (total, count)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("mixer", ["attention", "based", "delta_net", "retnet", "plain"])
def test_a_batched_pack_computes_what_its_members_compute(mixer: str) -> None:
    config = trial(model={"layers": ["gated_conv", mixer if mixer != "plain" else "attention"]})
    models = [build_model(config.model, config.data, seed).double() for seed in range(3)]
    if mixer == "plain":
        for seed, model in enumerate(models):
            torch.manual_seed(seed)
            model.blocks[1].mixer = Plain(16).double()
    part = load_slices(config.data.train, 0, "train", "cpu")[0]
    inputs = [x[:12].unflatten(0, (3, 4)) for x in part[1:]]

    def loss(model: Model, tokens: torch.Tensor, positions: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(tokens, positions).flatten(0, 1), answers.flatten())

    one_by_one = Pack(models, batched=False)
    expected = one_by_one.gradients(mean_loss, *inputs)
    pack = Pack(models, batched=True)
    torch.testing.assert_close(pack.gradients(loss, *inputs), expected, rtol=1e-9, atol=1e-9)
    for stack, rows in zip(pack.gradient_stacks.values(), zip(*one_by_one.gradient_lists, strict=True), strict=True):
        torch.testing.assert_close(stack, torch.stack(rows), rtol=1e-8, atol=1e-10)
    # The models are the pack's members: a change of one is a change of the other.
    with torch.no_grad():
        models[1].embedding.weight.zero_()
    changed = pack.call(loss, *inputs)
    assert changed[1] != expected[1]
    torch.testing.assert_close(changed[[0, 2]], expected[[0, 2]], rtol=1e-9, atol=1e-9)


GRID = {**trial().model_dump(mode="json"), "optimizer": {"lr": [0.01, 0.02, 0.03]}, "seed": [0, 1]}


def test_a_sweep_packs_what_differs_in_learning_rate_and_seed_alone(tmp_path: Any) -> None:
    sweep = Sweep.from_dict({**GRID, "model": {"d_model": [16, 32], "layers": ["gated_conv"]}})
    packs = make_packs(plan_sweep(sweep, tmp_path), size=4)
    assert sorted(len(pack) for pack in packs) == [2, 2, 4, 4]
    costs = [sum(job.cost for job in pack) for pack in packs]
    assert costs == sorted(costs, reverse=True)
    for pack in packs:
        assert len({job.trial["model"]["d_model"] for job in pack}) == 1
    shards = [make_packs(plan_sweep(sweep, tmp_path), 4, (k, 3)) for k in (1, 2, 3)]
    assert sorted(job.key for shard in shards for pack in shard for job in pack) == sorted(t.key for t in sweep.trials)
    with pytest.raises(ConfigError, match="shard 5/4 is none"):
        run_sweep(sweep, tmp_path, shard=parse_shard("5/4"))
    with pytest.raises(ConfigError, match="'2' is not of the form K/N"):
        parse_shard("2")
    with pytest.raises(ConfigError, match="pack 0 must be at least 1"):
        run_sweep(sweep, tmp_path, pack=0)


def test_packs_leave_the_same_records(tmp_path: Any) -> None:
    sweep = Sweep.from_dict(GRID)
    runs = [run_sweep(sweep, tmp_path / str(n), executor="inline", pack=n, progress=False) for n in (1, 6)]
    alone, together = ({record.key: record for record in run.done} for run in runs)
    assert alone.keys() == together.keys()
    for key, record in alone.items():
        assert comparable(record.outcome) == comparable(together[key].outcome)
    assert {record.provenance.pack for record in together.values()} == {6}


def test_a_pack_that_raises_falls_apart_and_the_guilty_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(config: Any, data: Any, seed: int, device: str = "cpu") -> Model:
        if seed == 1:
            raise RuntimeError("not with this seed")
        return build_model(config, data, seed, device)

    monkeypatch.setattr(zoo.train, "build_model", build)
    records = execute(tuple(Job.of(trial(seed=seed)) for seed in range(3)), Setting())
    assert [record.status for record in records] == ["ok", "failed", "ok"]
    assert records[1].failure is not None
    assert records[1].failure.message == "not with this seed"


def test_what_a_failed_pack_held_is_free_when_its_halves_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        pass

    held: weakref.WeakSet[Held] = weakref.WeakSet()
    seen = []

    def run(trials: Any, **options: Any) -> Any:
        seen.append((len(trials), len(held)))
        here = Held()
        held.add(here)
        if len(trials) > 1:
            raise MemoryError("too many")
        return run_pack(trials, **options)

    monkeypatch.setattr(zoo.train, "run_pack", run)
    records = execute(tuple(Job.of(trial(seed=seed)) for seed in range(3)), Setting())
    assert [record.status for record in records] == ["ok", "ok", "ok"]
    assert seen == [(3, 0), (1, 0), (2, 0), (1, 0), (1, 0)]


def test_a_device_that_is_lost_ends_the_sweep_and_costs_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*args: Any) -> None:
        raise DeviceLostError("cuda no longer works")

    def run(trials: Any, **options: Any) -> Any:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(zoo.executors, "_release_memory", lost)
    monkeypatch.setattr(zoo.train, "run_pack", run)
    with pytest.raises(DeviceLostError):
        execute((Job.of(trial()),), Setting())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_autocast_reaches_a_batched_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    attend = zoo.mixers.attention.causal_attention

    def watched(q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(q.dtype)
        return attend(q, *args, **options)

    monkeypatch.setattr(zoo.mixers.attention, "causal_attention", watched)
    config = trial()
    models = [build_model(config.model, config.data, seed) for seed in range(2)]
    part = load_slices(config.data.train, 0, "train", "cpu")[0]
    losses = []
    for batched in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            inputs = (x[:8].unflatten(0, (2, 4)) for x in part[1:3])
            losses.append(Pack(models, batched=batched).call(Model.forward, *inputs).float())
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("clip", [None, 1e-2])
def test_a_pack_takes_the_steps_of_torchs_optimizer(clip: float | None, batched: bool) -> None:
    configs = [trial(optimizer={"lr": lr, "weight_decay": w, "clip": clip}) for lr, w in ((1e-2, 0.5), (3e-3, 0.0))]
    models = [build_model(c.model, c.data, seed) for seed, c in enumerate(configs)]
    twins = [build_model(c.model, c.data, seed) for seed, c in enumerate(configs)]
    theirs = []
    for twin, config in zip(twins, configs, strict=True):
        groups = [
            {"params": [p for name, p in twin.named_parameters() if (name in decayed(twin)) == yes], "weight_decay": w}
            for yes, w in ((True, config.optimizer.weight_decay), (False, 0.0))
        ]
        theirs.append(torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=1e-8))
    moments: list[Moments] = [{}, {}]
    for done in range(4):
        # A new pack each time takes up the moments of the last.
        pack = Pack(models, batched=batched)
        optimizer = (Stacked if batched else OneByOne)(pack, [c.optimizer for c in configs], moments, done)
        draw = torch.Generator().manual_seed(done)
        for twin in twins:
            for parameter in twin.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
        names = dict(twins[0].named_parameters())
        pack.gradient_stacks = {name: torch.stack([t.get_parameter(name).grad for t in twins]) for name in names}
        pack.gradient_lists = [tuple(p.grad.clone() for p in twin.parameters()) for twin in twins]
        rates = torch.tensor([1e-2, 3e-3]) / (1 + done)
        optimizer.step(rates, optimizer.advance())
        for twin, adamw_, rate in zip(twins, theirs, rates.tolist(), strict=True):
            if clip is not None:
                nn.utils.clip_grad_norm_(twin.parameters(), clip)
            for group in adamw_.param_groups:
                group["lr"] = rate
            adamw_.step()
    for model, twin in zip(models, twins, strict=True):
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_the_fused_optimizer_is_the_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, 41, 30), (3, 5), (3, 1), (3, 2, 1024)]
    stacks = [[torch.randn(shape, generator=draw) for shape in shapes] for _ in range(4)]
    stacks[3] = [square.abs() for square in stacks[3]]
    rates, decays, scale = (torch.rand(3, generator=draw) for _ in range(3))
    betas = torch.tensor([0.9, 0.99], dtype=torch.float64)
    remaining, results = bias_corrections(betas.log(), torch.tensor([2.0], dtype=torch.float64)), []
    torch.testing.assert_close(remaining, 1 - betas.square())
    for impl in ("reference", "triton"):
        p, g, m, v = ([t.clone() for t in tensors] for tensors in stacks)
        decayed = (True, False, True, False)
        adamw(p, g, m, v, decayed, rates, decays, remaining, scale, betas=(0.9, 0.99), eps=1e-8, impl=impl)
        results.append((*p, *m, *v))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
