r"""Second derivatives of a model's layers that cost less than those that PyTorch derives by itself.

A penalty on the input gradient differentiates the backward pass. PyTorch has one fused kernel for the derivative of
each layer, but composes the second derivative of many of them from elementary operations, each of which reads and
writes whole tensors: some 20 for GELU, 25 for LayerNorm. That of a convolution it takes by convolving with images as
kernels. While :class:`SecondDerivatives` is entered, calls of these layers compute the same values and derivatives by
functions whose second derivatives are written out: those of :mod:`affine <gradreg.second_derivatives.affine>` layers,
:mod:`activations <gradreg.second_derivatives.activations>` and
:mod:`LayerNorm <gradreg.second_derivatives.layer_norm>`. Third derivatives are right too, and take PyTorch's
way, but for LayerNorm, where that way is wrong.
:class:`FirstDerivatives` has the one first derivative that is slow, that of a convolution of an image on a CPU.
"""

from gradreg.second_derivatives.calls import FirstDerivatives, SecondDerivatives
from gradreg.second_derivatives.layer_norm import layer_norm_by_formula

__all__ = ["FirstDerivatives", "SecondDerivatives", "layer_norm_by_formula"]
