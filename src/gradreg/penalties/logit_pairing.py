"""Penalties of the distance between what a model says of two versions of an image: TRADES and its relatives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from gradreg.attacks import FGSM, NFGSM, Attack, IteratedAttack
from gradreg.checks import check_logits
from gradreg.criteria import cross_entropy  # noqa: F401  (in the examples)
from gradreg.penalties.penalty import Penalty
from gradreg.point import Point
from gradreg.selectors import class_scores, true_class
from gradreg.threat_models import at_least_float32
from gradreg.trees import taken

Divergence = Callable[[Tensor, Tensor], Tensor]  # of the logits of reference and moved images, (B, K) each, to (B,)


def _kl(reference: Tensor, moved: Tensor) -> Tensor:
    return _relative_entropy(reference, moved.log_softmax(1))


def _jensen_shannon(reference: Tensor, moved: Tensor) -> Tensor:
    middle = (reference.softmax(1) + moved.softmax(1)) / 2
    log_middle = middle.clamp(min=torch.finfo(middle.dtype).tiny).log()
    return 0.5 * (_relative_entropy(reference, log_middle) + _relative_entropy(moved, log_middle))


def _relative_entropy(logits: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), p the softmax of logits."""
    # From logarithms: a probability that underflows has a difference of logarithms that does not.
    log_p = logits.log_softmax(1)
    nothing = log_p == -torch.inf  # of logits that are masked: 0 log 0 is 0
    return (log_p.exp() * (log_p.masked_fill(nothing, 0.0) - log_q.masked_fill(nothing, 0.0))).sum(1)


def _squared(reference: Tensor, moved: Tensor) -> Tensor:
    return (reference.softmax(1) - moved.softmax(1)).square().sum(1)


def _logits(reference: Tensor, moved: Tensor) -> Tensor:
    return (reference - moved).square().sum(1)


def _nuclear(reference: Tensor, moved: Tensor) -> Tensor:
    """Every sample's share of the nuclear norm of the differences of a batch.

    With the singular value decomposition D = U S V', the norm is the scalar product of D with U V', which is its
    gradient too; so U V' can be held constant, and singular values that are equal or 0 do no harm.
    """
    difference = reference.softmax(1) - moved.softmax(1)
    with torch.no_grad():
        left, sizes, right = torch.linalg.svd(difference.nan_to_num(), full_matrices=False)
        kept = sizes > torch.finfo(sizes.dtype).eps * max(difference.shape) * sizes.amax()
        direction = (left * kept) @ right
    return (direction * difference).sum(1)


DIVERGENCES: Mapping[str, Divergence] = {
    "kl": _kl, "js": _jensen_shannon, "squared": _squared, "logits": _logits, "nuclear": _nuclear,
}  # fmt: skip


