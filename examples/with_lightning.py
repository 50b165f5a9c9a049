r"""GradNorm training with Lightning: a robust classifier of the digits of `quickstart.py`.

    python examples/with_lightning.py                                       # with --weight 0: natural training
    python examples/with_lightning.py --precision bf16-mixed --devices 2

Model and objective live in one LightningModule. Lightning puts DistributedDataParallel and autocast around
``training_step`` as a whole, so that they hold the input gradient too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gradreg import GradNormPenalty, Linf, PenalizedLoss, PGDAttack, Term, evaluate, linear_ramp

from quickstart import BATCH_SIZE, CROSS_ENTROPY, EPS, build_model, load_digits

ACCUMULATE = 2  # batches that make up an optimiser step


class RobustClassifier(LightningModule):
    """A classifier, what it is trained with, and the attack that validates it."""

    def __init__(self, steps: int, weight: float, inner_scale: float) -> None:
        super().__init__()
        self.steps = steps
        self.model = build_model("gelu")
        term = Term(GradNormPenalty(Linf(EPS)), weight=linear_ramp(weight, duration=max(steps // 3, 1)))
        self.objective = PenalizedLoss(CROSS_ENTROPY, {"grad_norm": term}, inner_scale=inner_scale)
        self.attack = PGDAttack(Linf(EPS), steps=5)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The objective; Lightning runs the backward pass, unscales, clips and steps."""
        out = self.objective(self.model, *batch, t=self.global_step)  # of the optimiser, also under accumulation
        self.log("loss", out.loss, prog_bar=True)
        for name, value in out.penalties.items():
            self.log(name, value.mean(), prog_bar=True)
        return out.total

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Accuracy on clean and on attacked images, in inference mode.

        gradreg's attacks leave that by themselves; others need Trainer(inference_mode=False) and torch.enable_grad().
        """
        x, y = batch
        for name, images in {"clean": x, "robust": self.attack(self.model, x, y)}.items():
            self.log(name, (self.model(images).argmax(1) == y).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict:
        """AdamW with one cycle of the learning rate."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=self.steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="optimiser steps")
    parser.add_argument("--weight", type=float, default=3.0, help="of the penalty; 0 trains naturally")
    parser.add_argument("--accelerator", default="auto", help="of the Trainer: cpu, gpu, ...")
    parser.add_argument("--devices", type=int, default=1, help="number of processes")
    parser.add_argument("--precision", default="32-true", help="of the Trainer: 32-true, bf16-mixed, 16-mixed on a GPU")
    parser.add_argument("--images", type=int, default=300, help="test images to evaluate on")
    parser.add_argument("--output", type=Path, help="file for the weights")
    args = parser.parse_args(argv)
    train_x, train_y, x, y = load_digits("test")
    _, _, val_x, val_y = load_digits("validation")
    training = DataLoader(TensorDataset(train_x, train_y), BATCH_SIZE // ACCUMULATE // args.devices, shuffle=True)
    validation = DataLoader(TensorDataset(val_x[:100], val_y[:100]), BATCH_SIZE)
    torch.manual_seed(0)
    # Keeps small input gradients from flushing to 0 in float16. The gradients of the weights have Lightning's scaler.
    module = RobustClassifier(args.steps, args.weight, inner_scale=2.0**10 if args.precision == "16-mixed" else 1.0)
    trainer = Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        precision=args.precision,
        max_steps=args.steps,
        gradient_clip_val=1.0,
        accumulate_grad_batches=ACCUMULATE,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, training, validation)
    trainer.print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
    model = module.model.to(trainer.strategy.root_device)  # fit has moved it to the CPU
    loader = DataLoader(TensorDataset(x[: args.images], y[: args.images]), BATCH_SIZE)
    report = evaluate(model, loader, {"PGD-10": PGDAttack(Linf(EPS), steps=10)}, progress=False)
    trainer.print(report)
    if args.output is not None and trainer.is_global_zero:
        torch.save(model.state_dict(), args.output)


if __name__ == "__main__":
    main()
