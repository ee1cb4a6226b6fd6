"""Token embedding, pre-norm blocks of a mixer (and an MLP or none), a final norm and a tied head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.config import DataConfig, MLPConfig, ModelConfig
from zoo.kernels.answer_loss import AnswerLoss, answer_loss
from zoo.kernels.embedding_norm import embedding_norm
from zoo.kernels.gather_rows import gather_rows
from zoo.kernels.residual_norm import Kind, ResidualNorm, residual_norm
from zoo.kernels.token_embedding import token_embedding
from zoo.mixers import LayerInfo, Mixer, mixers
from zoo.state import State


class ModelState(NamedTuple):
    """All that a decode carries: each layer's state and, with learned positions, the next position (B,)."""

    layers: tuple[State, ...]
    position: Tensor | None


class MLP(nn.Module):
    """y = W_2 gelu(W_1 x), or y = W_2 (silu(W_1 x) * W_3 x) for SwiGLU (arXiv 2002.05202, eq. 6). x, y (..., D).

    Weights start as N(0, 0.02^2), W_2 as N(0, 0.02^2 / (2 depth)), biases as 0: GPT-2's scheme, which the published
    MQAR runs use. With torch's larger default the branch drowns the embeddings, and attention is slow to find a match.
    """

    def __init__(self, d_model: int, config: MLPConfig, depth: int) -> None:
        super().__init__()
        width = max(1, round(config.expand * d_model))
        self.gated = config.activation == "swiglu"
        self.up = nn.Linear(d_model, 2 * width if self.gated else width)
        self.down = nn.Linear(width, d_model)
        nn.init.normal_(self.up.weight, std=0.02)
        nn.init.normal_(self.down.weight, std=0.02 / math.sqrt(2 * depth))
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gated:
            gate, value = h.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(h))


def feed_forward(d_model: int, config: MLPConfig, depth: int) -> nn.Module:
    """What a block applies to norm(x), position by position."""
    return nn.Identity() if config.activation == "identity" else MLP(d_model, config, depth)


