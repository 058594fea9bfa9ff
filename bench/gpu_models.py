"""The models of `bench.bench_gpu`: a small network that is bound by kernel launches, and GPT-2 in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

__all__ = ["GPT2", "Shape", "language_loss", "mlp"]


def mlp(*widths: int) -> nn.Sequential:
    """Return a network of linear layers with ReLUs between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT-2 (https://github.com/openai/gpt-2).

    The defaults are the sizes of the smallest model, with 124 million parameters; the vocabulary is rounded up to a
    multiple of 64.
    """

    vocabulary: int = 50304
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768


class Block(nn.Module):
    """A residual block: attention and a two-layer network, each with a layer norm before it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.norm_attention, self.norm_hidden = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.queries_keys_values = nn.Linear(shape.width, 3 * shape.width)
        self.mix = nn.Linear(shape.width, shape.width)
        inner = 4 * shape.width
        self.hidden = nn.Sequential(
            nn.Linear(shape.width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, shape.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, context, width)`` to the same shape."""
        batch, context, width = x.shape
        parts = self.queries_keys_values(self.norm_attention(x)).split(width, dim=2)
        q, k, v = (part.view(batch, context, self.heads, width // self.heads).transpose(1, 2) for part in parts)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).reshape(batch, context, width))
        out: Tensor = x + self.hidden(self.norm_hidden(x))
        return out


class GPT2(nn.Module):
    """The decoder without dropout, whose output layer shares its weight with the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position, of shape ``(batch, context, vocabulary)``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))
        return logits


def language_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy over all positions of all texts."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten())
