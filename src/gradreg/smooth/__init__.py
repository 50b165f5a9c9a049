"""Smooth activations in place of non-smooth ones.

A gradient penalty acts on the weights through the second derivatives of the network. Those of a ReLU are zero almost
everywhere, and the penalty does little (Rodríguez Muñoz, "Adversarial robustness without perturbations", MIT 2024,
section 4.3). :func:`smoothify` exchanges such activations for smooth ones, :func:`find_nonsmooth` says what is not
smooth in a model. To be read in this order: ``twins``, ``calls``, ``survey``, ``replace``, ``annealing``, ``undo``.
"""

from gradreg.smooth.annealing import SharpnessAnnealing, anneal_sharpness
from gradreg.smooth.replace import Replacement, SmoothReport, smoothify
from gradreg.smooth.survey import NonSmooth, find_nonsmooth
from gradreg.smooth.twins import FLAT_NODES, Blend, SmoothActivation
from gradreg.smooth.undo import unsmoothify

__all__ = [
    "FLAT_NODES",
    "Blend",
    "NonSmooth",
    "Replacement",
    "SharpnessAnnealing",
    "SmoothActivation",
    "SmoothReport",
    "anneal_sharpness",
    "find_nonsmooth",
    "smoothify",
    "unsmoothify",
]
