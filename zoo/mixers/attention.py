"""Softmax attention to everything before: the ceiling of recall, at a state that grows with every token."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ConfigError
from zoo.kernels.attention import causal_attention
from zoo.kernels.projections import projections
from zoo.mixers.base import LayerInfo, Mixer, head_dim
from zoo.mixers.rotary import rotate


class KVCache(NamedTuple):
    """Keys and values seen so far, each (B, tokens, key heads, head dim)."""

    k: Tensor
    v: Tensor


class Attention(Mixer):
    """y_t = W_o [softmax_{s <= t}(q_t^T k_s / sqrt(K)) v_s] per head (arXiv 1706.03762, eq. 1).

    Projections have biases and start as N(0, 0.02^2), the output's as N(0, 0.02^2 / (2 depth)), biases as 0: GPT-2's
    scheme, which the published MQAR runs use. With init="mimetic" (arXiv 2305.09828) products of weights start as those
    of trained models look, near multiples of the identity: W_k is W_q, N(0, 0.4 / K), so that a token attends to its
    like, and W_o is -W_v^T. Two layers with learned positions then find recall in a tenth of the steps.
    """

    class Config(Mixer.Config):
        num_heads: int = Field(1, ge=1, description="Query heads; the published MQAR runs have one.")
        num_kv_heads: int | None = Field(None, ge=1, description="Key heads that the query heads share; None: as many.")
        rotary: bool | None = Field(None, description="Rotary positions; None: as the model has them.")
        init: Literal["gpt2", "mimetic"] = Field("gpt2", description="How the projections start.")

        @model_serializer(mode="wrap")
        def _without_default_init(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
            # Trials from before there was a choice keep their keys.
            return {name: value for name, value in serialize(self).items() if (name, value) != ("init", "gpt2")}

    config: Config

    def __init__(self, config: Config, layer: LayerInfo) -> None:
        super().__init__(config, layer)
        self.rotary = layer.rotary if config.rotary is None else config.rotary
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = head_dim(layer.d_model, config.num_heads)
        if config.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {config.num_heads} is not divisible by num_kv_heads {config.num_kv_heads}; use a divisor."
            )
        if self.rotary and self.head_dim % 2:
            raise ConfigError(
                f"rotary positions need an even head dim, not {self.head_dim} (d_model {layer.d_model} over "
                f"num_heads {config.num_heads}); use other heads, or rotary: false."
            )
        self.qkv = nn.Linear(layer.d_model, (self.num_heads + 2 * self.num_kv_heads) * self.head_dim)
        self.out = nn.Linear(layer.d_model, layer.d_model)
        nn.init.normal_(self.qkv.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02 / math.sqrt(2 * layer.depth))
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)
        if config.init == "mimetic":
            self._start_mimetic()

    @torch.no_grad()
    def _start_mimetic(self) -> None:
        keys, sharing = self.num_kv_heads, self.num_heads // self.num_kv_heads
        q, k, v = self.qkv.weight.unflatten(0, (-1, self.head_dim)).split([self.num_heads, keys, keys])
        nn.init.normal_(q, std=math.sqrt(0.4 / self.head_dim))
        # Of the query heads that share a key head, the first.
        k.copy_(q[::sharing])
        self.out.weight.copy_(-v.repeat_interleave(sharing, dim=0).flatten(0, 1).T)

    @property
    def window(self) -> int | None:
        """How many keys a query sees, itself among them; None: all."""
        return None

    @property
    def state_horizon(self) -> int | None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.attend(self.turn(q), self.turn(k), v)

    def forward_at(self, x: Tensor, positions: Tensor) -> Tensor | None:
        # The fused kernel of a GPU takes all queries, and `rotate` consecutive positions.
        if self.rotary or x.is_cuda:
            return None
        queries = self.num_heads * self.head_dim
        weight_q, weight_kv = self.qkv.weight.tensor_split([queries])
        bias_q, bias_kv = self.qkv.bias.tensor_split([queries])
        asked = x.gather(1, positions[..., None].expand(-1, -1, x.shape[2]))
        q = F.linear(asked, weight_q, bias_q).unflatten(-1, (self.num_heads, -1))
        k, v = F.linear(x, weight_kv, bias_kv).unflatten(-1, (2, self.num_kv_heads, -1)).unbind(2)
        return self.out(causal_attention(q, k, v, window=self.window, positions=positions).flatten(2))

    def init_state(self, batch_size: int) -> KVCache:
        nothing = self.qkv.weight.new_empty(batch_size, 0, self.num_kv_heads, self.head_dim)
        return KVCache(nothing, nothing)

    def step(self, x_t: Tensor, state: KVCache) -> tuple[Tensor, KVCache]:
        y, state = self.prefill(x_t[:, None], state)
        return y[:, 0], state

    def prefill(self, x: Tensor, state: KVCache | None = None) -> tuple[Tensor, KVCache]:
        before = self.init_state(len(x)) if state is None else state
        q, k, v = self.project(x)
        # Cached keys are turned already: the next position is the length of the cache.
        start = before.k.shape[1]
        cache = KVCache(torch.cat([before.k, self.turn(k, start)], dim=1), torch.cat([before.v, v], dim=1))
        return self.attend(self.turn(q, start), cache.k, cache.v), cache

    def reserve(self, batch_size: int, tokens: int) -> KVCache:
        zeros = self.qkv.weight.new_zeros(batch_size, tokens, self.num_kv_heads, self.head_dim)
        return KVCache(zeros, zeros)

    def step_at(self, x_t: Tensor, state: KVCache, position: Tensor) -> tuple[Tensor, KVCache]:
        q, k, v = self.project(x_t[:, None])
        tokens = torch.arange(state.k.shape[1], device=k.device)
        here = (tokens == position)[:, None, None]
        cache = KVCache(torch.where(here, self.turn(k, position), state.k), torch.where(here, v, state.v))
        # Not torch's fused attention, which takes no mask in a pack.
        q_BGHK = self.turn(q, position).view(len(q), self.num_kv_heads, -1, self.head_dim)
        k_BGTK, v_BGTK = (x.transpose(1, 2) for x in cache)
        scores_BGHT = (q_BGHK * self.head_dim**-0.5 @ k_BGTK.mT).masked_fill(tokens > position, -math.inf)
        return self.out((scores_BGHT.softmax(-1) @ v_BGTK).flatten(1)), cache

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> q (B, T, H, K), k and v (B, T, G, K)."""
        sizes = [heads * self.head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        if x.is_cuda:
            # A result each, whose gradients need not be put together.
            parts = projections(x, *self.qkv.weight.split(sizes), biases=self.qkv.bias.split(sizes))
        else:
            parts = self.qkv(x).split(sizes, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return q, k, v

    def turn(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """Queries or keys at positions start, start + 1, ... with rotary positions, where there are any."""
        return rotate(x, start) if self.rotary else x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out(causal_attention(q, k, v, window=self.window).flatten(2))
