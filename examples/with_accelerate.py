r"""GradNorm training with Hugging Face Accelerate: a robust classifier of the digits of `quickstart.py`.

    python examples/with_accelerate.py                                      # with --weight 0: natural training
    accelerate launch --multi_gpu --num_processes 2 examples/with_accelerate.py
    torchrun --nproc-per-node 2 examples/with_accelerate.py --cpu           # two processes without a GPU

Model and objective go through ``accelerator.prepare`` as one module, a PenalizedModel: DistributedDataParallel and
autocast, which Accelerate puts around its forward pass, then hold the input gradient too.

``accelerate launch --cpu --num_processes 2`` starts one process (Accelerate 1.15 leaves the rest to mpirun), and under
torchrun without ``--cpu`` two processes on a machine without a GPU train two models that know nothing of each other.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradreg import GradNormPenalty, Linf, PenalizedLoss, PenalizedModel, PGDAttack, Term, evaluate, linear_ramp

from quickstart import BATCH_SIZE, CROSS_ENTROPY, EPS, build_model, load_digits


def train(accelerator: Accelerator, x: Tensor, y: Tensor, steps: int, weight: float) -> nn.Module:
    """A model trained for a number of optimiser steps of BATCH_SIZE images, over all processes and accumulation."""
    torch.manual_seed(0)
    objective = PenalizedLoss(
        CROSS_ENTROPY,
        {"grad_norm": Term(GradNormPenalty(Linf(EPS)), weight=linear_ramp(weight, duration=max(steps // 3, 1)))},
        # In float16, keeps small input gradients from flushing to 0; those of the weights have Accelerate's scaler.
        inner_scale=2.0**10 if accelerator.mixed_precision == "fp16" else 1.0,
    )
    penalized = PenalizedModel(build_model("gelu"), objective)
    optimizer = torch.optim.AdamW(penalized.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    loader = DataLoader(
        TensorDataset(x, y),
        batch_size=BATCH_SIZE // accelerator.gradient_accumulation_steps,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(0),
    )
    penalized, optimizer, schedule, loader = accelerator.prepare(penalized, optimizer, schedule, loader)
    t = 0  # the step of the objective's schedules: an optimiser step, not a batch
    while t < steps:
        for batch_x, batch_y in loader:
            with accelerator.accumulate(penalized):
                out = penalized(batch_x, batch_y, t=t)
                accelerator.backward(out.total)  # divides by the number of accumulated batches
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(penalized.parameters(), 1.0)  # takes the scaler's factor out before
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                t += 1
                if t % 50 == 0:
                    penalties = {name: round(value.mean().item(), 3) for name, value in out.penalties.items()}
                    accelerator.print(f"step {t}: loss {out.loss.item():.3f}, {penalties}")
                if t == steps:
                    break
    return accelerator.unwrap_model(penalized).model  # neither DDP nor autocast around it


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--weight", type=float, default=3.0, help="of the penalty; 0 trains naturally")
    parser.add_argument("--accumulate", type=int, default=2, help="batches that make up an optimiser step")
    parser.add_argument("--precision", choices=["no", "bf16", "fp16"], help="default: that of `accelerate launch`")
    parser.add_argument("--cpu", action="store_true", help="use no GPU, in one or several processes")
    parser.add_argument("--images", type=int, default=300, help="test images to evaluate on")
    parser.add_argument("--output", type=Path, help="file for the weights")
    args = parser.parse_args(argv)
    accelerator = Accelerator(
        cpu=args.cpu,
        mixed_precision=args.precision,
        gradient_accumulation_steps=args.accumulate,
        # A batch is shared by the processes; without this each would have its own, and the schedule two steps for one.
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    train_x, train_y, x, y = load_digits("test")
    model = train(accelerator, train_x, train_y, args.steps, args.weight)
    loader = DataLoader(TensorDataset(x[: args.images], y[: args.images]), BATCH_SIZE)  # evaluate shares it out itself
    report = evaluate(model, loader, {"PGD-10": PGDAttack(Linf(EPS), steps=10)}, progress=False)
    accelerator.print(report)
    if args.output is not None:
        accelerator.save(model.state_dict(), args.output)
    accelerator.end_training()


if __name__ == "__main__":
    main()
