"""Inputs, labels and outputs of any structure: what is perturbed, what follows the samples, and what passes through."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradreg import (
    NFGSM,
    DoubleBackward,
    FiniteDifference,
    GradNormPenalty,
    Linf,
    PenalizedLoss,
    PGDAttack,
    Term,
    cross_entropy,
)
from gradreg.trees import Inputs, joined, taken, usable

from cases import CLASSES, make_batch, parameters_of, relative_error

Pair = namedtuple("Pair", ["first", "second"])
TERMS = {"p": Term(GradNormPenalty(Linf(0.1)), 1.2)}


class Output(OrderedDict[str, Tensor]):
    """As Transformers returns it: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error


class WithMetadata(nn.Module):
    """A network of an image and of some numbers about it."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.metadata, self.head = nn.Linear(72, 12), nn.Linear(3, 12), nn.Linear(12, CLASSES)

    def forward(self, image: Tensor, metadata: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(F.gelu(self.image(image.flatten(1)) + scale * self.metadata(metadata)))


def _model() -> WithMetadata:
    torch.manual_seed(0)
    return WithMetadata().double()


def _inputs(count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    x, y = make_batch(count)
    return x, torch.randn(count, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), y


def _gradient(objective: PenalizedLoss, model: nn.Module, x: Any, y: Any) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(objective(model, x, y).total, parameters_of(model)))


class TestInputs:
    def test_a_tensor_is_given_alone(self) -> None:
        x = torch.rand(2, 3)
        assert Inputs(x).given_to(lambda z: z, 2 * x).equal(2 * x)

    def test_a_tuple_is_given_as_arguments(self) -> None:
        numbers, x = torch.tensor([1, 2]), torch.rand(2, 3)
        inputs = Inputs((numbers, x, "label"))
        assert inputs.x is x  # the first one of real numbers
        assert inputs.given_to(lambda *args: args, -x) == (numbers, pytest.approx(-x), "label")

    def test_a_mapping_is_given_by_name(self) -> None:
        x, mask = torch.rand(2, 3), torch.ones(2, 3)
        inputs = Inputs({"attention_mask": mask, "inputs_embeds": x}, "inputs_embeds")
        given = inputs.given_to(lambda **kwargs: kwargs, -x)
        assert given["inputs_embeds"].equal(-x)
        assert given["attention_mask"] is mask

    @pytest.mark.parametrize(
        ("whole", "name"),
        [
            ((torch.tensor([1]),), None),
            ({"a": torch.rand(2), "b": torch.rand(2)}, None),
            ({"a": torch.rand(2)}, "b"),
            ((torch.rand(2), 3), 1),
            ("x", None),
        ],
    )
    def test_without_a_tensor_to_perturb(self, whole: Any, name: str | int | None) -> None:
        with pytest.raises(TypeError, match="perturb"):
            Inputs(whole, name)

    def test_other_entries_follow_the_samples(self) -> None:
        x, mask = torch.rand(4, 3), torch.arange(4)
        part = Inputs({"x": x, "mask": mask, "names": list("abcd"), "temperature": 2.0}).rows(torch.tensor([2, 0]))
        assert part.x.equal(x[[2, 0]])
        given = part.given_to(lambda **kwargs: kwargs, part.x)
        assert given["mask"].tolist() == [2, 0]
        assert given["names"] == ["c", "a"]
        assert given["temperature"] == 2.0


class TestTrees:
    @pytest.mark.parametrize(
        "tree",
        [
            torch.arange(5),
            (torch.arange(5), 0.3),
            {"boxes": torch.rand(5, 2), "scale": torch.tensor(2.0), "k": None},
            Pair(torch.arange(5), [torch.rand(5, 1), torch.rand(5)]),
            Output(logits=torch.rand(5, 3), hidden=torch.rand(5, 2)),
        ],
    )
    def test_parts_join_to_the_whole(self, tree: Any) -> None:
        rows = torch.tensor([3, 1, 4, 0, 2]).split([2, 3])
        found = joined([taken(tree, part, 5) for part in rows], rows)
        assert type(found) is type(tree)
        assert str(found) == str(tree)

    def test_what_belongs_to_the_batch_stays(self) -> None:
        lam, weights = torch.tensor(0.3), torch.rand(7)
        found = taken((torch.arange(5), lam, weights, "mixup", None), torch.tensor([1]), 5)
        assert found[0].tolist() == [1]
        assert found[1:] == (lam, weights, "mixup", None)

    def test_a_list_of_targets_follows_the_samples(self) -> None:
        """As detectors have them: a dictionary for each image, whose boxes may be as many as there are images."""
        targets = [{"boxes": torch.rand(4, 4), "label": torch.tensor(k)} for k in range(4)]
        rows = torch.tensor([3, 1, 0, 2]).split([1, 3])
        parts = [taken((targets, 0.5), part, 4) for part in rows]
        assert [entry["label"].item() for entry in parts[1][0]] == [1, 0, 2]
        assert all(entry["boxes"].shape == (4, 4) for entry in parts[1][0])
        assert [entry["label"].item() for entry in joined(parts, rows)[0]] == [0, 1, 2, 3]

    def test_tensors_of_inference_mode_are_copied(self) -> None:
        with torch.inference_mode():
            tree = {"a": torch.rand(2), "b": (torch.rand(2), 3)}
        found = usable(tree)
        assert not found["a"].is_inference()
        assert not found["b"][0].is_inference()
        assert found["b"][1] == 3


OBJECTIVES = {
    "exact": lambda **options: PenalizedLoss(terms=TERMS, **options),
    "fraction": lambda **options: PenalizedLoss(terms=TERMS, fraction=0.5, **options),
    "finite difference": lambda **options: PenalizedLoss(terms=TERMS, differentiation=FiniteDifference(), **options),
    "recommended": lambda **options: PenalizedLoss(at=NFGSM(Linf(0.1), share=0.5), **options),
    "PGD": lambda **options: PenalizedLoss(at=PGDAttack(Linf(0.1), steps=2, best=False), **options),
}


@pytest.mark.parametrize("name", OBJECTIVES)
class TestObjective:
    def test_of_an_image_and_metadata(self, name: str) -> None:
        """The reference is a model of one tensor, which holds image and metadata, with a radius of 0 for the latter."""
        model, (x, metadata, y) = _model(), _inputs()
        together = torch.cat([x.flatten(1), metadata], 1)

        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, z: Tensor) -> Tensor:
                return self.model(z[:, :72], z[:, 72:])

        forms = [
            _gradient(OBJECTIVES[name](), model, (x, metadata), y),
            _gradient(OBJECTIVES[name](perturb=0), model, [x, metadata], y),
            _gradient(OBJECTIVES[name](perturb="image"), model, {"metadata": metadata, "image": x}, y),
            _gradient(OBJECTIVES[name](perturb="image"), model, {"image": x, "scale": 1.0, "metadata": metadata}, y),
        ]
        assert all(relative_error(form, forms[0]) < 1e-12 for form in forms[1:])
        if name in ("exact", "finite difference"):  # whose random numbers do not depend on the shape of x
            radius = torch.cat([torch.full((1, 72), 0.1, dtype=x.dtype), torch.zeros(1, 3, dtype=x.dtype)], 1)
            terms = {"p": Term(GradNormPenalty(Linf(radius)), 1.2)}
            how = DoubleBackward() if name == "exact" else FiniteDifference()
            expected = _gradient(PenalizedLoss(terms=terms, differentiation=how), Flat(), together, y)
            assert relative_error(forms[0], expected) < 1e-12

    def test_of_mixup_labels(self, name: str) -> None:
        model, (x, metadata, ya) = _model(), _inputs()
        yb, lam = ya.flip(0), 0.3

        def mixed(logits: Tensor, y: tuple[Tensor, Tensor, float]) -> Tensor:
            return y[2] * cross_entropy(logits, y[0]) + (1 - y[2]) * cross_entropy(logits, y[1])

        found = _gradient(OBJECTIVES[name](criterion=mixed), model, (x, metadata), (ya, yb, lam))
        soft = lam * F.one_hot(ya, CLASSES).double() + (1 - lam) * F.one_hot(yb, CLASSES).double()
        assert relative_error(found, _gradient(OBJECTIVES[name](), model, (x, metadata), soft)) < 1e-12

    def test_of_no_labels(self, name: str) -> None:
        """An energy, or a label-free distance between two of the model's outputs."""
        model, (x, metadata, _) = _model(), _inputs()
        objective = OBJECTIVES[name](criterion=lambda logits, y: logits.logsumexp(1))
        torch.manual_seed(1)
        objective(model, (x, metadata)).total.backward()
        assert model.image.weight.grad.any()

    @pytest.mark.parametrize("form", ["mapping", "dataclass", "both", "function"])
    def test_of_an_output_that_is_no_tensor(self, name: str, form: str) -> None:
        @dataclass
        class Result:
            logits: Tensor
            hidden: Tensor | None = None

        class Wrapped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = _model()

            def forward(self, image: Tensor, metadata: Tensor) -> Any:
                logits = self.model(image, metadata)
                made = {
                    "mapping": lambda: {"hidden": image, "logits": logits},
                    "dataclass": lambda: Result(logits, image),
                    "both": lambda: Output(hidden=image, logits=logits),
                    "function": lambda: (image, [logits]),
                }
                return made[form]()

        x, metadata, y = _inputs()
        options = {"output": lambda output: output[1][0]} if form == "function" else {}
        found = _gradient(OBJECTIVES[name](**options), Wrapped(), (x, metadata), y)
        assert relative_error(found, _gradient(OBJECTIVES[name](), _model(), (x, metadata), y)) < 1e-12

    def test_of_an_output_that_only_the_criterion_understands(self, name: str) -> None:
        """Gaussian negative log-likelihood of a model that returns mean and variance."""

        class Gaussian(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.body, self.heads = nn.Linear(72, 12), nn.ModuleList([nn.Linear(12, 1), nn.Linear(12, 1)])

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                h = F.gelu(self.body(x.flatten(1)))
                return self.heads[0](h), F.softplus(self.heads[1](h))

        def criterion(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
            return F.gaussian_nll_loss(output[0], y, output[1], reduction="none").squeeze(1)

        x, y = make_batch(6)[0], torch.rand(6, 1, dtype=torch.float64)
        objective = OBJECTIVES[name](criterion=criterion)
        torch.manual_seed(1)
        out = objective(Gaussian().double(), x, y)
        out.total.backward()
        assert [part.shape for part in out.logits] == [(6, 1), (6, 1)]

    def test_of_a_random_model_the_parts_keep_their_order(self, name: str) -> None:
        """Where parts of the batch take passes of their own, their outputs come back in the order of the batch."""

        class Dropped(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.body = nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES), nn.Dropout(1e-9))

            def forward(self, x: Tensor) -> dict[str, Tensor]:
                return {"logits": self.body(x), "index": x[:, 0, 0, 0]}

        x, y = make_batch(6)
        model = Dropped().double()
        out = OBJECTIVES[name]()(model, x, y)
        assert torch.allclose(out.logits, model(out.x)["logits"], rtol=1e-12)
        assert torch.allclose(out.loss, cross_entropy(out.logits, y).mean(), rtol=1e-12)


def test_labels_are_checked_only_where_the_criterion_is_known() -> None:
    model, (x, metadata, y) = _model(), _inputs()
    wrong = y.clone()
    wrong[0] = -100
    for criterion in (cross_entropy, nn.CrossEntropyLoss(reduction="none"), F.cross_entropy):
        if criterion is not F.cross_entropy:
            with pytest.raises(ValueError, match="-100"):
                PenalizedLoss(criterion, TERMS)(model, (x, metadata), wrong)
    out = PenalizedLoss(lambda logits, y: F.cross_entropy(logits, y, reduction="none"), TERMS)(
        model, (x, metadata), wrong
    )
    assert torch.isfinite(out.total)


@pytest.mark.parametrize("y", [None, (torch.tensor([0]),), {"y": 3}])
def test_labels_that_a_classification_cannot_take_are_named(y: Any) -> None:
    model, (x, metadata, _) = _model(), _inputs()
    with pytest.raises(TypeError, match="criterion"):
        PenalizedLoss(terms=TERMS)(model, (x, metadata), y)
