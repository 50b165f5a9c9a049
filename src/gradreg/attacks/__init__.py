r"""Attacks: the search for a perturbation of a threat model that raises a function most.

:func:`pgd` knows no model. It ascends ``losses_at(z, rows)``, the losses of the samples ``rows`` of the batch at the
inputs z; labels, targets, margins and logits are that function's business. :class:`PGDAttack`, :class:`FGSM` and
:class:`NFGSM` are frozen configurations that build the function from a model and labels:
``attack(model, x, y) -> x_adv``.
"""

from gradreg.attacks.configurations import FGSM, NFGSM, Attack, PGDAttack
from gradreg.attacks.search import pgd

__all__ = ["FGSM", "NFGSM", "Attack", "PGDAttack", "pgd"]
