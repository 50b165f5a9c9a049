"""Criteria: against sums written out over numbers, and by the identities that make them worth ascending."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradreg import cross_entropy, dlr, kl_divergence, margin, targeted_dlr
from gradreg.criteria import is_classification

from cases import CLASSES, soft_labels
from strategies import powers_of_ten

Reference = Callable[[list[float], int, int], float]


def _margin(z: list[float], y: int, target: int) -> float:
    return max(logit for k, logit in enumerate(z) if k != y) - z[y]


def _dlr(z: list[float], y: int, target: int) -> float:
    first, _, third, *_ = sorted(z, reverse=True)
    return _margin(z, y, target) / (first - third)


def _targeted_dlr(z: list[float], y: int, target: int) -> float:
    first, _, third, fourth, *_ = sorted(z, reverse=True)
    return (z[target] - z[y]) / (first - (third + fourth) / 2)


def _cross_entropy(z: list[float], p: list[float]) -> float:
    log_sum = math.log(sum(math.exp(logit - max(z)) for logit in z)) + max(z)
    return sum(share * (log_sum - logit) for share, logit in zip(p, z, strict=True))


def _kl_divergence(z: list[float], p: list[float]) -> float:
    return _cross_entropy(z, p) - sum(-share * math.log(share) for share in p if share > 0)


REFERENCES: dict[str, tuple[Callable[..., Tensor], Reference, int]] = {
    "margin": (margin, _margin, 2),
    "dlr": (dlr, _dlr, 3),
    "targeted_dlr": (targeted_dlr, _targeted_dlr, 4),
}
CRITERIA = sorted(REFERENCES)


@st.composite
def batches(draw: st.DrawFn, at_least: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Logits without ties, of several scales, true classes, and targets that are other classes."""
    size, classes = draw(st.integers(1, 4)), draw(st.integers(at_least, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    scale = draw(powers_of_ten(-2, 2))
    logits = scale * torch.randn(size, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(0, classes, (size,), generator=generator)
    return logits, y, (y + torch.randint(1, classes, (size,), generator=generator)) % classes


def _labels(name: str, y: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """What a criterion takes besides the logits."""
    return (y, target) if name == "targeted_dlr" else (y,)


class TestReferences:
    @given(name=st.sampled_from(CRITERIA), data=st.data())
    def test_of_classes(self, name: str, data: st.DataObject) -> None:
        criterion, reference, at_least = REFERENCES[name]
        logits, y, target = data.draw(batches(at_least))
        found = criterion(logits, *_labels(name, y, target))
        rows = zip(logits.tolist(), y.tolist(), target.tolist(), strict=True)
        expected = torch.tensor([reference(*row) for row in rows], dtype=torch.float64)
        assert found.shape == y.shape
        assert torch.allclose(found, expected, rtol=1e-7, atol=1e-12)

    @given(batch=batches())
    def test_of_class_probabilities(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, _ = batch
        p = logits.flip(0).mul(0.7).softmax(1)
        rows = list(zip(logits.tolist(), p.tolist(), strict=True))
        entropies = torch.tensor([_cross_entropy(*row) for row in rows], dtype=torch.float64)
        divergences = torch.tensor([_kl_divergence(*row) for row in rows], dtype=torch.float64)
        assert torch.allclose(cross_entropy(logits, p), entropies, rtol=1e-9, atol=1e-12)
        assert torch.allclose(kl_divergence(logits, p), divergences, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", [*CRITERIA, "kl_divergence"])
    def test_gradients(self, name: str) -> None:
        logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        y, target = torch.tensor([0, 4, 2]), torch.tensor([3, 1, 0])
        if name == "kl_divergence":
            p = torch.randn(3, 5, dtype=torch.float64).softmax(1)
            assert torch.autograd.gradcheck(lambda z: kl_divergence(z, p), logits)
        else:
            assert torch.autograd.gradcheck(lambda z: REFERENCES[name][0](z, *_labels(name, y, target)), logits)


class TestMargins:
    @given(batch=batches(3))
    def test_margin_and_dlr_are_positive_just_where_a_sample_is_misclassified(
        self, batch: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        logits, y, _ = batch
        misclassified = logits.argmax(1) != y
        assert torch.equal(margin(logits, y) > 0, misclassified)
        assert torch.equal(dlr(logits, y).sign(), margin(logits, y).sign())

    @given(batch=batches(4))
    def test_targeted_dlr_is_positive_just_where_the_target_beats_the_true_class(
        self, batch: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        logits, y, target = batch
        rows = torch.arange(len(y))
        assert torch.equal(targeted_dlr(logits, y, target).sign(), (logits[rows, target] - logits[rows, y]).sign())

    @given(batch=batches(4), factor=powers_of_ten(-2, 2), shift=st.floats(-10, 10))
    def test_ratios_do_not_know_scale_and_shift_of_the_logits(
        self, batch: tuple[Tensor, Tensor, Tensor], factor: float, shift: float
    ) -> None:
        logits, y, target = batch
        moved = factor * logits + shift
        assert torch.allclose(dlr(moved, y), dlr(logits, y), rtol=1e-6)
        assert torch.allclose(targeted_dlr(moved, y, target), targeted_dlr(logits, y, target), rtol=1e-6)

    @pytest.mark.parametrize("name", ["dlr", "targeted_dlr"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_equal_logits_are_a_draw(self, name: str, dtype: torch.dtype) -> None:
        logits = torch.ones(2, 4, dtype=dtype, requires_grad=True)
        losses = REFERENCES[name][0](logits, *_labels(name, torch.tensor([0, 1]), torch.tensor([2, 3])))
        (grad,) = torch.autograd.grad(losses.sum(), logits)
        assert torch.equal(losses, torch.zeros_like(losses))
        assert bool(grad.isfinite().all())

    @pytest.mark.parametrize("name", ["dlr", "targeted_dlr"])
    def test_equal_best_logits_of_other_classes_are_a_finite_defeat(self, name: str) -> None:
        logits = torch.tensor([[10.0, 10.0, 10.0, 10.0, 0.0]])
        loss = REFERENCES[name][0](logits, *_labels(name, torch.tensor([4]), torch.tensor([0])))
        assert 1e6 < loss.item() < torch.inf


class TestDivergence:
    @given(batch=batches())
    def test_is_zero_at_the_prediction_itself_and_positive_elsewhere(
        self, batch: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        logits, y, _ = batch
        assert bool((kl_divergence(logits, logits.softmax(1)).abs() <= 1e-12).all())
        bumped = logits.scatter_add(1, y[:, None], torch.ones_like(logits))
        assert bool((kl_divergence(bumped, logits.softmax(1)) >= -1e-12).all())
        assert bool((kl_divergence(torch.zeros_like(logits), bumped.softmax(1)) > 0).all())

    @given(batch=batches())
    def test_has_the_gradient_of_cross_entropy(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        logits = batch[0].requires_grad_()
        p = torch.randn(logits.shape, dtype=torch.float64).softmax(1)
        grads = [torch.autograd.grad(loss(logits, p).sum(), logits)[0] for loss in (kl_divergence, cross_entropy)]
        assert torch.allclose(*grads, rtol=1e-9, atol=1e-12)

    def test_is_the_cross_entropy_of_classes(self) -> None:
        logits, y = torch.randn(5, CLASSES, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
        one_hot = torch.nn.functional.one_hot(y, CLASSES).double()
        assert torch.equal(kl_divergence(logits, y), cross_entropy(logits, y))
        assert torch.allclose(kl_divergence(logits, one_hot), cross_entropy(logits, y), rtol=1e-12)


class Focal(nn.CrossEntropyLoss):
    """A loss of classes by inheritance."""


class TestWhatIsKnown:
    """Labels are checked only where the criterion is known to take those of classes."""

    @pytest.mark.parametrize(
        "criterion",
        [
            cross_entropy, kl_divergence, margin, dlr, F.cross_entropy, F.nll_loss,
            nn.CrossEntropyLoss(reduction="none"), nn.NLLLoss(reduction="none"), Focal(reduction="none"),
        ],
    )  # fmt: skip
    def test_losses_of_classes(self, criterion: object) -> None:
        assert is_classification(criterion)

    @pytest.mark.parametrize(
        "criterion",
        [
            lambda logits, y: cross_entropy(logits, y),
            F.mse_loss, F.binary_cross_entropy_with_logits, F.gaussian_nll_loss,
            nn.MSELoss(reduction="none"), nn.BCEWithLogitsLoss(reduction="none"), nn.TripletMarginLoss(), [],
        ],
    )  # fmt: skip
    def test_anything_else(self, criterion: object) -> None:
        assert not is_classification(criterion)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CRITERIA)
class TestBadInput:
    def test_class_probabilities(self, name: str) -> None:
        y = torch.tensor([0, 1, 2])
        soft = soft_labels(y)
        with pytest.raises(ValueError, match="argmax"):
            REFERENCES[name][0](torch.randn(3, CLASSES), *_labels(name, soft, y))

    def test_too_few_classes(self, name: str) -> None:
        criterion, _, at_least = REFERENCES[name]
        y, target = torch.zeros(3, dtype=torch.int64), torch.full((3,), at_least - 1)
        assert criterion(torch.randn(3, at_least), *_labels(name, y, target)).shape == (3,)
        with pytest.raises(ValueError, match=f"at least {at_least}"):
            criterion(torch.randn(3, at_least - 1), *_labels(name, y, y))

    def test_logits_of_another_task(self, name: str) -> None:
        y = torch.zeros(3, dtype=torch.int64)
        with pytest.raises(ValueError, match="logits"):
            REFERENCES[name][0](torch.randn(3, 5, 2), *_labels(name, y, y))