class Block(nn.Module):
    """x <- x + mixer(norm(x)); x <- x + mlp(norm(x)) where there is an MLP.

    With `activation: identity` the second half is x <- x + norm(x): what a block of the published MQAR runs does where
    its MLP is named `Identity`.
    """

    def __init__(self, config: ModelConfig, layer: LayerInfo) -> None:
        super().__init__()
        norm = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
        spec = config.blocks[layer.index]
        self.norm = norm(config.d_model)
        self.mixer: Mixer = mixers.get(spec.mixer)(spec.options, layer)
        self.mlp_norm = norm(config.d_model) if config.mlp else None
        self.mlp = feed_forward(config.d_model, config.mlp, layer.depth) if config.mlp else None

    def feed(self, x: Tensor) -> Tensor:
        """The MLP half, which looks at each position alone."""
        return x if self.mlp is None or self.mlp_norm is None else x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    """A language model whose logits are computed only where an answer is asked.

    Embedding and head share one (V, D) matrix, initialised N(0, 0.02^2) as in GPT-2; mixers initialise themselves.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, max_seq_len: int) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len = max_seq_len
        self.embedding = nn.Embedding(vocabulary, config.d_model)
        self.positions = nn.Embedding(max_seq_len, config.d_model) if config.positions == "learned" else None
        depth = len(config.blocks)
        self.blocks: Sequence[Block] = nn.ModuleList(  # type: ignore[assignment]
            Block(config, LayerInfo(config.d_model, index, depth, max_seq_len, rotary=config.positions == "rotary"))
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(config.d_model) if config.norm == "layer" else nn.RMSNorm(config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)

    def features(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens (B, T), positions (B, Q) -> the head's input at those positions (B, Q, D)."""
        *others, last = self.blocks
        # The first stream is looked up where it is added to: that takes less time than to write and read it.
        lookup = (tokens, self.embedding.weight) if others and self.positions is None else None
        x, normed = self._begin(tokens, lookup is not None)
        for block, after in zip(others, self.blocks[1:], strict=True):
            branch = block.mixer(normed)
            if block.mlp is not None and block.mlp_norm is not None:
                x, normed = _join(x, branch, block.mlp_norm, lookup=lookup)
                branch, lookup = block.mlp(normed), None
            # What follows the last mixer looks at each position alone, so only the asked ones go on.
            x, normed = _join(x, branch, after.norm, positions if after is last else None, lookup)
            lookup = None
        if not others:
            x = gather_rows(x, positions)
        branch = _asked(last.mixer, normed, positions)
        if last.mlp is not None and last.mlp_norm is not None:
            x, normed = _join(x, branch, last.mlp_norm)
            branch = last.mlp(normed)
        return _join(x, branch, self.norm).normed

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """tokens (B, T), positions (B, Q) -> logits (B, Q, V) at those positions."""
        return self.features(tokens, positions) @ self.embedding.weight.T

    def answer(self, tokens: Tensor, positions: Tensor, answers: Tensor, *, predict: bool = True) -> AnswerLoss:
        """tokens (B, T), positions and answers (B, Q) -> loss and prediction of each question (B * Q,)."""
        return self.judge(self.features(tokens, positions), answers, predict=predict)

    def judge(self, features: Tensor, answers: Tensor, *, predict: bool = True) -> AnswerLoss:
        """The head's input (B, Q, D), answers (B, Q), -100 where there is none -> loss and prediction (B * Q,)."""
        return answer_loss(features.flatten(0, 1), self.embedding.weight, answers.flatten(), predict=predict)

    def prefill(self, tokens: Tensor) -> tuple[Tensor, ModelState]:
        """tokens (B, T) -> the head's input at every position (B, T, D), the state after the last."""
        x = self._embed(tokens)
        states = []
        for block in self.blocks:
            y, state = block.mixer.prefill(block.norm(x))
            x = block.feed(x + y)
            states.append(state)
        position = None
        if self.positions is not None:
            position = torch.full_like(tokens[:, 0], tokens.shape[1], dtype=torch.int64)
        return self.norm(x), ModelState(tuple(states), position)

    def init_state(self, batch_size: int, reserve: int = 0) -> ModelState:
        """The state before the first token, with room for `reserve` tokens where it grows and the mixer can do so."""
        device = self.embedding.weight.device
        position = torch.zeros(batch_size, dtype=torch.int64, device=device) if self.positions is not None else None
        layers = (
            block.mixer.reserve(batch_size, reserve) if reserve else block.mixer.init_state(batch_size)
            for block in self.blocks
        )
        return ModelState(tuple(layers), position)

    def step(self, token: Tensor, state: ModelState, at: Tensor | None = None) -> tuple[Tensor, ModelState]:
        """One token a sequence (B,), the state -> the head's input (B, D), the next state.

        at: (1,), how many tokens are in a state that has room for more.
        """
        x = self.embedding(token)
        position = state.position
        if self.positions is not None and position is not None:
            x = x + self.positions(position)
            position = position + 1
        states = []
        for block, before in zip(self.blocks, state.layers, strict=True):
            normed = block.norm(x)
            y, after = block.mixer.step(normed, before) if at is None else block.mixer.step_at(normed, before, at)
            x = block.feed(x + y)
            states.append(after)
        return self.norm(x), ModelState(tuple(states), position)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = token_embedding(tokens, self.embedding.weight)
        return x if self.positions is None else x + self.positions.weight[: tokens.shape[1]]

    def _begin(self, tokens: Tensor, lookup: bool) -> ResidualNorm:
        """The residual stream, or, with lookup, what stands for it, and the first layer's input."""
        norm, table = self.blocks[0].norm, self.embedding.weight
        if self.positions is not None:
            return _join(self._embed(tokens), None, norm)
        bias, kind, eps = _options(norm, table)
        return embedding_norm(tokens, table, norm.weight, bias, kind=kind, eps=eps, lookup=lookup)


def _asked(mixer: Mixer, x: Tensor, positions: Tensor) -> Tensor:
    """mixer(x) at positions (B, Q), (B, Q, D)."""
    y = mixer.forward_at(x, positions)
    return gather_rows(mixer(x), positions) if y is None else y


def _join(
    x: Tensor,
    branch: Tensor | None,
    norm: nn.LayerNorm | nn.RMSNorm,
    positions: Tensor | None = None,
    lookup: tuple[Tensor, Tensor] | None = None,
) -> ResidualNorm:
    """The residual stream x with a layer's output added, and `norm` of it, in one pass over memory on a GPU.

    positions: (B, Q), where the stream is wanted; None: everywhere. lookup: the tokens and the table that x is of.
    """
    bias, kind, eps = _options(norm, x)
    return residual_norm(x, branch, norm.weight, bias, kind=kind, eps=eps, positions=positions, lookup=lookup)


def _options(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor) -> tuple[Tensor | None, Kind, float]:
    """Bias, kind and eps of a norm of x."""
    if isinstance(norm, nn.LayerNorm):
        return norm.bias, "layer", norm.eps
    return None, "rms", torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


def build_model(config: ModelConfig, data: DataConfig, seed: int, device: str | torch.device = "cpu") -> Model:
    """The model of a trial, initialised on the CPU from `seed` alone (the same on every device), then moved.

    Raises ConfigError when a mixer does not fit the model, such as heads that do not divide d_model.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Model(config, data.vocabulary, data.max_seq_len)
    return model.to(device)
