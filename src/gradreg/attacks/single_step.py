"""Attacks of one gradient step."""

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from gradreg import checks
from gradreg.attacks.attack import LossAttack, Model
from gradreg.attacks.search import Search, check_attackable, pgd
from gradreg.noise import noise_for


@final
@dataclass(frozen=True, eq=False)
class FGSM(LossAttack):
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

    @property
    def name(self) -> str:
        return f"FGSM {self._loss_name()}".strip()

    def _perturb(self, model: Model, x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
        return pgd(
            self._losses_at(model, x, y),
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
class NFGSM(LossAttack):
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

    @property
    def name(self) -> str:
        return f"N-FGSM {self._loss_name()}".strip()

    def _perturb(self, model: Model, x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
        look = checks.may_look(pgd, x, validate=False)
        check_attackable(x, self.threat, self.bounds, self.out_of_bounds, look)
        reach = self.threat.scaled(1 + self.noise)
        search = Search(self._losses_at(model, x, y), x, reach, self.bounds, best=False, look=look)
        noise = noise_for(search.x, self.threat.scaled(self.noise), self.seed, index, 0, search.active)
        search.run(noise, 1, self.threat.eps)
        return search.result()
