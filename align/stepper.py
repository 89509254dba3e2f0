"""One token a row through a Llama-like decoder on a CPU, without what a general forward pays for every call.

Token by token, hundreds of small operations cost as much as the products between them. Here the activations stand as
columns, so that the weights are the left factor of every product and nothing is rearranged; queries that share a key
meet it in one product; keys and values lie in one block with room for the whole answer. The numbers are those of the
model's own forward to rounding: `align.decode` compares the two, once for each model, before it relies on this.

Shapes: B rows, H hidden size, S positions held so far, R rows' room, D head size, K key heads, G queries a key head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align.logprobs import base_model

# Decoders whose layers are: norm, attention with rotary positions, norm, gated MLP with SiLU; nothing else.
DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")


class Stepper:
    """What the model holds of `B` rows between two tokens.

    Args:
        cache: the model's own cache after it has read the prompts, every row's padded left.
        attention_BS: 1 where a position is real.
        room: how many tokens are to come at most.
    """

    def __init__(self, model: Any, cache: Any, attention_BS: Tensor, room: int) -> None:
        decoder = base_model(model).get_decoder()
        self.decoder, self.layers = decoder, [_Layer(layer) for layer in decoder.layers]
        self.size, padded = attention_BS.shape[1], not bool(attention_BS.all())
        bias_BS = torch.zeros(attention_BS.shape, dtype=torch.float32, device=attention_BS.device)
        self.bias_B1S = bias_BS.masked_fill_(attention_BS == 0, -torch.inf)[:, None] if padded else None
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for held in cache.layers:
            for blocks, values_BKSD in ((self.keys, held.keys), (self.values, held.values)):
                rows, heads, size, width = values_BKSD.shape
                block_BKRD = values_BKSD.new_empty((rows, heads, size + room, width))
                block_BKRD[:, :, :size] = values_BKSD
                blocks.append(block_BKRD)
            held.keys = held.values = None  # the model's cache is not needed any more; twice would be too much

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        for blocks in (self.keys, self.values):
            for i, block_BKRD in enumerate(blocks):
                smaller = block_BKRD.new_empty((len(rows), *block_BKRD.shape[1:]))
                smaller[:, :, : self.size] = block_BKRD[rows, :, : self.size]
                blocks[i] = smaller
        if self.bias_B1S is not None:
            self.bias_B1S = self.bias_B1S[rows]

    def step(self, token_B: Tensor, position_B: Tensor) -> Tensor:
        """Hidden states BH, after the decoder's last norm, of the next token of every row at its position."""
        embedded_BH = self.decoder.embed_tokens(token_B)
        cos_B1D, sin_B1D = self.decoder.rotary_emb(embedded_BH, position_ids=position_B[:, None])
        rotation = _Rotation(cos_B1D[:, 0].T, sin_B1D[:, 0].T)
        hidden_HB = embedded_BH.T.contiguous()
        for i, layer in enumerate(self.layers):
            hidden_HB = hidden_HB + self._attended(i, layer, _normed(layer.before_attention, hidden_HB), rotation)
            hidden_HB += layer.mlp(_normed(layer.before_mlp, hidden_HB))
        self.size += 1
        return _normed(self.decoder.norm, hidden_HB).T

    def _attended(self, i: int, layer: _Layer, x_HB: Tensor, rotation: _Rotation) -> Tensor:
        rows, size = x_HB.shape[1], self.size
        query_NDB, key_KDB, value_KDB = layer.projected(x_HB)
        key_block_BKRD, value_block_BKRD = self.keys[i], self.values[i]
        key_block_BKRD[:, :, size] = rotation(key_KDB).permute(2, 0, 1)
        value_block_BKRD[:, :, size] = value_KDB.permute(2, 0, 1)
        heads, room, width = key_block_BKRD.shape[1:]
        query_BGD = rotation(query_NDB).mul_(layer.scaling).permute(2, 0, 1).reshape(rows * heads, -1, width)
        key_BSD, value_BSD = (
            block.view(rows * heads, room, width)[:, : size + 1] for block in (key_block_BKRD, value_block_BKRD)
        )
        scores_BGS = torch.bmm(query_BGD, key_BSD.transpose(1, 2))
        if self.bias_B1S is not None:
            known = self.bias_B1S.shape[-1]
            scores_BGS.view(rows, -1, size + 1)[:, :, :known] += self.bias_B1S.to(scores_BGS.dtype)
        weights_BGS = torch.softmax(scores_BGS, -1)
        return layer.output(torch.bmm(weights_BGS, value_BSD).view(rows, -1).T)


