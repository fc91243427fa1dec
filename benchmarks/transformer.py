"""A transformer and its training step on a CUDA device, for benchmarks."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """One layer of a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = width // 64

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and the layers behind it."""
        b, t, c = x.shape
        q, k, v = self.mix(self.first(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(nn.functional.gelu(self.up(self.second(x))))


class Transformer:
    """A training step of a realistic shape."""

    def __init__(self, layers: int, width: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Block(width) for _ in range(layers))).cuda()
        self.optim = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.x = torch.randn(batch, 1024, width, device="cuda")

    def step(self) -> None:
        """Forward, backward, optimizer."""
        with torch.autocast("cuda", torch.bfloat16):
            loss = (self.model(self.x) - self.x).square().mean()
        loss.backward()
        self.optim.step()
        self.optim.zero_grad()

    def bytes(self) -> int:
        """Of parameters and optimizer state."""
        state = [t for held in self.optim.state.values() for t in held.values()]
        return sum(t.nbytes for t in [*self.model.parameters(), *state])
