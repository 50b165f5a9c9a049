"""Plots: what is drawn is what was measured, labelled with units; models are left as they were."""

import builtins
import importlib
import io
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from gradreg import (
    FGSM,
    GradNormPenalty,
    HessianNorm,
    Linf,
    NormalizedCurvature,
    PGDAttack,
    Point,
    Proportion,
    RobustnessCurve,
    accuracy_curve,
    cross_entropy,
    input_gradient,
    margin,
    plots,
)
from gradreg.statistics import (
    EdgeCorrelation,
    LogHistogram,
    Loss,
    Measurements,
    gradient_histograms,
    measure,
    measure_along,
)

SHAPE = (1, 8, 8)


def make_net(seed: int = 0, channels: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.fixture
def models() -> dict[str, nn.Module]:
    return {"one": make_net(0), "two": make_net(1)}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(6, *SHAPE), torch.arange(6) % 3


@pytest.fixture
def measured(models: dict[str, nn.Module], batch: tuple[Tensor, Tensor]) -> dict[str, Measurements]:
    penalties = {"loss": Loss(), "gradient L1": GradNormPenalty(Linf(1.0)), "correlation": EdgeCorrelation()}
    return {name: measure(model, [batch], penalties, progress=False) for name, model in models.items()}


def drawn(figure: Figure) -> dict[str, Any]:
    """The lines of a figure's first axes, by their label."""
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


FIGURES: dict[str, Callable[[dict[str, nn.Module], tuple[Tensor, Tensor]], Figure]] = {
    "gradients": lambda models, batch: plots.gradients(models, *batch),
    "perturbations": lambda models, batch: plots.perturbations(models, *batch, FGSM(Linf(0.1), mode="eval")),
    "accuracy_curves": lambda models, batch: plots.accuracy_curves(
        {
            n: accuracy_curve(m, [batch], PGDAttack(Linf(0.1), steps=2), [0.1, 0.2], progress=False)
            for n, m in models.items()
        }
    ),
    "gradient_sizes": lambda models, batch: plots.gradient_sizes(
        gradient_histograms(models["one"], [batch], progress=False)
    ),
    "distributions": lambda models, batch: plots.distributions(
        {n: measure(m, [batch], [Loss()], progress=False) for n, m in models.items()}, "loss"
    ),
    "edge_scatter": lambda models, batch: plots.edge_scatter(models, batch[0][:1], batch[1][:1], EdgeCorrelation()),
    "along_attack": lambda models, batch: plots.along_attack(
        {
            n: measure_along(m, [batch], FGSM(Linf(0.1)), [0.0, 1.0], [Loss(), NormalizedCurvature(2)], progress=False)
            for n, m in models.items()
        },
        ["loss", "normalized curvature"],
    ),
    "convergence": lambda models, batch: plots.convergence(
        {n: HessianNorm(4).path(Point(m.eval(), cross_entropy, *batch)).detach() for n, m in models.items()}
    ),
    "accuracy_per_epoch": lambda models, batch: plots.accuracy_per_epoch({n: [10.0, 20.0] for n in models}),
    "front": lambda models, batch: plots.front({"one": (1.0, Proportion(3, 9)), "two": (2.0, Proportion(8, 9))}),
}


def test_every_plot_is_in_the_contract() -> None:
    public = {name for name, value in vars(plots).items() if getattr(value, "__module__", "") == "gradreg.plots"}
    assert {name for name in public if not name.startswith("_")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_is_a_picture_as_wide_as_a_page_with_labelled_axes(
    name: str, models: dict[str, nn.Module], batch: tuple[Tensor, Tensor]
) -> None:
    flags = [module.training for model in models.values() for module in model.modules()]
    state = torch.get_rng_state()
    figure = FIGURES[name](models, batch)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    assert figure.get_figwidth() <= plots.WIDTH
    if name not in ("gradients", "perturbations"):
        shared = figure._supxlabel.get_text() if figure._supxlabel else ""
        assert all(axes.get_xlabel() or shared for axes in figure.axes)
        assert figure.axes[0].get_ylabel()
    if name != "convergence":
        assert [module.training for model in models.values() for module in model.modules()] == flags
        assert torch.equal(torch.get_rng_state(), state)


def test_gradients_are_those_of_the_margin(models: dict[str, nn.Module], batch: tuple[Tensor, Tensor]) -> None:
    figure = plots.gradients(models, *batch, quantile=1.0)
    columns = [figure.axes[column::3] for column in range(3)]
    assert [axes[0].get_title() for axes in columns] == ["image", "one", "two"]
    for axes, model in zip(columns[1:], models.values(), strict=True):
        leaf = batch[0].clone().requires_grad_()
        expected = -input_gradient(margin(model.eval()(leaf), batch[1]), leaf, create_graph=False)
        for axis, gradient in zip(axes, expected, strict=True):
            (picture,) = axis.get_images()
            assert torch.allclose(torch.tensor(picture.get_array().data), gradient[0])
            assert picture.get_clim() == pytest.approx((-expected.abs().max().item(), expected.abs().max().item()))


def test_colour_images_and_flat_gradients() -> None:
    net = make_net(channels=3)
    x, y = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    figure = plots.gradients({"net": net}, x, y)
    assert all(axes.get_images()[0].get_array().shape == (8, 8, 3) for axes in figure.axes)
    nn.init.zeros_(net[-1].weight)
    (flat,) = plots.gradients({"net": net}, x[:1], y[:1]).axes[1].get_images()
    assert (flat.get_array() == 0.5).all()


def test_perturbations_say_what_became_of_the_image(models: dict[str, nn.Module], batch: tuple[Tensor, Tensor]) -> None:
    attack = PGDAttack(Linf(0.3), steps=5, seed=0)
    figure = plots.perturbations(models, *batch, attack)
    for column, model in enumerate(models.values(), start=1):
        found = model.eval()(attack(model, *batch)).argmax(1).tolist()
        texts = [axes.get_xlabel() for axes in figure.axes[column::3]]
        for text, guess, label in zip(texts, found, batch[1].tolist(), strict=True):
            assert text == ("robust" if guess == label else f"fooled: {guess}, not {label}")


def test_curves_are_accuracies_in_percent() -> None:
    curve = RobustnessCurve(list("abcd"), [0.0, 0.05, 0.15, math.inf], [0.1, 0.2])
    figure = plots.accuracy_curves({"net": curve})
    line = drawn(figure)["net"]
    assert line.get_xdata().tolist() == [0.0, 0.1, 0.2]
    assert line.get_ydata().tolist() == [75.0, 50.0, 25.0]
    (band,) = figure.axes[0].collections
    low, high = curve.accuracy(0.1).interval
    assert {round(100 * low, 6), round(100 * high, 6)} <= {round(v, 6) for v in band.get_paths()[0].vertices[:, 1]}
    distances = {"net": RobustnessCurve(list("abc"), [0.25, 0.5, math.inf], [])}
    figure = plots.accuracy_curves(distances, scale=2.0, xlabel="twice the radius")
    assert drawn(figure)["net"].get_xdata().tolist() == [0.0, 0.5, 1.0]
    assert figure.axes[0].get_xlabel() == "twice the radius"


def test_sizes_are_densities_and_say_how_many_are_zero() -> None:
    histogram = LogHistogram(bins_per_decade=2)
    histogram.add(torch.tensor([0.0, 1.0, 2.0, 20.0]))
    line = drawn(plots.gradient_sizes({"net": histogram}))["net, 25.0 % are 0"]
    assert line.get_ydata().tolist() == histogram.density()[1]


@pytest.mark.parametrize("name", ["loss", "gradient L1", "correlation"])
def test_distributions_hold_every_sample(measured: dict[str, Measurements], name: str) -> None:
    figure = plots.distributions(measured, name, bins=5)
    axes = figure.axes[0]
    assert name in axes.get_xlabel()
    lines = drawn(figure)
    for model, found in measured.items():
        heights = lines[model].get_ydata()
        assert sum(heights) / 2 == pytest.approx(100)
        medians = [line.get_xdata()[0] for line in axes.get_lines() if line.get_label().startswith("_")]
        assert any(torch.tensor(found.values[name]).median().item() == pytest.approx(value) for value in medians)
    assert axes.get_xscale() == ("linear" if "correlation" in name else "log")


def test_scatter_shows_the_pixels_and_the_correlation(
    models: dict[str, nn.Module], batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch[0][:1], batch[1][:1]
    statistic = EdgeCorrelation(edges_only=True, clamp=0.2)
    figure = plots.edge_scatter(models, x, y, statistic)
    for axes, (name, model) in zip(figure.axes, models.items(), strict=True):
        point = Point(model.eval(), cross_entropy, x, y)
        sizes, energies, counted = statistic.pixels(point)
        (dots,) = axes.collections
        expected = torch.stack([energies[counted], sizes[counted]], 1)
        assert torch.allclose(torch.tensor(dots.get_offsets().data), expected.detach())
        assert axes.get_title() == f"{name}\ncorrelation {statistic(point).item():+.2f}"


def test_scatter_of_a_flat_image_has_no_correlation(models: dict[str, nn.Module]) -> None:
    figure = plots.edge_scatter(models, torch.full((1, *SHAPE), 0.5), torch.tensor([0]), EdgeCorrelation())
    assert all("nan" in axes.get_title() for axes in figure.axes)


def test_along_an_attack_means_are_drawn(models: dict[str, nn.Module], batch: tuple[Tensor, Tensor]) -> None:
    along = {
        n: measure_along(m, [batch], FGSM(Linf(0.1)), [0.0, 2.0], [Loss()], progress=False) for n, m in models.items()
    }
    lines = drawn(plots.along_attack(along, ["loss"]))
    for name, found in along.items():
        assert lines[name].get_ydata().tolist() == [found[scale].summary("loss").mean for scale in (0.0, 2.0)]


def test_front_joins_what_nothing_cheaper_beats() -> None:
    points = {
        "natural": (1.0, Proportion(1, 10)),
        "dear and weak": (3.0, Proportion(4, 10)),
        "good": (2.0, Proportion(8, 10)),
        "best": (4.0, Proportion(9, 10)),
    }
    figure = plots.front(points)
    line = figure.axes[0].get_lines()[0]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(1.0, 10.0), (2.0, 80.0), (4.0, 90.0)]


def test_thirty_models_look_different() -> None:
    lines = drawn(plots.accuracy_per_epoch({f"model {k}": [float(k)] for k in range(30)}))
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines.values()}) == 30


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "gradreg.plots")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'gradreg\[plot\]'"):
        importlib.import_module("gradreg.plots")
