"""Pictures of what was measured: gradients, curves, distributions, fronts. Needs the extra ``plot`` (matplotlib).

Every function returns a ``matplotlib.figure.Figure`` as wide as a page, which draws nothing until it is saved or shown
and belongs to no window. Models and methods are told apart by colour and by marker or line, in colours that
colour-blind readers can tell apart (Okabe & Ito, "Color Universal Design", 2008).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from textwrap import wrap
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradreg import modes
from gradreg.attacks import Attack
from gradreg.criteria import cross_entropy, margin
from gradreg.differentiation import InputOnly
from gradreg.evaluation import RobustnessCurve
from gradreg.intervals import Proportion
from gradreg.point import Point
from gradreg.statistics import EdgeCorrelation, LogHistogram, Measurements, pearson

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter
except ImportError as error:
    raise ImportError("gradreg.plots draws with matplotlib: pip install 'gradreg[plot]'.") from error

COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "osv^DPX*"
LINES = ("-", "--", "-.", ":")
WIDTH = 7.0  # inches

Models = Mapping[str, nn.Module]


def gradients(models: Models, x: Float[Tensor, "B C H W"], y: Tensor, *, quantile: float = 0.99) -> Figure:
    """Input gradients of several models side by side: a row for each image, a column for each model.

    Fig. 1.1 and Fig. 4.2 of Rodríguez Muñoz, "Adversarial robustness without perturbations" (MIT 2024). What is shown
    is the gradient of the margin, the true class's logit over the largest other one: unlike that of the loss it does
    not vanish where a model is sure. Gray images: blue where a brighter pixel favours the true class, red where another
    one. Colour images: the gradient itself, gray for 0.

    Args:
        models: By name.
        x: Some images, in pixels of [0, 1].
        y: Their classes.
        quantile: The share of the gradients' entries that the colour range of a model holds; it is printed below.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> figure = gradients({"linear": model}, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
        >>> len(figure.axes)
        4
    """
    figure, axes = _images(len(x), ["image", *models])
    for axis, image in zip(axes[0], x, strict=True):
        _show(axis, image)
    for column, model in zip(axes[1:], models.values(), strict=True):
        with modes.evaluating(model), torch.enable_grad():
            point = Point(model, margin, x, y, differentiation=InputOnly(), look=False)
            found = -point.gradient()  # margin() is another class over the true one, as an attack ascends it
        limit = _show_signed(column, found, quantile)
        column[-1].set_xlabel(f"±{limit:.2g}", fontsize=8)
    axes[0][-1].set_xlabel("colours:", fontsize=8)
    return figure


def perturbations(models: Models, x: Float[Tensor, "B C H W"], y: Tensor, attack: Attack) -> Figure:
    """What it takes to fool each model: one row for each image, one column for each model, the change in colours.

    Below every change stands what the model takes the changed image for, if that is not the true class.

    Args:
        models: By name.
        x: Some images.
        y: Their classes.
        attack: Finds the changes. The colours of a model range to its largest one.

    Example:
        >>> from gradreg import FGSM, Linf
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> figure = perturbations({"linear": model}, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), FGSM(Linf(0.1)))
        >>> len(figure.axes)
        4
    """
    figure, axes = _images(len(x), ["image", *models])
    for axis, image in zip(axes[0], x, strict=True):
        _show(axis, image)
    for column, model in zip(axes[1:], models.values(), strict=True):
        with modes.evaluating(model):
            x_adv = attack(model, x, y)
            with torch.no_grad():
                taken_for = model(x_adv).argmax(1)
        _show_signed(column, x_adv - x, 1.0)
        for axis, found, label in zip(column, taken_for.tolist(), y.tolist(), strict=True):
            axis.set_xlabel("robust" if found == label else f"fooled: {found}, not {label}", fontsize=7)
    return figure


def accuracy_curves(
    curves: Mapping[str, RobustnessCurve],
    *,
    scale: float = 1.0,
    xlabel: str = "eps, radius of the perturbation (pixels in [0, 1])",
) -> Figure:
    """Accuracy against the radius of the perturbation, with 95 % intervals (Fig. 4.1 of the thesis).

    Args:
        curves: Of each model, from :func:`gradreg.accuracy_curve` or :func:`gradreg.minimal_distortion`.
        scale: Factor on the radii: 255 shows them in steps of a byte.
        xlabel: What they are then.

    Example:
        >>> curve = RobustnessCurve(["a", "b"], [0.01, 0.2], [0.1])
        >>> len(accuracy_curves({"net": curve}).axes)
        1
    """
    figure, (axes,) = _panels(1)
    for (name, curve), looks in zip(curves.items(), _looks(), strict=False):
        radii = [0.0, *(curve.eps or sorted({d for d in curve.distances if 0 < d < math.inf}))]
        found = [curve.accuracy(radius) for radius in radii]
        every = max(1, len(radii) // 10)
        at = [scale * radius for radius in radii]
        axes.plot(at, [100 * accuracy.value for accuracy in found], label=name, markevery=every, **looks)
        low, high = ([100 * accuracy.interval[side] for accuracy in found] for side in (0, 1))
        axes.fill_between(at, low, high, color=looks["color"], alpha=0.15, lw=0)
    axes.set(xlabel=xlabel, ylabel="accuracy, %", ylim=(0, 100))
    return _finished(figure, axes)


def gradient_sizes(histograms: Mapping[str, LogHistogram]) -> Figure:
    """How the sizes of gradient entries are distributed, on a logarithmic axis (Fig. 4.4 of the thesis).

    Args:
        histograms: Of models or channels, from :func:`gradreg.statistics.gradient_histograms`.

    Example:
        >>> histogram = LogHistogram()
        >>> histogram.add(torch.rand(1000))
        >>> len(gradient_sizes({"net": histogram}).axes)
        1
    """
    figure, (axes,) = _panels(1)
    for (name, histogram), looks in zip(histograms.items(), _looks(markers=False), strict=False):
        zeros = f", {100 * histogram.zeros / histogram.n:.1f} % are 0" if histogram.zeros else ""
        axes.plot(*histogram.density(), label=f"{name}{zeros}", drawstyle="steps-mid", **looks)
    axes.set(xscale="log", xlabel="|gradient of the loss|, per unit of pixel", ylabel="share of entries per decade")
    axes.set_ylim(bottom=0)
    return _finished(figure, axes)


def distributions(measurements: Mapping[str, Measurements], name: str, *, bins: int = 25) -> Figure:
    """How a statistic is distributed over samples, for several models; a line marks each median.

    Fig. A.1 and Fig. A.2 of the thesis. The axis is logarithmic where all values are above 0.

    Args:
        measurements: Of each model.
        name: Of the statistic.
        bins: How many intervals of equal width the axis has.

    Example:
        >>> from gradreg.statistics import Loss, measure
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        >>> found = measure(model, [(torch.rand(9, 4), torch.randint(0, 3, (9,)))], [Loss()], progress=False)
        >>> len(distributions({"linear": found}, "loss").axes)
        1
    """
    figure, (axes,) = _panels(1)
    values = {model: torch.tensor(found.values[name]).double() for model, found in measurements.items()}
    values = {model: found[~found.isnan()] for model, found in values.items()}
    everything = torch.cat(list(values.values()))
    logarithmic = bool(everything.numel()) and bool((everything >= 0).all()) and bool((everything > 0).any())
    if logarithmic:
        positive = everything[everything > 0]
        first, last = (limit.log10().item() for limit in (positive.min(), positive.max()))
        edges = torch.logspace(first, max(last, first + 0.1), bins + 1, dtype=torch.float64).tolist()
        axes.set_xscale("log")
    else:
        low, high = (everything.min().item(), everything.max().item()) if everything.numel() else (0.0, 1.0)
        edges = torch.linspace(low, max(high, low + 1e-6), bins + 1, dtype=torch.float64).tolist()
    for (model, found), looks in zip(values.items(), _looks(markers=False), strict=False):
        if found.numel():
            counts = torch.histogram(found, torch.tensor(edges, dtype=torch.float64)).hist
            shares = (100 * counts / len(found)).tolist()
            axes.stairs(shares, edges, color=looks["color"], alpha=0.1, fill=True)
            axes.plot(_doubled(edges), [0.0, *_doubled(shares), 0.0], label=model, **looks)
            axes.axvline(found.median().item(), color=looks["color"], linestyle=looks["linestyle"], lw=0.8)
    unit = next(iter(measurements.values())).units[name] if measurements else ""
    axes.set(xlabel=f"{name} ({unit})" if unit else name, ylabel="% of samples")
    return _finished(figure, axes)


def edge_scatter(models: Models, x: Float[Tensor, "1 C H W"], y: Tensor, statistic: EdgeCorrelation) -> Figure:
    """Every pixel's gradient against its edge energy, in one image, for several models (Fig. 5.1 of the thesis).

    Args:
        models: By name.
        x: A batch of one image.
        y: Its class.
        statistic: Which gradient, which edges, which pixels. The correlation is printed above each panel.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> figure = edge_scatter({"linear": model}, torch.rand(1, 1, 8, 8), torch.tensor([0]), EdgeCorrelation())
        >>> len(figure.axes)
        1
    """
    figure, axes = _panels(len(models), height=2.6, share=True)
    for axis, (name, model) in zip(axes, models.items(), strict=True):
        with modes.evaluating(model), torch.enable_grad():
            point = Point(model, cross_entropy, x, y, differentiation=InputOnly(), look=False)
            sizes, energies, counted = statistic.pixels(point)
            rho = pearson(sizes, energies, counted).item()
        axis.scatter(energies[counted].tolist(), sizes[counted].tolist(), s=3, color=COLORS[1], alpha=0.4, linewidths=0)
        axis.set_title(f"{name}\ncorrelation {rho:+.2f}", fontsize=8)
    figure.supxlabel("log10 of edge energy", fontsize=10)
    axes[0].set_ylabel("log10 of |gradient|")
    return figure


def along_attack(along: Mapping[str, Mapping[float, Measurements]], names: Sequence[str]) -> Figure:
    """Means of statistics along the way to the attacked samples and beyond, for several models (Fig. A.3).

    Args:
        along: Of each model, from :func:`gradreg.statistics.measure_along`.
        names: Of the statistics, one panel for each.

    Example:
        >>> from gradreg import FGSM, Linf
        >>> from gradreg.statistics import Loss, measure_along
        >>> model, batch = nn.Linear(4, 3), (torch.rand(9, 4), torch.randint(0, 3, (9,)))
        >>> along = measure_along(model, [batch], FGSM(Linf(0.1)), [0.0, 1.0], [Loss()], progress=False)
        >>> len(along_attack({"linear": along}, ["loss"]).axes)
        1
    """
    figure, axes = _panels(len(names), height=2.6)
    for axis, name in zip(axes, names, strict=True):
        unit = ""
        for (model, found), looks in zip(along.items(), _looks(), strict=False):
            summaries = {scale: at.summary(name) for scale, at in sorted(found.items())}
            unit = next(iter(found.values())).units[name]
            axis.plot(list(summaries), [summary.mean for summary in summaries.values()], label=model, **looks)
        axis.set_title(f"{name}\n({unit})", fontsize=8)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel("share of the attack's perturbation", fontsize=10)
    axes[0].set_ylabel("mean")
    return _finished(figure, *axes)


def convergence(paths: Mapping[str, Float[Tensor, "B k"]]) -> Figure:
    """How far a power iteration has come after each product, relative to its last: median and 5 to 95 % of samples.

    Args:
        paths: Of each model, from ``HessianNorm.path``.

    Example:
        >>> len(convergence({"net": torch.tensor([[0.5, 0.9, 1.0]])}).axes)
        1
    """
    figure, (axes,) = _panels(1)
    for (name, path), looks in zip(paths.items(), _looks(markers=False), strict=False):
        share = path / path[:, -1:].clamp(min=torch.finfo(path.dtype).tiny)
        low, middle, high = share.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=path.dtype), dim=0).tolist()
        steps = range(1, path.shape[1] + 1)
        axes.plot(steps, middle, label=name, **looks)
        axes.fill_between(steps, low, high, color=looks["color"], alpha=0.15, lw=0)
    axes.set(xlabel="products with the Hessian", ylabel="estimate / last estimate", ylim=(0, 1.1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, axes)


def accuracy_per_epoch(history: Mapping[str, Sequence[float]], *, ylabel: str = "accuracy, %") -> Figure:
    """Accuracy after each epoch, for several ways to train (Fig. 4.3 of the thesis).

    Args:
        history: Of each way, accuracies in percent, beginning after the first epoch.
        ylabel: What was measured.

    Example:
        >>> len(accuracy_per_epoch({"GradNorm": [10.0, 30.0, 35.0]}).axes)
        1
    """
    figure, (axes,) = _panels(1)
    for (name, values), looks in zip(history.items(), _looks(), strict=False):
        axes.plot(range(1, len(values) + 1), values, label=name, markevery=max(1, len(values) // 10), **looks)
    axes.set(xlabel="epoch", ylabel=ylabel)
    return _finished(figure, axes)


def front(points: Mapping[str, tuple[float, Proportion]], *, xlabel: str = "cost of a step, natural = 1") -> Figure:
    """Robust accuracy against cost, with 95 % intervals; a line joins those that nothing cheaper beats.

    Args:
        points: Of each method its cost and its robust accuracy.
        xlabel: What the cost is.

    Example:
        >>> points = {"natural": (1.0, Proportion(31, 100)), "PGD-3": (3.0, Proportion(90, 100))}
        >>> len(front(points).axes)
        1
    """
    figure, (axes,) = _panels(1)
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points.values(), key=lambda point: (point[0], -point[1].value)):
        if not best or 100 * accuracy.value > best[-1][1]:
            best.append((cost, 100 * accuracy.value))
    axes.plot(*zip(*best, strict=True), color="0.8", lw=1, zorder=0)
    for (name, (cost, accuracy)), looks in zip(points.items(), _looks(), strict=False):
        value, (low, high) = 100 * accuracy.value, accuracy.interval
        axes.errorbar(
            [cost], [value], [[value - 100 * low], [100 * high - value]], label=name, capsize=2, elinewidth=0.8,
            **{**looks, "linestyle": "none"},
        )  # fmt: skip
    axes.set(xlabel=xlabel, ylabel="robust accuracy, %")
    return _finished(figure, axes)


def _looks(*, markers: bool = True) -> list[dict[str, Any]]:
    """Eight times four ways to draw a line, all different."""
    ways = zip(
        islice(cycle(COLORS), 32), islice(cycle(MARKERS), 32), (line for line in LINES for _ in COLORS), strict=True
    )
    return [
        {"color": color, "linestyle": line, "linewidth": 1.3} | ({"marker": marker, "markersize": 4} if markers else {})
        for color, marker, line in ways
    ]


def _doubled(values: Sequence[float]) -> list[float]:
    """Every value twice: the corners of steps."""
    return [value for value in values for _ in range(2)]


def _panels(count: int, *, height: float = 3.6, share: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=150)
    axes = list(figure.subplots(1, count, squeeze=False, sharex=share, sharey=share)[0])
    for axis in axes:
        axis.grid(color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _finished(figure: Figure, *axes: Axes) -> Figure:
    """With one legend for all panels."""
    handles, labels = axes[0].get_legend_handles_labels()
    if len(axes) == 1:
        axes[0].legend(frameon=False, fontsize=8)
    elif labels:
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure


def _images(rows: int, titles: Sequence[str]) -> tuple[Figure, list[list[Axes]]]:
    """Axes for pictures, a list for each column."""
    side = min(1.3, WIDTH / len(titles))
    figure = Figure(figsize=(side * len(titles), 1.1 * side * rows + 0.3), layout="constrained", dpi=150)
    axes = figure.subplots(rows, len(titles), squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title("\n".join(wrap(title, round(13 * side))), fontsize=8)
    return figure, [list(column) for column in axes.T]


def _show(axis: Axes, image: Tensor) -> None:
    image = image.detach().cpu().clamp(0, 1)
    if len(image) == 3:
        axis.imshow(image.permute(1, 2, 0).numpy())
    else:
        axis.imshow(image.mean(0).numpy(), cmap="gray", vmin=0, vmax=1)


def _show_signed(column: Sequence[Axes], values: Tensor, quantile: float) -> float:
    """Pictures of signed values in one range of colours; returns its end."""
    values = values.detach().cpu()
    sizes = values.abs().flatten().sort().values
    limit = max(sizes[math.ceil(quantile * (len(sizes) - 1))].item(), torch.finfo(values.dtype).tiny)
    for axis, value in zip(column, values, strict=True):
        if len(value) == 3:
            axis.imshow((0.5 + value / (2 * limit)).clamp(0, 1).permute(1, 2, 0).numpy())
        else:
            axis.imshow(value.mean(0).numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
    return limit
