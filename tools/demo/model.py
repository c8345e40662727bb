"""The ChatGLM3 block structure in PyTorch, for training and for checking the trained weights.

Parameter names are those of the checkpoint, so `state_dict()` is the checkpoint. Rotary embedding turns the first
half of every head in adjacent pairs (2i, 2i+1); q, k, v have biases and nothing else has; query head j reads group
j // (heads / groups).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDED_VOCAB = 4608


@dataclass(frozen=True)
class Size:
    """One row of the size table; field names are those of config.json."""

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    multi_query_group_num: int
    kv_channels: int
    ffn_hidden_size: int
    seq_length: int = 2048
    padded_vocab_size: int = PADDED_VOCAB
    layernorm_epsilon: float = 1e-5

    @property
    def qkv_rows(self) -> int:
        return (self.num_attention_heads + 2 * self.multi_query_group_num) * self.kv_channels


SIZES = {
    "small": Size(256, 5, 4, 2, 64, 640),
    "large": Size(512, 8, 8, 2, 64, 1408),
}


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def inverse_frequencies(size: Size) -> Tensor:
    """Angle per position of each rotated pair, float32 [kv_channels / 4]."""
    rotary_dim = size.kv_channels // 2
    return 10000.0 ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


def rotary_table(size: Size) -> Tensor:
    """cos and sin of every position, float32 [2, seq_length, kv_channels / 4]."""
    angle = torch.outer(torch.arange(size.seq_length, dtype=torch.float32), inverse_frequencies(size))
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the first half of each head of x [batch, heads, length, kv_channels].

    `table` is [2, length, kv_channels / 4], or [2, batch, 1, length, kv_channels / 4] for positions of each row.
    """
    half = x.shape[-1] // 2
    a, b = x[..., 0:half:2], x[..., 1:half:2]
    cos, sin = table[0], table[1]
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., half:]], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax in float32 over q k^T / sqrt(kv_channels) + mask; q, k, v [batch, heads, length, kv_channels].

    Written out: at a poem's length torch's fused kernel takes three times as long, forward and backward, on the CPU.
    """
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5 + mask
    return scores.softmax(-1).to(q.dtype) @ v


class SelfAttention(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        self.query_key_value = nn.Linear(size.hidden_size, size.qkv_rows, bias=True)
        self.dense = nn.Linear(size.num_attention_heads * size.kv_channels, size.hidden_size, bias=False)

    def forward(self, x: Tensor, table: Tensor, cache: list[Tensor] | None, mask: Tensor) -> Tensor:
        s, (batch, length, _) = self.size, x.shape
        heads, groups = s.num_attention_heads, s.multi_query_group_num
        qkv = self.query_key_value(x).view(batch, length, heads + 2 * groups, s.kv_channels).transpose(1, 2)
        q, k, v = qkv.split([heads, groups, groups], dim=1)
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            cache[:] = [torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)] if cache else [k, v]
            k, v = cache
        k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
        out = attention(q, k, v, mask)
        return self.dense(out.transpose(1, 2).reshape(batch, length, heads * s.kv_channels))


class MLP(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(size.hidden_size, 2 * size.ffn_hidden_size, bias=False)
        self.dense_4h_to_h = nn.Linear(size.ffn_hidden_size, size.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(x).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, size: Size):
        super().__init__()
        self.input_layernorm = RMSNorm(size.hidden_size, size.layernorm_epsilon)
        self.self_attention = SelfAttention(size)
        self.post_attention_layernorm = RMSNorm(size.hidden_size, size.layernorm_epsilon)
        self.mlp = MLP(size)

    def forward(self, x: Tensor, table: Tensor, cache: list[Tensor] | None, mask: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x), table, cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class ChatGLM3(nn.Module):
    """Token ids [batch, length] to hidden states and logits; under autocast the residual stream stays float32."""

    def __init__(self, size: Size):
        super().__init__()
        self.size = size
        layers = nn.ModuleList(Block(size) for _ in range(size.num_layers))
        final = RMSNorm(size.hidden_size, size.layernorm_epsilon)
        words = nn.Embedding(size.padded_vocab_size, size.hidden_size)
        self.transformer = nn.ModuleDict(
            {
                "embedding": nn.ModuleDict({"word_embeddings": words}),
                "encoder": nn.ModuleDict({"layers": layers, "final_layernorm": final}),
                "output_layer": nn.Linear(size.hidden_size, size.padded_vocab_size, bias=False),
            }
        )
        self.register_buffer("rotary", rotary_table(size), persistent=False)
        self.initialize()

    def initialize(self) -> None:
        """Normal 0.02, zero biases; projections onto the residual stream are scaled by 1 / sqrt(2 * layers)."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                writes = name.endswith(("dense.weight", "dense_4h_to_h.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.size.num_layers) ** 0.5 if writes else 0.02)

    def hidden(
        self,
        ids: Tensor,
        caches: list[list[Tensor]] | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Normalized hidden states [batch, length, hidden]. Without `caches` rows are causal from position 0.

        With `caches` (one list per layer, filled in place) `positions` [batch, length] are those of `ids`, and `mask`
        (float32, 0 or -inf, [batch, 1, length, past + length]) says what each row sees.
        """
        length = ids.shape[1]
        if mask is None:
            mask = torch.full((length, length), -torch.inf).triu(1)
        table = self.rotary[:, :length] if positions is None else self.rotary[:, positions].unsqueeze(2)
        x = self.transformer["embedding"]["word_embeddings"](ids)
        for index, block in enumerate(self.transformer["encoder"]["layers"]):
            x = block(x, table, None if caches is None else caches[index], mask)
        return self.transformer["encoder"]["final_layernorm"](x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.transformer["output_layer"](hidden)