def supported(model: Any) -> bool:
    """Whether `Stepper` knows the model's layers as they are now: on a CPU, adapters folded in or off, no window."""
    base = base_model(model)
    decoder = base.get_decoder()
    if type(decoder).__name__ not in DECODERS or type(decoder).__module__.split(".")[0] != "transformers":
        return False
    config = decoder.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = type(decoder).__name__ == "MistralModel" and config.sliding_window is not None
    if windowed or kinds != {"full_attention"} or config.hidden_act != "silu" or torch.is_autocast_enabled("cpu"):
        return False
    weights = [p for p in decoder.parameters() if p.device.type != "cpu" or hasattr(p, "ds_id")]
    return not weights and all(_is_known(module) for layer in decoder.layers for module in _products(layer))


def _products(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    names = ((attention, "qkvo"), (mlp, ("gate", "up", "down")))
    return [getattr(owner, f"{name}_proj") for owner, own in names for name in own]


def _is_known(module: Any) -> bool:
    base = _base(module)
    if type(base) is not nn.Linear or base._forward_hooks or base._forward_pre_hooks:
        return False
    return module is base or module.merged or module.disable_adapters


def _base(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


class _Layer:
    """A decoder layer's weights."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.before_attention, self.before_mlp = layer.input_layernorm, layer.post_attention_layernorm
        self.query_norm, self.key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.scaling, self.width = attention.scaling, attention.head_dim
        products = [_base(module) for module in _products(layer)]
        self.query, self.key, self.value, self.out, self.gate, self.up, self.down = products

    def projected(self, x_HB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, heads x D x B."""
        query, key, value = (
            _product(product, x_HB).unflatten(0, (-1, self.width)) for product in (self.query, self.key, self.value)
        )
        if self.query_norm is not None:
            query, key = _normed(self.query_norm, query, dim=1), _normed(self.key_norm, key, dim=1)
        return query, key, value

    def output(self, x_HB: Tensor) -> Tensor:
        return _product(self.out, x_HB)

    def mlp(self, x_HB: Tensor) -> Tensor:
        gate_IB = nn.functional.silu(_product(self.gate, x_HB))
        return _product(self.down, gate_IB.mul_(_product(self.up, x_HB)))


def _product(linear: nn.Linear, x_IB: Tensor) -> Tensor:
    y_OB = linear.weight @ x_IB
    return y_OB if linear.bias is None else y_OB.add_(linear.bias[:, None])


def _normed(norm: Any, x: Tensor, dim: int = 0) -> Tensor:
    """RMSNorm over `dim`, in f32 as the models' own."""
    values = x.float()
    scale = values.square().mean(dim, keepdim=True).add_(norm.variance_epsilon).rsqrt_()
    return (values * scale).to(x.dtype).mul_(norm.weight.view(-1, *[1] * (x.ndim - 1 - dim)))


class _Rotation:
    """Rotary positions of B tokens, for heads x D x B."""

    def __init__(self, cos_DB: Tensor, sin_DB: Tensor) -> None:
        half = len(cos_DB) // 2
        self.cos_DB, self.sin_DB = cos_DB.contiguous(), torch.cat([-sin_DB[:half], sin_DB[half:]])

    def __call__(self, x_NDB: Tensor) -> Tensor:
        return (x_NDB * self.cos_DB).addcmul_(x_NDB.roll(x_NDB.shape[1] // 2, 1), self.sin_DB)
