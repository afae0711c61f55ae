"""A small decoder-only transformer whose `forward` cannot be recorded: masks and rotary tables follow the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pipebd.runtime.partition import CallableBlock

__all__ = ["Decoder", "decoder_blocks"]


class DecoderLayer(nn.Module):
    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, hidden: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        num_rows, length, width = hidden.shape
        parts = self.mix(self.norm(hidden)).view(num_rows, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key = (part * rotary[0] + part.flip(-1) * rotary[1] for part in parts[:2])
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, parts[2], attn_mask=mask, dropout_p=dropout)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(num_rows, length, width))
        output: Tensor = hidden + self.feed(hidden)
        return output


class Decoder(nn.Module):
    def __init__(self, *, num_layers: int = 3, width: int = 16, num_heads: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.head_width = width // num_heads
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleList(DecoderLayer(width, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        length = tokens.shape[1]
        if length > 64:
            msg = "too long"
            raise ValueError(msg)
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        angles = torch.outer(torch.arange(length), 0.5 ** torch.arange(self.head_width)).to(tokens.device)
        return self.embedding(tokens), mask, (angles.cos(), angles.sin())

    def forward(self, tokens: Tensor) -> Any:
        hidden, mask, rotary = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden, mask, rotary)
        return self.head(self.norm(hidden))


def decoder_blocks(model: Decoder) -> list[nn.Module]:
    """Give one block per layer; the first embeds too, the last ends the model."""

    def first(tokens: Tensor) -> Any:
        hidden, mask, rotary = model.embed(tokens)
        return model.layers[0](hidden, mask, rotary), mask, rotary

    def last(hidden: Tensor, mask: Tensor, rotary: Any) -> Any:
        return model.head(model.norm(model.layers[-1](hidden, mask, rotary)))

    blocks: list[nn.Module] = [CallableBlock(first, [model.embedding, model.layers[0]])]
    for layer in list(model.layers)[1:-1]:

        def middle(hidden: Tensor, mask: Tensor, rotary: Any, layer: nn.Module = layer) -> Any:
            return layer(hidden, mask, rotary), mask, rotary

        blocks.append(CallableBlock(middle, [layer]))
    return [*blocks, CallableBlock(last, [model.layers[-1], model.norm, model.head])]
