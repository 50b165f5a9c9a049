"""Preflight: whether the exact penalty works on a model, and otherwise which module breaks it and what to do.

The exact penalty (:class:`gradreg.DoubleBackward`) differentiates an input gradient again. Much that trains
without complaint breaks there: some of it raises at the last backward pass, far from its cause, and some only
trains wrongly. :func:`preflight` runs the real thing once on a small batch and says what happens, by the modules'
own names.
"""

import torch
from torch import Tensor, nn

from gradreg.criteria import Criterion, cross_entropy
from gradreg.preflight.inspection import inspect, inspect_activations
from gradreg.preflight.report import Finding, FoundError, PreflightReport
from gradreg.preflight.restore import left_as_found
from gradreg.preflight.trial import Trial
from gradreg.wrappers import is_sharded

__all__ = ["Finding", "PreflightReport", "preflight"]


def preflight(model: nn.Module, x: Tensor, y: Tensor, *, criterion: Criterion | None = None) -> PreflightReport:
    r"""Say whether the exact penalty will work on this model, and otherwise name the module and the mend.

    The model is inspected first. If that finds no error, one trial runs the penalty that training would: the
    forward pass, :math:`g = \nabla_x \ell` with a graph, :math:`R = \|g_b\|_1`, and the gradient of R with respect
    to every trainable parameter. So the verdict is what happens, not what a list of known layers says. If the
    trial fails, it is repeated with every node of the autograd graph traced back to the module that made it. If it
    passes, its gradient is held against a finite difference of input gradients, in a copy in double precision: an error
    is what differs for several steps and directions. A model that has no such copy, or whose gradient is a surrogate
    (straight-through), is not held against it.

    =============================================  ========  =============================================
    found                                          severity  mend
    =============================================  ========  =============================================
    fused attention                                error     ``sdpa_kernel(MATH)``, ``fused_attn = False``
    another operation without a second derivative  error     ``smoothify``, ``FiniteDifference()``
    ``once_differentiable`` functions              error     a backward that is differentiable
    a backward that loses the second derivative    error     no ``detach()`` in it, ``FiniteDifference()``
    a checkpoint that computes something else      error     the same function and random numbers again
    a compiled model, if it fails                  error     the uncompiled model
    reentrant checkpointing                        error     ``use_reentrant=False``
    ``DDP(static_graph=True)``                     error     DDP around a ``PenalizedModel``
    FSDP                                           error     the recipe for FSDP2, ``FiniteDifference()``
    SyncBatchNorm that synchronises                error     GroupNorm, eval mode
    tensors made in inference mode                 error     ``clone()``
    logits that do not depend on x                 error     no ``detach()``, no ``no_grad()``
    a step function between x and the logits       error     a straight-through gradient
    tensors of one step's graph kept for the next  error     ``model.train()``, an empty cache
    no trainable parameter, or none that R moves   error     ``requires_grad_()``
    quantised layers, the meta device              error     the model in floating point, with values
    NaN; outputs, losses, labels of a wrong form   error     as the message says
    BatchNorm with batch statistics                warning   eval mode, GroupNorm
    what is not smooth, as far as x meets it       warning   ``smoothify``
    a weight that is 0, as of a fresh classifier   warning   none: the first step mends it
    a saturated loss                               warning   another batch or criterion
    SyncBatchNorm on one process                   warning   GroupNorm, eval mode
    FSDP2 with the recipe (it is not run)          warning   preflight before ``fully_shard``
    activations read from the code alone           warning   a model that can be copied
    =============================================  ========  =============================================

    The mode that the model is in is the mode that is tried, so call it on the model as you will train it, before
    the first step. What it changes is put back, also when it raises: parameters, buffers and all other attributes of
    the modules, with what is in their tensors, lists, dictionaries, sets and tuples; training flags, torch's random
    states, ``.grad``, ``requires_grad`` and x. What a forward pass or a hook writes elsewhere stays: in objects of
    other classes, globals, files, other random generators. It costs a few forward and backward passes, three more
    in double precision (ten if something is wrong), memory for some copies of the model, and a run of
    :func:`find_nonsmooth`. DDP communicates nothing in them.

    Args:
        model: The model, wrapped and compiled as it will be trained.
        x: A small batch of inputs, of shape ``(B, ...)``; two to four samples will do.
        y: Its labels.
        criterion: The loss per sample, ``criterion(logits, y)`` of shape ``(B,)``; without one, cross-entropy.

    Returns:
        The report: ``report.ok`` is the verdict, ``report.findings`` say why, ``print(report)`` shows them, errors
        first, ``report.raise_for_errors()`` stops a script, and ``report.differentiation()`` is what works.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> print(preflight(model, torch.rand(2, 4), torch.tensor([0, 2])))  # doctest: +ELLIPSIS
        preflight: the exact penalty works
        warning: 1: ReLU is not smooth: ...
          mend: Train smoothify(model)...
    """
    with torch.inference_mode(False), torch.enable_grad():
        findings = list(inspect(model, x, y))
        runs = not any(map(is_sharded, model.modules()))
        if runs and not _fails(findings):
            try:
                with left_as_found(model, x.device):
                    findings.extend(Trial(model, x, y, cross_entropy if criterion is None else criterion).findings())
            except FoundError as found:
                findings.extend(found.findings)
        findings.extend(inspect_activations(model, x if runs and not _fails(findings) else None))
    return PreflightReport(tuple(sorted(findings, key=lambda finding: finding.severity == "warning")))


def _fails(findings: list[Finding]) -> bool:
    return any(finding.severity == "error" for finding in findings)
