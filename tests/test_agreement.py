"""agreement: closed forms, a reference by hand, names of layers, and what is left as it was."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from gradreg import Agreement, Proportion, agreement, smoothify

FLOAT64 = torch.float64


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def batches(count: int, size: int = 10) -> list[Tensor]:
    return list(torch.randn(count, size, 4, dtype=FLOAT64))


def test_a_model_agrees_with_itself() -> None:
    model = nn.Sequential(net(), nn.Dropout(0.5), nn.BatchNorm1d(3).double())
    found = agreement(model, model, batches(3))
    assert found.same == Proportion(30, 30)
    assert found.kl == pytest.approx(0.0, abs=1e-12)
    assert set(found.layers.values()) == {0.0}
    assert found.first_to_differ is None


class Logits(nn.Module):
    """The same logits for every input."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.register_buffer("values", torch.tensor(values, dtype=FLOAT64))

    def forward(self, x: Tensor) -> Tensor:
        return self.values.expand(len(x), -1)


def test_the_divergence_of_two_coins() -> None:
    """Of p = (3/4, 1/4) from q = (1/2, 1/2) it is 3/4 log 3/2 + 1/4 log 1/2, and not symmetric."""
    p, q = Logits(math.log(3), 0.0), Logits(0.0, 0.0)
    x = torch.zeros(5, 1)
    assert agreement(p, q, [x]).kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert agreement(q, p, [x]).kl == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))


def test_a_constant_in_the_logits_changes_no_prediction() -> None:
    found = agreement(Logits(1.0, 2.0, 3.0), Logits(501.0, 502.0, 503.0), [torch.zeros(5, 1)])
    assert (found.same, found.kl) == (Proportion(5, 5), pytest.approx(0.0, abs=1e-9))


@torch.no_grad()
def test_it_equals_a_loop_by_hand() -> None:
    original, x = net(), torch.cat(batches(3))
    smooth = smoothify(original)
    p, q = original(x).softmax(1), smooth(x).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean().item()
    same = int((p.argmax(1) == q.argmax(1)).sum())
    found = agreement(original, smooth, x.split(10))
    assert found.same == Proportion(same, 30)
    assert found.kl == pytest.approx(kl)
    first = x[:10]
    hidden, other = original[0](first), smooth[1](smooth[0](first))
    expected = {
        "0": 0.0,
        "1": (other - hidden.relu()).norm() / hidden.relu().norm(),
        "2": (smooth(first) - original(first)).norm() / original(first).norm(),
    }
    assert list(found.layers) == list(expected)
    assert found.layers == pytest.approx({name: float(share) for name, share in expected.items()})
    assert found.first_to_differ == next(name for name, share in expected.items() if share > 0.1)


@pytest.mark.parametrize("sizes", [[30], [10, 10, 10], [1, 29], [7, 7, 7, 7, 2]])
def test_how_the_inputs_are_batched_changes_nothing_but_the_layers(sizes: list[int]) -> None:
    original, x = net(), torch.cat(batches(3))
    smooth = smoothify(original)
    whole, parts = agreement(original, smooth, [x]), agreement(original, smooth, x.split(sizes))
    assert parts.same == whole.same
    assert parts.kl == pytest.approx(whole.kl)
    assert parts.layers == agreement(original, smooth, [x[: sizes[0]]]).layers


def test_sharper_twins_agree_better() -> None:
    original, x = net(), torch.cat(batches(20))
    divergences = [agreement(original, smoothify(original, sharpness=b), [x]).kl for b in (1.0, 4.0, 16.0, 64.0)]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < divergences[0] / 100


def test_batches_may_be_pairs_and_a_loader() -> None:
    original, x = net(), torch.cat(batches(3))
    smooth, labels = smoothify(original), torch.zeros(30)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=10)
    expected = agreement(original, smooth, x.split(10))
    assert agreement(original, smooth, loader) == expected
    assert agreement(original, smooth, ((part, None) for part in x.split(10))) == expected


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.twice, self.blocks = nn.Linear(4, 3), nn.ReLU(), nn.ModuleList([nn.Linear(4, 4), nn.Identity()])
        self.unused, self.pair = nn.ReLU(), Pair()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.blocks[0](self.twice(x)))
        self.pair(x)
        return self.last(self.blocks[1](x))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_layers_are_named_in_the_order_in_which_they_end_and_those_that_run_twice_once() -> None:
    original, x = Named(), torch.randn(10, 4)
    found = agreement(original, smoothify(original), [x])
    assert list(found.layers) == ["blocks.0", "twice", "blocks.1", "last"]
    nested = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Identity())
    assert list(agreement(nested, smoothify(nested), [x]).layers) == ["0.0", "0.1", "0", "1"]


