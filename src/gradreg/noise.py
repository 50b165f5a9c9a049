"""Random numbers that belong to a sample: the same in any batch, order, process and on any device."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from gradreg.threat_models import ThreatModel, rows_of


def noise_for(
    x: Tensor,
    threat: ThreatModel,
    seed: int | None,
    index: Tensor | None,
    restart: int = 0,
    rows: Tensor | None = None,
) -> Tensor:
    """Uniform noise in the ball for some samples of the batch, by default all, and 0 for the others."""
    if rows is None and seed is None:
        return threat.sample_like(x)
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    noise = torch.zeros_like(x)
    if seed is None:
        noise[rows] = threat.rows(rows, x).sample_like(x[rows])
        return noise
    positions = torch.arange(x.shape[0]) if index is None else index
    of_sample = rows_of(threat.eps, [0], x) is not threat.eps
    shape = torch.empty_like(x[:1], device="cpu")
    drawn = [
        # On the CPU and one by one: the same numbers on every device and in every batch.
        (threat.rows([row], x) if of_sample else threat).sample_like(shape, generator_of(seed, position, restart))
        for row, position in zip(rows.tolist(), positions[rows.to(positions.device)].tolist(), strict=True)
    ]
    if drawn:
        noise[rows] = torch.cat(drawn).to(x.device)
    return noise


def draws_for(
    draw: Callable[[torch.Generator | None], Tensor], seed: int, index: Tensor | None, count: int, stream: int
) -> Tensor:
    """What ``draw`` makes of every sample's generator, stacked, on the CPU; another stream, other numbers."""
    positions = range(count) if index is None else index.tolist()
    return torch.stack([draw(generator_of(seed, position, stream)) for position in positions])


def generator_of(seed: int | None, position: int, restart: int) -> torch.Generator | None:
    """The generator of one sample's noise: the same in every batch, on every device; None for PyTorch's own."""
    if seed is None:
        return None
    key = hashlib.blake2b(f"{seed}/{position}/{restart}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(key, "big"))