@final
@dataclass(frozen=True, eq=False)
class LogitPairing(Penalty):
    r"""Divergence between the model's predictions for two versions of an image, :math:`D(f(x_b), f(z_b))`.

    =============  ===================================================  ==============================================
    divergence     :math:`D(f, h)` with :math:`p, q` their softmax      as in
    =============  ===================================================  ==============================================
    ``"kl"``       :math:`\sum_k p_k \log (p_k / q_k)`                  TRADES, Zhang et al., ICML 2019, equation 5
    ``"js"``       the mean of :math:`KL(p \| m)` and                   LIET
                   :math:`KL(q \| m)`, :math:`m = (p + q) / 2`
    ``"squared"``  :math:`\|p - q\|_2^2`                                GAT, Sriramanan et al., NeurIPS 2020
    ``"logits"``   :math:`\|f - h\|_2^2`                                ALP, Kannan, Kurakin & Goodfellow, 2018;
                                                                        FGSM-PGI, Jia et al., ECCV 2022
    ``"nuclear"``  the share of each sample in :math:`\|P - Q\|_*`,     NuAT, Sriramanan et al., NeurIPS 2021
                   P and Q the softmax of the batch, (B, K)
    =============  ===================================================  ==============================================

    The other image is made by an attack from here, or it is one that the objective's own attack has left behind:

        >>> from gradreg import Linf, NFGSM, PenalizedLoss, PGDAttack, Term, boosted_cross_entropy, cross_entropy
        >>> threat = Linf(8 / 255)
        >>> attack = PGDAttack(threat, steps=10, step_size=2 / 255, best=False)
        >>> trades = PenalizedLoss(terms={"kl": Term(LogitPairing("kl", attack), 6.0)})
        >>> gat = PenalizedLoss(terms={"pair": Term(LogitPairing("squared", NFGSM(threat), attack_weight=10.0), 10.0)})
        >>> alp = PenalizedLoss(terms={"pair": Term(LogitPairing("logits", "clean"), 0.5)}, at=attack)
        >>> attack = PGDAttack(threat, steps=10, step_size=2 / 255, best=False, criterion=cross_entropy)
        >>> pairing = LogitPairing("kl", "clean", weighted=True)
        >>> mart = PenalizedLoss(boosted_cross_entropy, {"kl": Term(pairing, 5.0)}, at=attack)

    The *reference* is the point where the penalty is taken, if ``at`` is an attack; otherwise it is the clean image or
    the attack's start, and the point where the penalty is taken is the *moved* image. The values, in nats for ``"kl"``
    and ``"js"``, in squared logits for ``"logits"`` and without unit else, are those of each sample alone, but for
    ``"nuclear"``, which is of the batch: its mean is the norm divided by the size of the batch, and it is refused for a
    part of a batch. It changes with the size of the batch and so with gradient accumulation and the number of GPUs.

    Beyond what makes the other image a pairing costs one natural step, or two thirds of one for ``"start"``, whose
    forward pass the attack has made already. With the other image held constant it costs a third, or nothing.

    Attributes:
        divergence: One of the above.
        at: The other image: an attack, made here; ``"clean"``, the image before the objective's attack moved it; or
            ``"start"``, where that attack has started: :class:`gradreg.NFGSM`, :class:`gradreg.FGSM` or
            :class:`gradreg.PGDAttack`, of which the last has to run the model there once more.
        detach: The side that is held constant: ``"reference"``, ``"moved"`` or None. A constant reference at the
            ``"start"`` costs nothing, and with ``"logits"`` it did not train: both sides move together, and their
            distance grows without end.
        weighted: Whether values are weighted by one minus the probability of the true class at the reference, as in
            MART (Wang et al., ICLR 2020), which differentiates that, too.
        attack_weight: What an attack raises: None for the divergence alone, from a reference that is held constant
            (TRADES); or the factor of the divergence added to the loss: 0 for the loss alone, 10 for GAT. An attack
            with a criterion of its own raises that.

    Raises:
        ValueError: If a setting is unknown or has no effect; if an attack that is targeted, or starts at the image
            itself, is to raise the divergence. When called, if logits are not of shape (B, K), if ``weighted`` has no
            labels of classes, or at the ``"start"`` of an attack in evaluation mode.
        RuntimeError: When called, for ``"clean"`` or ``"start"`` in an objective whose ``at`` leaves no such image.

    Example:
        >>> point = Point(torch.nn.Identity(), cross_entropy, torch.tensor([[0.2, 0.7]]), torch.tensor([0]))
        >>> float(LogitPairing("kl", NFGSM(Linf(0.1)), attack_weight=0.0)(point).detach()) > 0
        True
    """

    divergence: Literal["kl", "js", "squared", "logits", "nuclear"] = "kl"
    at: Attack | Literal["clean", "start"] = "clean"
    detach: Literal["reference", "moved"] | None = None
    weighted: bool = False
    attack_weight: float | None = None

    def __post_init__(self) -> None:
        for setting, known in (("divergence", tuple(DIVERGENCES)), ("detach", ("reference", "moved", None))):
            if getattr(self, setting) not in known:
                raise ValueError(f"LogitPairing: {setting} is one of {known}, got {getattr(self, setting)!r}.")
        if not isinstance(self.at, Attack) and self.at not in ("clean", "start"):
            raise ValueError(f'LogitPairing: at is an attack, "clean" or "start", got {self.at!r}.')
        at = self.at
        if isinstance(at, str):
            if self.attack_weight is not None:
                raise ValueError(f'LogitPairing: attack_weight is of an attack made here, and at is "{at}".')
            return
        raises_divergence = self.attack_weight != 0 and getattr(at, "criterion", None) is None
        if raises_divergence and getattr(at, "targeted", False):
            raise ValueError(
                "LogitPairing: a targeted attack lowers what it is given, and this is to raise a divergence."
            )
        still = isinstance(at, FGSM) or (isinstance(at, NFGSM) and not at.noise)
        still |= isinstance(at, IteratedAttack) and not at.random_start
        if still and self.attack_weight is None and raises_divergence and getattr(at, "start", None) is None:
            raise ValueError(
                "LogitPairing: the attack starts at the reference, where the divergence is 0 and has no slope. Let it "
                "start at noise (NFGSM, random_start=True), or raise the loss as well: attack_weight=1.0."
            )

    @property
    def threat(self) -> object:
        """That of the attack; None without one."""
        return getattr(self.at, "threat", None)

    @property
    def bounds(self) -> object:
        """Those of the attack; None without one."""
        return getattr(self.at, "bounds", None)

    @property
    def of_batch(self) -> bool:
        return self.divergence == "nuclear"

    @property
    def trains_start(self) -> bool:
        """Whether the pass with which the objective's attack has started is to be trained, too."""
        return self.at == "start" and self.detach != "reference"

    @property
    def name(self) -> str:
        where = self.at if isinstance(self.at, str) else self.at.name
        return f"logit pairing, {self.divergence}, {where}"

    def seeded(self, seed: int) -> "LogitPairing":
        return self if isinstance(self.at, str) else replace(self, at=self.at.seeded(seed))

    def __call__(self, point: Point) -> Float[Tensor, "B"]:
        if self.at == "start":
            return self._from_start(point)
        if self.at == "clean":
            if point.origin is None:
                raise _nothing_left("clean", point)
            reference, moved = point.origin, point
        else:
            reference, moved = point, point.at(self._attacked(point, self.at), differentiable=False)
        held = self.detach == "reference", self.detach == "moved"
        return self._between(self._logits_of(reference, held[0]), self._logits_of(moved, held[1]), point.y)

    def _between(self, reference: Tensor, moved: Tensor, labels: Any) -> Tensor:
        values = DIVERGENCES[self.divergence](reference, moved)
        if self.weighted and not isinstance(labels, Tensor):
            raise ValueError(f"LogitPairing: weighted=True needs labels of classes, got a {type(labels).__name__}.")
        if self.weighted:
            values = values * (1 - class_scores(reference.softmax(1), true_class()(reference, labels)))
        return values

    def _from_start(self, point: Point) -> Tensor:
        """Against the logits where the objective's attack has started; 0 for samples that it has not moved."""
        step = point.first_step
        if step is None:
            raise _nothing_left("start", point)
        if step.evaluated:
            raise ValueError(
                'LogitPairing: at="start" compares the network that trains with the one that was attacked, which '
                'mode="eval" makes another one. Use mode="keep", or at="clean".'
            )
        moved = self._logits_of(point, self.detach == "moved")
        reference = self._logits_of(step.start, self.detach == "reference")
        if step.rows is None:
            return self._between(reference, moved, point.y)
        values = self._between(reference, moved[step.rows], taken(point.y, step.rows, len(moved)))
        return torch.zeros_like(moved[:, 0]).index_copy(0, step.rows, values)

    def _attacked(self, point: Point, attack: Attack) -> Tensor:
        """The image that an attack makes from here, of what it is to raise."""
        if self.attack_weight == 0 or getattr(attack, "criterion", None) is not None:
            return attack.perturb(point)
        divergence, weight, loss_of = DIVERGENCES[self.divergence], self.attack_weight, point.batch.criterion
        reference = self._logits_of(point, constant=True)
        if weight is None:
            y: Any = reference
            criterion = lambda logits, known: divergence(known, at_least_float32(logits))  # noqa: E731
        else:
            y = (point.y, reference)
            criterion = lambda logits, y: loss_of(logits, y[0]) + weight * divergence(y[1], at_least_float32(logits))  # noqa: E731
        return attack.perturb(point.with_loss(criterion, y))

    def _logits_of(self, point: Point, constant: bool) -> Tensor:
        logits = at_least_float32(check_logits(point.constant_logits() if constant else point.logits))
        if logits.ndim != 2 or (logits.shape[1] < 2 and self.divergence != "logits"):
            raise ValueError(
                f"LogitPairing needs logits of shape (B, K), K > 1, got shape {tuple(logits.shape)}. Of one logit "
                '"logits" alone has a meaning.'
            )
        return logits


def _nothing_left(which: str, point: Point) -> RuntimeError:
    why = "no attack has moved it" if point.origin is None else "its attack keeps none, or it is a part of a batch"
    return RuntimeError(
        f'LogitPairing: at="{which}" needs an image that the objective\'s attack has left behind, and there is '
        f"none: {why}. Use PenalizedLoss(at=NFGSM(...)), or LogitPairing(at=attack), which makes the other image."
    )
