"""The input gradient: against the definition, and its errors."""

import pytest
import torch
from torch import nn

from gradreg import input_gradient, input_gradient_of
from gradreg.gradients import in_transform

from cases import MODELS, make_batch, make_model, per_sample_cross_entropy, relative_error


def _one_by_one(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The definition: each sample's loss alone, differentiated with respect to that sample alone."""

    def loss(sample: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return per_sample_cross_entropy(model(sample[None]), label[None])[0]

    return torch.stack([torch.func.grad(loss)(sample, label) for sample, label in zip(x, y, strict=True)])


@pytest.mark.parametrize("name", [name for name in MODELS if name != "batch_norm_train"])
def test_equals_the_gradient_of_each_sample_alone(name: str) -> None:
    model, (x, y) = make_model(name), make_batch()
    x.requires_grad_()
    grad = input_gradient(per_sample_cross_entropy(model(x), y), x)
    assert grad.shape == x.shape
    assert relative_error(grad, _one_by_one(model, x.detach(), y)) < 1e-12


@pytest.mark.parametrize("shape", [(3, 7), (3, 2, 5), (3, 1, 4, 4), (2, 3, 4, 2, 2)])
def test_takes_samples_of_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    grad = input_gradient((x**3).flatten(1).sum(1), x)
    assert torch.allclose(grad, 3 * x**2)


def test_batch_norm_in_training_mode_gives_the_gradient_of_the_summed_losses() -> None:
    model, (x, y) = make_model("batch_norm_train"), make_batch()
    x.requires_grad_()
    losses = per_sample_cross_entropy(model(x), y)
    coupled = sum(torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in losses)
    assert relative_error(input_gradient(losses, x), coupled) < 1e-12


def test_create_graph_decides_whether_the_result_can_be_differentiated() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    x.requires_grad_()
    losses = per_sample_cross_entropy(model(x), y)
    assert input_gradient(losses, x).requires_grad
    assert not input_gradient(losses, x, create_graph=False).requires_grad


def test_touches_no_parameter_gradient_and_leaves_the_graph_alive() -> None:
    model, (x, y) = make_model("conv"), make_batch()
    x.requires_grad_()
    losses = per_sample_cross_entropy(model(x), y)
    input_gradient(losses, x, create_graph=False)
    assert x.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    losses.mean().backward()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "batch_norm_train"])
def test_the_transform_equals_the_eager_form(name: str) -> None:
    model, (x, y) = make_model(name), make_batch()
    transformed, losses = input_gradient_of(lambda z: per_sample_cross_entropy(model(z), y), x)
    leaf = x.clone().requires_grad_()
    eager_losses = per_sample_cross_entropy(model(leaf), y)
    assert torch.allclose(losses, eager_losses)
    assert relative_error(transformed, input_gradient(eager_losses, leaf)) < 1e-12


def test_second_derivatives_are_right() -> None:
    model, (x, y) = make_model("mlp"), make_batch(2)
    x.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: per_sample_cross_entropy(model(z), y), (x,))


@pytest.mark.usefixtures("unchecked")
class TestErrors:
    def test_averaged_loss(self) -> None:
        x = torch.rand(3, 2, requires_grad=True)
        with pytest.raises(ValueError, match="reduction"):
            input_gradient(x.sum(), x)
        with pytest.raises(ValueError, match="reduction"):
            input_gradient_of(lambda z: z.sum(), x)

    def test_loss_of_the_wrong_shape(self) -> None:
        x = torch.rand(3, 2, requires_grad=True)
        with pytest.raises(ValueError, match=r"\(3, 2\)"):
            input_gradient(x * 2, x)

    def test_input_that_does_not_require_grad(self) -> None:
        x = torch.rand(3, 2)
        with pytest.raises(RuntimeError, match="requires_grad_"):
            input_gradient((x * torch.ones(2, requires_grad=True)).sum(1), x)

    def test_losses_without_a_graph(self) -> None:
        x = torch.rand(3, 2, requires_grad=True)
        with torch.no_grad():
            losses = x.sum(1)
        with pytest.raises(RuntimeError, match="no_grad"):
            input_gradient(losses, x)

    def test_losses_of_another_tensor(self) -> None:
        x = torch.rand(3, 2, requires_grad=True)
        other = torch.rand(3, 2, requires_grad=True)
        with pytest.raises(RuntimeError, match="depend"):
            input_gradient(other.sum(1), x)

    @pytest.mark.parametrize(
        ("problem", "fix"), [("non-empty donated buffers", "donated_buffer = False"), ("any", "preflight")]
    )
    def test_a_backward_pass_that_raises(self, problem: str, fix: str) -> None:
        x = torch.rand(3, 2, requires_grad=True)
        losses = x.sum(1)

        def refuse(grad: torch.Tensor) -> None:
            raise RuntimeError(problem)

        losses.register_hook(refuse)
        with pytest.raises(RuntimeError, match=fix) as raised:
            input_gradient(losses, x)
        assert str(raised.value.__cause__) == problem
        assert problem in str(raised.value)


def test_in_transform_knows_where_it_is() -> None:
    seen = []

    def probe(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_transform())
        return x.sum()

    probe(torch.ones(2))
    torch.func.grad(probe)(torch.ones(2))
    torch.vmap(probe)(torch.ones(2, 2))
    probe(torch.ones(2))
    assert seen == [False, True, True, False]