def test_layers_that_only_one_of_them_has_are_left_out() -> None:
    original, x = net(), batches(1)
    other = nn.Sequential(*original, nn.Identity())
    other[1] = nn.Sequential(nn.GELU(), nn.Identity())
    assert list(agreement(original, other, x).layers) == ["0", "1", "2"]
    wider = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).double()
    assert list(agreement(original, wider, x).layers) == ["2"]


def test_both_are_compared_in_evaluation_mode_and_get_their_modes_and_everything_else_back() -> None:
    original = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    original[1].eval()
    smooth = smoothify(original)
    smooth[3].eval()
    states = [[module.training for module in model.modules()] for model in (original, smooth)]
    hooks = [[len(module._forward_hooks) for module in model.modules()] for model in (original, smooth)]
    before = {key: value.clone() for key, value in original.state_dict().items()}
    x, random_numbers = batches(2), torch.get_rng_state()
    found = agreement(original, smooth, x)
    assert agreement(original, smooth, x) == found
    assert agreement(original.eval(), smooth.eval(), x) == found
    original.train()
    original[1].eval()
    smooth.train()
    smooth[1].eval()
    smooth[3].eval()
    assert [[module.training for module in model.modules()] for model in (original, smooth)] == states
    assert [[len(module._forward_hooks) for module in model.modules()] for model in (original, smooth)] == hooks
    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_numbers)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in original.parameters())


def test_flags_come_back_after_the_call_and_after_an_error() -> None:
    original, smooth = net(), smoothify(net())
    smooth[1].eval()
    for inputs in (batches(1), [torch.ones(2, 5, dtype=FLOAT64)]):
        try:
            agreement(original, smooth, inputs)
        except RuntimeError:
            assert inputs[0].shape == (2, 5)
        assert [module.training for module in original] == [True, True, True]
        assert [module.training for module in smooth] == [True, False, True]
        assert not any(module._forward_hooks for model in (original, smooth) for module in model.modules())


def test_a_model_that_returns_its_logits_in_something() -> None:
    model = torchvision.models.googlenet(weights=None, num_classes=10, init_weights=False)
    found = agreement(model, smoothify(model, sharpness=1e3), [torch.rand(2, 3, 64, 64)])
    assert found.same == Proportion(2, 2)

    class Output(nn.Module):
        def forward(self, x: Tensor) -> object:
            return type("Output", (), {"logits": x})

    assert agreement(Output(), nn.Identity(), batches(1)).kl == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    original, x = net().to(dtype), batches(1)[0].to(dtype)
    found = agreement(original, smoothify(original), [x])
    reference = agreement(original.double(), smoothify(original.double()), [x.double()])
    assert found.kl == pytest.approx(reference.kl, abs=1e-3, rel=0.3)


@pytest.mark.parametrize("empty", [[], ()])
def test_without_batches_there_is_nothing_to_say(empty: object) -> None:
    with pytest.raises(ValueError, match="no batches"):
        agreement(net(), net(), empty)


def test_what_is_no_classifier_is_refused(unchecked: None) -> None:
    x = torch.randn(2, 4)
    for model in (nn.Unflatten(1, (2, 2)), Pair(), nn.Flatten(0)):
        with pytest.raises(TypeError, match="logits"):
            agreement(model, model, [x])
    with pytest.raises(TypeError):
        agreement(F.relu, F.gelu, [x])


def test_it_is_shown_with_the_first_layer_that_differs() -> None:
    alike = Agreement(Proportion(9, 10), 0.25, {"a": 0.05, "b": 0.1})
    assert alike.first_to_differ is None
    assert "0.25" in str(alike)
    apart = Agreement(Proportion(9, 10), 0.25, {"a": 0.05, "b": 0.5, "c": 0.9})
    assert apart.first_to_differ == "b"
    assert "'b'" in str(apart)
    assert "50%" in str(apart)
