r"""GradNorm training with Lightning Fabric: a robust classifier of the digits of `quickstart.py`.

    python examples/with_fabric.py                                          # with --weight 0: natural training
    python examples/with_fabric.py --accelerator cpu --devices 2            # two processes, DistributedDataParallel
    python examples/with_fabric.py --precision bf16-mixed

Model and objective go through ``fabric.setup`` as one module, a PenalizedModel: DistributedDataParallel and autocast,
which Fabric puts around its forward pass, then hold the input gradient too. With the model alone, Fabric takes it for
the backward pass of the step, and raises in mixed precision.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradreg import GradNormPenalty, Linf, PenalizedLoss, PenalizedModel, PGDAttack, Term, evaluate, linear_ramp

from quickstart import BATCH_SIZE, CROSS_ENTROPY, EPS, build_model, load_digits


def train(fabric: Fabric, x: Tensor, y: Tensor, steps: int, weight: float, inner_scale: float) -> nn.Module:
    """A model trained for a number of steps of BATCH_SIZE images, which the processes share."""
    torch.manual_seed(0)
    objective = PenalizedLoss(
        CROSS_ENTROPY,
        {"grad_norm": Term(GradNormPenalty(Linf(EPS)), weight=linear_ramp(weight, duration=max(steps // 3, 1)))},
        inner_scale=inner_scale,
    )
    penalized = PenalizedModel(build_model("gelu"), objective)
    optimizer = torch.optim.AdamW(penalized.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    # Fabric gives each process its share of the images, in batches of this size.
    loader = DataLoader(TensorDataset(x, y), BATCH_SIZE // fabric.world_size, shuffle=True, drop_last=True)
    penalized, optimizer = fabric.setup(penalized, optimizer)
    loader = fabric.setup_dataloaders(loader)
    t = 0
    while t < steps:
        for batch_x, batch_y in loader:
            out = penalized(batch_x, batch_y, t=t)
            optimizer.zero_grad()
            fabric.backward(out.total)
            # Takes the factor of float16's scaler out before it clips. The scaler skips a step whose gradients are
            # not finite, as its first ones often are; by default Fabric raises there.
            fabric.clip_gradients(penalized, optimizer, max_norm=1.0, error_if_nonfinite=False)
            optimizer.step()
            schedule.step()
            t += 1
            if t % 50 == 0:
                penalties = {name: round(value.mean().item(), 3) for name, value in out.penalties.items()}
                fabric.print(f"step {t}: loss {out.loss.item():.3f}, {penalties}")
            if t == steps:
                break
    return penalized.module.model  # neither DDP nor autocast around it


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--weight", type=float, default=3.0, help="of the penalty; 0 trains naturally")
    parser.add_argument("--accelerator", default="auto", help="of Fabric: cpu, gpu, ...")
    parser.add_argument("--devices", type=int, default=1, help="number of processes")
    parser.add_argument("--precision", default="32-true", help="of Fabric: 32-true, bf16-mixed or, on a GPU, 16-mixed")
    parser.add_argument("--images", type=int, default=300, help="test images to evaluate on")
    parser.add_argument("--output", type=Path, help="file for the weights")
    args = parser.parse_args(argv)
    strategy = "ddp" if args.devices > 1 else "auto"
    fabric = Fabric(accelerator=args.accelerator, devices=args.devices, strategy=strategy, precision=args.precision)
    fabric.launch()
    train_x, train_y, x, y = load_digits("test")
    # Keeps small input gradients from flushing to 0 in float16. The gradients of the weights have Fabric's scaler.
    inner_scale = 2.0**10 if args.precision == "16-mixed" else 1.0
    model = train(fabric, train_x, train_y, args.steps, args.weight, inner_scale)
    # Not set up by Fabric: evaluate shares the batches among the processes itself.
    loader = DataLoader(TensorDataset(x[: args.images], y[: args.images]), BATCH_SIZE)
    report = evaluate(model, loader, {"PGD-10": PGDAttack(Linf(EPS), steps=10)}, progress=False)
    fabric.print(report)
    if args.output is not None:
        fabric.save(args.output, model.state_dict())


if __name__ == "__main__":
    main()
