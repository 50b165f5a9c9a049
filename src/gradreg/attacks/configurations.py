"""Attacks on a model with labels, as frozen configurations."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from gradreg import checks, modes
from gradreg.attacks.search import Bounds, LossesAt, OutOfBounds, Search, check_attackable, noise_for, pgd
from gradreg.criteria import Criterion, cross_entropy
from gradreg.gradients import outside_inference_mode
from gradreg.threat_models import Eps, ThreatModel


@dataclass(frozen=True, eq=False)
class Attack(ABC):
    """A configuration that turns a batch into a perturbed batch: ``attack(model, x, y) -> x_adv``.

    It stores no model and has no state. No parameter's ``.grad``, no running statistic and no module's mode is changed
    (a model given as a function hides its modules: give an ``nn.Module`` where there is one).

    Attributes:
        threat: The perturbations allowed, in the units of x.
        criterion: Per-sample loss ``(logits, y) -> (B,)`` to raise. Labels may be classes or probabilities wherever it
            takes them. Default: cross-entropy.
        targeted: Whether y are classes to reach: the loss is then lowered.
        bounds: Lowest and highest value of an input; None for no bounds.
        out_of_bounds: ``"check"`` or ``"clamp"``, see :func:`pgd`.
        mode: ``"keep"`` attacks the model in the mode it is in, with a warning if that is BatchNorm or dropout in
            training mode, which make the gradients of a batch depend on each other or on chance. ``"eval"`` attacks it
            in evaluation mode and then gives every module its own mode back; the model must then be an ``nn.Module``.
    """

    threat: ThreatModel
    criterion: Criterion = field(default=cross_entropy, kw_only=True)
    targeted: bool = field(default=False, kw_only=True)
    bounds: Bounds | None = field(default=(0.0, 1.0), kw_only=True)
    out_of_bounds: OutOfBounds = field(default="check", kw_only=True)
    mode: Literal["keep", "eval"] = field(default="keep", kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.threat, ThreatModel):
            raise TypeError(
                f"{type(self).__name__}: expected a threat model such as Linf(8 / 255), got "
                f"{type(self.threat).__name__}. The model is given when the attack is called: attack(model, x, y)."
            )
        if self.mode not in ("keep", "eval"):
            raise ValueError(f'{type(self).__name__}: mode is "keep" or "eval", got {self.mode!r}.')

    def __call__(
        self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, *, index: Tensor | None = None
    ) -> Tensor:
        """Perturb a batch.

        Args:
            model: Any function from x to logits.
            x: Clean inputs ``(B, ...)``, float32 or float64.
            y: Labels as the criterion takes them; the classes to reach if targeted.
            index: With a seed, the position of each sample in its data set.

        Returns:
            The perturbed inputs, detached.

        Raises:
            ValueError: If x lies outside of the bounds or is not finite, eps is in another unit, or labels do not fit.
            TypeError: If x is in half precision, the model returns no tensor, or it is no module for ``mode="eval"``.
            RuntimeError: If the losses are NaN or do not depend on the input, or inside a transform.
        """
        with (
            self._mode(model),
            modes.frozen_statistics(model),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            y = outside_inference_mode(y).to(x.device)
            return self._perturb(self._losses_at(model, y, checks.may_look(self, x, validate=False)), x, index)

    @abstractmethod
    def _perturb(self, losses_at: LossesAt, x: Tensor, index: Tensor | None) -> Tensor:
        """The search itself."""

    def _losses_at(self, model: Callable[[Tensor], Tensor], y: Tensor, look: bool) -> LossesAt:
        """The function to ascend; looks at the labels' values once, if at all."""

        def losses_at(z: Tensor, rows: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            nonlocal look
            logits, labels = model(z), y[rows]
            checks.check_logits(logits)
            checks.check_labels(logits, labels, look=look)
            look = False
            losses = self.criterion(logits, labels)
            done = self._done(logits.detach(), labels)
            losses = -losses if self.targeted else losses
            return losses if done is None else (losses, done)

        return losses_at

    def _done(self, logits: Tensor, y: Tensor) -> Tensor | None:
        """Which samples need no further search; None for an attack that searches to its end."""
        return None

    def _mode(self, model: object) -> AbstractContextManager[None]:
        if self.mode == "eval":
            return modes.evaluating(model)
        norms = [module for module in modes.batch_norms(model) if module.training]
        for modules, effect in (
            (norms, "the gradient of a sample depends on the other samples of its batch"),
            (modes.dropouts(model), "every step sees another model"),
        ):
            if modules:
                checks.warn(
                    f"{type(self).__name__}: {type(modules[0]).__name__} is in training mode, so that {effect}. "
                    'Attack in evaluation mode with mode="eval", or call model.eval() first.'
                )
        return nullcontext()


@final
@dataclass(frozen=True, eq=False)
class PGDAttack(Attack):
    """Projected gradient descent (Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", 2018).

    The default is an attack for evaluation. Adversarial training as in the thesis is
    ``PGDAttack(Linf(4 / 255), steps=3, step_size=8 / 255 / 3, best=False)``.

    Attributes:
        steps: Gradient steps of each restart.
        step_size: Length of a step in the units of eps. Default: ``2.5 * eps / steps``.
        random_start: Start at uniform noise in the ball instead of at x.
        restarts: How many starts.
        best: Return the point with the highest loss of all visited, for one more forward pass, instead of the last
            point.
        early_stop: Let samples leave the search as soon as they are misclassified (targeted: classified as the target).
            Labels must then be classes, or probabilities whose largest counts.
        seed: Makes the noise reproducible, see :func:`pgd`.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
        >>> x, y = torch.rand(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
        >>> x_adv = PGDAttack(Linf(8 / 255), steps=10)(model, x, y)
        >>> bool((x_adv - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    steps: int = field(default=10, kw_only=True)
    step_size: Eps | None = field(default=None, kw_only=True)
    random_start: bool = field(default=True, kw_only=True)
    restarts: int = field(default=1, kw_only=True)
    best: bool = field(default=True, kw_only=True)
    early_stop: bool = field(default=False, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def _done(self, logits: Tensor, y: Tensor) -> Tensor | None:
        if not self.early_stop:
            return None
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(
                f"PGDAttack: early_stop compares classes and needs logits of shape (B, K), K > 1, got "
                f"{tuple(logits.shape)}. Use early_stop=False, or pgd with a losses_at that says who is done."
            )
        reached = logits.argmax(1) == (y if y.ndim == 1 else y.argmax(1))
        return reached if self.targeted else ~reached

    def _perturb(self, losses_at: LossesAt, x: Tensor, index: Tensor | None) -> Tensor:
        return pgd(
            losses_at,
            x,
            self.threat,
            steps=self.steps,
            step_size=self.step_size,
            random_start=self.random_start,
            restarts=self.restarts,
            best=self.best,
            bounds=self.bounds,
            out_of_bounds=self.out_of_bounds,
            seed=self.seed,
            index=index,
        )


@final
@dataclass(frozen=True, eq=False)
class FGSM(Attack):
    """The fast gradient sign method, one full step from x to the boundary of the ball.

    Goodfellow, Shlens & Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015; for other norms than Linf
    the step goes along their maximiser.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Linear(2, 2)
        >>> x = torch.full((1, 2), 0.5)
        >>> (FGSM(Linf(0.1))(model, x, torch.tensor([0])) - x).abs()
        tensor([[0.1000, 0.1000]])
    """

    def _perturb(self, losses_at: LossesAt, x: Tensor, index: Tensor | None) -> Tensor:
        return pgd(
            losses_at,
            x,
            self.threat,
            steps=1,
            step_size=self.threat.eps,
            random_start=False,
            best=False,
            bounds=self.bounds,
            out_of_bounds=self.out_of_bounds,
        )


@final
@dataclass(frozen=True, eq=False)
class NFGSM(Attack):
    """Noise, then one full step that is *not* projected back onto the ball.

    Single-step adversarial training without the collapse of FGSM: de Jorge et al., "Make Some Noise: Reliable and
    Efficient Single-Step Adversarial Training", NeurIPS 2022. The perturbation reaches up to ``1 + noise`` times eps:
    it is for training, not for evaluation.

    Attributes:
        noise: Size of the uniform noise in units of the ball; the paper's value is 2.
        seed: Makes the noise reproducible, see :func:`pgd`.

    Example:
        >>> from gradreg import Linf
        >>> model = torch.nn.Linear(2, 2)
        >>> x = torch.full((1, 2), 0.5)
        >>> moved = (NFGSM(Linf(0.1))(model, x, torch.tensor([0])) - x).abs()
        >>> bool((moved <= 0.3 + 1e-6).all())
        True
    """

    noise: float = field(default=2.0, kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noise >= 0:
            raise ValueError(f"NFGSM: noise is a multiple of eps and must be at least 0, got {self.noise}.")

    def _perturb(self, losses_at: LossesAt, x: Tensor, index: Tensor | None) -> Tensor:
        look = checks.may_look(pgd, x, validate=False)
        check_attackable(x, self.threat, self.bounds, self.out_of_bounds, look)
        search = Search(losses_at, x, self.threat.scaled(1 + self.noise), self.bounds, best=False, look=look)
        noise = noise_for(search.x, self.threat.scaled(self.noise), self.seed, index, 0, search.active)
        search.run(noise, 1, self.threat.eps)
        return search.result()
