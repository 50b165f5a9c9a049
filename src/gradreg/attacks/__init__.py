r"""Attacks: the search for a perturbation of a threat model that raises a function most.

:func:`pgd` and :func:`apgd` know no model. They ascend ``losses_at(z, rows)``, the losses of the samples ``rows`` of
the batch at the inputs z; labels, targets, margins and logits are that function's business. The classes are frozen
configurations that build the function from a model and labels: ``attack(model, x, y) -> x_adv``.
"""

from gradreg.attacks.adaptive import apgd
from gradreg.attacks.attack import Attack
from gradreg.attacks.autoattack import AutoAttack
from gradreg.attacks.black_box import RandomSearch, TransferAttack
from gradreg.attacks.iterated import APGDAttack, IteratedAttack, PGDAttack, TargetedAPGDAttack
from gradreg.attacks.search import Search, grad_enabled, pgd
from gradreg.attacks.single_step import FGSM, NFGSM, Noise
from gradreg.attacks.starts import RememberedStart

__all__ = [
    "FGSM",
    "NFGSM",
    "APGDAttack",
    "Attack",
    "AutoAttack",
    "IteratedAttack",
    "Noise",
    "PGDAttack",
    "RandomSearch",
    "RememberedStart",
    "Search",
    "TargetedAPGDAttack",
    "TransferAttack",
    "apgd",
    "grad_enabled",
    "pgd",
]
