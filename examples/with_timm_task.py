r"""GradNorm training as a task of timm: a robust classifier of the digits of `quickstart.py`.

    python examples/with_timm_task.py                                       # with --weight 0: natural training
    torchrun --nproc-per-node 2 examples/with_timm_task.py --device cpu     # two processes without a GPU

timm's training script knows a task by its methods. PenalizedTask has them for a model with its objective. The loop
below is that script in short, with timm's Mixup, optimizer, schedule and moving average of the weights.
"""

import argparse
from collections.abc import Sequence

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import NativeScaler, dispatch_clip_grad, init_distributed_device, random_seed, unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradreg import GradNormPenalty, Linf, PenalizedLoss, PenalizedModel, PGDAttack, Term, evaluate, linear_ramp

from quickstart import BATCH_SIZE, CROSS_ENTROPY, EPS, batches, build_model, load_digits


class PenalizedTask(TrainingTask):
    """A model with its objective."""

    def __init__(self, model: nn.Module, objective: PenalizedLoss, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.trainable_module = PenalizedModel(model, objective)

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: object) -> "PenalizedTask":
        """Wrap model and objective together: DDP then sees one forward pass, which holds the input gradient."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module:
        """The model to evaluate and to save, with no objective, DDP or moving average around it."""
        return unwrap_model(self.get_trainable_module(ema=ema) if module is None else module).model

    def forward(self, input: Tensor, target: Tensor, t: float | None = None) -> dict:
        """Loss to descend, logits, and penalties per sample, unweighted, at step t of the objective's schedules."""
        out = self.trainable_module(input, target, t)
        return {"loss": out.total, "output": out.logits, "penalties": out.penalties}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--weight", type=float, default=3.0, help="of the penalty; 0 trains naturally")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp-dtype", default="float32", help="of autocast: bfloat16 or float16; float32 for none")
    parser.add_argument("--images", type=int, default=300, help="test images to evaluate on")
    parser.add_argument("--output", help="file for the weights")
    args = parser.parse_args(argv)
    device = init_distributed_device(args)
    random_seed(0)
    # In float16, inner_scale keeps small gradients of the inputs from flushing to 0, and a scaler those of the weights.
    scaler = NativeScaler(device.type) if args.amp_dtype == "float16" else None
    term = Term(GradNormPenalty(Linf(EPS)), weight=linear_ramp(args.weight, duration=max(args.steps // 3, 1)))
    objective = PenalizedLoss(CROSS_ENTROPY, {"grad_norm": term}, inner_scale=2.0**10 if scaler else 1.0)
    task = PenalizedTask(build_model("gelu"), objective, device=device).to(device)
    task.setup_ema(decay=0.95)  # before DDP, which it would copy
    optimizer = create_optimizer_v2(task.get_eval_model(), opt="adamw", lr=2e-3, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=args.steps, step_on_epochs=False, updates_per_epoch=1)
    mixup = Mixup(mixup_alpha=0.1, label_smoothing=0.0, num_classes=10)
    if args.distributed:
        task.prepare_distributed(None if device.type == "cpu" else [device.index], static_graph=True)
    train_x, train_y, x, y = load_digits("test")
    for step, batch in enumerate(batches(train_x, train_y, args.steps, seed=0)):
        images, labels = (values[args.rank :: args.world_size].to(device) for values in batch)  # this process's share
        schedule.step_update(step)
        with torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp_dtype != "float32"):
            result = task(*mixup(images, labels), t=step)
        optimizer.zero_grad()
        if scaler is not None:  # unscales, then clips, then steps
            scaler(result["loss"], optimizer, clip_grad=1.0, parameters=task.get_clip_parameters())
        else:
            result["loss"].backward()
            dispatch_clip_grad(task.get_clip_parameters(), 1.0)
            optimizer.step()
        task.update_ema(step + 1)
        if args.rank == 0 and step % 50 == 0:
            print(f"step {step}:", {name: round(value.mean().item(), 3) for name, value in result["penalties"].items()})
    model = task.get_eval_model(ema=True)
    loader = zip(x[: args.images].split(BATCH_SIZE), y[: args.images].split(BATCH_SIZE), strict=True)
    report = evaluate(model, loader, {"PGD-10": PGDAttack(Linf(EPS), steps=10)}, progress=False)
    if args.rank == 0:
        print(report)
        if args.output is not None:
            torch.save(model.state_dict(), args.output)
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
