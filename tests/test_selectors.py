"""Class selectors: the distribution of what they choose, and their identity, by which gradients are shared."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor

from gradreg import ClassSelector, class_scores, predicted_class, sampled_class, true_class

SELECTORS: list[ClassSelector] = [true_class(), predicted_class(), sampled_class(), sampled_class(temperature=2.0)]
every_selector = pytest.mark.parametrize("selector", SELECTORS, ids=repr)
DRAWS = 20_000
LOGITS = torch.tensor([1.0, 0.5, 0.0, 1.5, 0.25])


def chi_square(chosen: Tensor, probabilities: Tensor) -> float:
    """Distance of the observed counts from the expected ones; a sum of as many squared normals as classes, less one."""
    expected = probabilities.double() * len(chosen)
    observed = torch.bincount(chosen, minlength=len(probabilities))
    return ((observed - expected).square() / expected).sum().item()


@pytest.mark.parametrize("temperature", [0.3, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sampled_class_follows_the_softmax(temperature: float, dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype).expand(DRAWS, -1)
    chosen = sampled_class(temperature)(logits, torch.zeros(DRAWS, dtype=torch.int64))
    assert chi_square(chosen, (LOGITS.double() / temperature).softmax(0)) < 35  # by chance once in a million


def test_sampled_class_tells_temperatures_apart() -> None:
    chosen = sampled_class(1.0)(LOGITS.expand(DRAWS, -1), torch.zeros(DRAWS, dtype=torch.int64))
    assert chi_square(chosen, (LOGITS / 0.9).softmax(0)) > 35


def test_samples_are_drawn_independently() -> None:
    """Of two neighbours in a batch, and of two calls, each pair of classes is as frequent as its product."""
    logits = torch.tensor([0.3, 0.0, -0.4]).expand(2 * DRAWS, -1)
    y = torch.zeros(2 * DRAWS, dtype=torch.int64)
    first, second = sampled_class(1.0)(logits, y), sampled_class(1.0)(logits, y)
    probabilities = logits[0].softmax(0)
    joint = torch.outer(probabilities, probabilities).flatten()
    assert chi_square(3 * first[::2] + first[1::2], joint) < 50
    assert chi_square(3 * first[::2] + second[::2], joint) < 50


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_cold_samples_are_predictions(temperature: float) -> None:
    logits, y = torch.randn(500, 10), torch.zeros(500, dtype=torch.int64)
    gaps = logits.topk(2).values
    clear = gaps[:, 0] - gaps[:, 1] > 0.05
    chosen = sampled_class(temperature)(logits, y)
    assert torch.equal(chosen[clear], predicted_class()(logits, y)[clear])


def test_hot_samples_are_uniform() -> None:
    chosen = sampled_class(1e6)(LOGITS.expand(DRAWS, -1), torch.zeros(DRAWS, dtype=torch.int64))
    assert chi_square(chosen, torch.full((5,), 0.2)) < 35


def test_impossible_classes_are_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0]).expand(DRAWS, -1)
    assert set(sampled_class(1.0)(logits, torch.zeros(DRAWS, dtype=torch.int64)).tolist()) == {0, 2}


def test_sampled_class_draws_from_the_default_generator() -> None:
    logits, y = torch.zeros(100, 10), torch.zeros(100, dtype=torch.int64)
    torch.manual_seed(1)
    first = sampled_class()(logits, y)
    assert not torch.equal(sampled_class()(logits, y), first)
    torch.manual_seed(1)
    assert torch.equal(sampled_class()(logits, y), first)


def test_sampled_class_ignores_the_labels() -> None:
    logits = torch.randn(100, 10)
    torch.manual_seed(1)
    first = sampled_class()(logits, torch.zeros(100, dtype=torch.int64))
    torch.manual_seed(1)
    assert torch.equal(sampled_class()(logits, torch.full((100,), 9)), first)


@pytest.mark.parametrize("temperature", [0.0, -0.5, math.nan])
def test_sampled_class_needs_a_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        sampled_class(temperature)


def test_true_class_of_labels_and_of_probabilities() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
    assert true_class()(logits, torch.tensor([2, 0])).tolist() == [2, 0]
    assert true_class()(logits, torch.tensor([[0.7, 0.0, 0.3], [0.1, 0.1, 0.8]])).tolist() == [0, 2]


def test_predicted_class_ignores_the_labels() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 1.0, 0.0]])
    assert predicted_class()(logits, torch.tensor([2, 2])).tolist() == [1, 0]


@every_selector
def test_selectors_choose_one_class_per_sample(selector: ClassSelector) -> None:
    logits = torch.randn(6, 4, requires_grad=True)
    for y in (torch.randint(0, 4, (6,)), torch.rand(6, 4)):
        chosen = selector(logits, y)
        assert chosen.shape == (6,)
        assert chosen.dtype == torch.int64
        assert not chosen.requires_grad
        assert ((chosen >= 0) & (chosen < 4)).all()


@every_selector
def test_equal_selectors_are_one_key(selector: ClassSelector) -> None:
    for other in (copy.deepcopy(selector), pickle.loads(pickle.dumps(selector)), eval(repr(selector))):
        assert other == selector
        assert hash(other) == hash(selector)
    assert sum(other == selector for other in SELECTORS) == 1


def test_selector_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ClassSelector()


def test_class_scores_are_the_logits_of_the_classes() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([6, 0, 3, 3, 1])
    scores = class_scores(logits, classes)
    assert scores.tolist() == [logits[sample, label].item() for sample, label in enumerate(classes.tolist())]
    (derivative,) = torch.autograd.grad(scores.sum(), logits)
    assert torch.equal(derivative, torch.nn.functional.one_hot(classes, 7).double())
