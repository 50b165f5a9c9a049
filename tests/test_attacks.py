"""Attacks: at the known optimum of a linear model, inside their sets, reproducible, and without side effects."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradreg import (
    FGSM,
    L1,
    L2,
    NFGSM,
    APGDAttack,
    Attack,
    GradregWarning,
    IteratedAttack,
    Linf,
    Noise,
    PenalizedLoss,
    PGDAttack,
    TargetedAPGDAttack,
    ThreatModel,
    apgd,
    dlr,
    margin,
    pgd,
    targeted_dlr,
    with_normalization,
)
from gradreg.attacks import iterated
from gradreg.attacks.adaptive import Halving

from cases import CLASSES, make_batch, make_model, per_sample_cross_entropy, soft_labels

THREATS = {"Linf": Linf(0.1), "L2": L2(0.5), "L1": L1(2.0)}
ATTACKS: dict[str, Attack] = {
    "PGD": PGDAttack(Linf(0.1), steps=3),
    "PGD L2": PGDAttack(L2(0.5), steps=3),
    "PGD L1": PGDAttack(L1(2.0), steps=3),
    "FGSM": FGSM(Linf(0.1)),
    "N-FGSM": NFGSM(Linf(0.1), noise=1.0),
    "noise": Noise(Linf(0.1)),
    "APGD": APGDAttack(Linf(0.1), steps=6),
    "APGD L2": APGDAttack(L2(0.5), steps=6),
    "APGD L1": APGDAttack(L1(2.0), steps=6),
    "APGD-T": TargetedAPGDAttack(Linf(0.1), steps=6),
    "APGD-T halving": TargetedAPGDAttack(Linf(0.1), steps=6, halving=True),
}
SEARCHES = {"PGD": pgd, "APGD": apgd}


def _greedy(slope: Tensor, room: Tensor, eps: float) -> Tensor:
    """The optimum of a linear function in an L1 ball and a box: fill the steepest coordinates to their limits."""
    delta, left = torch.zeros_like(slope), eps
    for coordinate in slope.abs().argsort(descending=True):
        move = min(left, float(room[coordinate]))
        delta[coordinate] = move * slope[coordinate].sign()
        left -= move
    return delta


def _bisected(slope: Tensor, room: Tensor, eps: float) -> Tensor:
    """The optimum of a linear function in an L2 ball and a box: a multiple of the slope, cut at the limits."""
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        inside = torch.minimum(middle * slope.abs(), room).norm() <= eps
        low, high = (middle, high) if inside else (low, middle)
    return slope.sign() * torch.minimum(low * slope.abs(), room)


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a function of one sample."""
    leaf = at.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return grad


def _halved_ascent(
    function: Callable[[Tensor], Tensor], threat: ThreatModel, start: Tensor, checkpoints: list[int], steps: int
) -> list[Tensor]:
    """Where APGD goes with one sample and no bounds: algorithm 1 of Croce & Hein (ICML 2020), literally."""
    points, values = [start], [float(function(start))]
    here, before, eta, halved_before, top_before, last = start, start, 2.0, True, -math.inf, 0
    for step in range(1, steps + 1):
        ahead = threat.project(here + eta * threat.maximizer(_slope(function, here)))
        moved = ahead if step == 1 else threat.project(here + 0.75 * (ahead - here) + 0.25 * (here - before))
        points.append(moved)
        values.append(float(function(moved)))
        here, before = moved, here
        if step in checkpoints:
            rose = sum(values[i] > values[i - 1] for i in range(last + 1, step + 1))
            stuck = not halved_before and max(values) == top_before
            halved_before = rose <= 0.75 * (step - last) or stuck
            if halved_before:
                eta, here = eta / 2, points[values.index(max(values))]
            top_before, last = max(values), step
    return points


def _thinned_ascent(
    function: Callable[[Tensor], Tensor], threat: L1, start: Tensor, every: int, steps: int
) -> list[Tensor]:
    """Where APGD goes in L1 with one sample and no bounds, by section 3 of Croce & Hein (ICML 2021)."""
    points, values = [start], [float(function(start))]
    here, eta, share, count_before = start, 1.0, 0.2, float(start.numel())
    for step in range(1, steps + 1):
        stride = L1(eta * threat.eps, share)
        here = threat.project(here + stride.ascent(_slope(function, here), here))
        points.append(here)
        values.append(float(function(here)))
        if step % every == 0:
            top = points[values.index(max(values))]
            count = float((top != 0).sum())
            if count / count_before < 0.95:
                eta, here = 1.0, top
            else:
                eta = max(eta / 1.5, 0.1)
            share, count_before = count / start.numel() / 1.5, count
    return points


class TestLinearOptimum:
    """A linear function has its maximum over ball and box in closed form."""

    @pytest.mark.parametrize("search", SEARCHES)
    @pytest.mark.parametrize("threat", [Linf(0.3), L2(0.9), L1(1.7)])
    @pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
    @pytest.mark.parametrize("seed", range(3))
    def test_is_reached(self, search: str, threat: ThreatModel, bounds: tuple[float, float] | None, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(4, 12, generator=generator, dtype=torch.float64)
        slope = torch.randn(4, 12, generator=generator, dtype=torch.float64)
        room = torch.full_like(x, torch.inf) if bounds is None else torch.where(slope > 0, 1 - x, x)
        if isinstance(threat, Linf):
            expected = slope.sign() * room.clamp(max=threat.eps)
        else:
            solve = _bisected if isinstance(threat, L2) else _greedy
            expected = torch.stack([solve(s, r, threat.eps) for s, r in zip(slope, room, strict=True)])
        best = (slope * expected).sum(1)

        steps = {"steps": 400, "step_size": 0.02} if search == "PGD" else {"steps": 100}
        options = {"bounds": bounds, **steps}
        x_adv = SEARCHES[search](lambda z, rows: (z * slope[rows]).sum(1), x, threat, **options)
        reached = (slope * (x_adv - x)).sum(1)
        assert bool((reached <= best + 1e-9).all())
        if search == "PGD":
            # In L1 the projection takes from full coordinates too: it ends a fraction of a step from the optimum.
            tolerance = {Linf: 1e-9, L2: 5e-5, L1: 0.02 / 1.7}[type(threat)]
        else:
            tolerance = 0.03 if isinstance(threat, L1) and bounds else 1e-9
        assert torch.allclose(reached, best, rtol=tolerance)

    @pytest.mark.parametrize("threat", [Linf(0.05), L2(0.2), L1(0.4)])
    def test_gives_the_exact_robust_accuracy_of_a_linear_classifier(self, threat: ThreatModel) -> None:
        """A sample is robust if and only if its margin exceeds the dual norm of the weights."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(200, 8, generator=generator, dtype=torch.float64)
        weight = torch.randn(8, generator=generator, dtype=torch.float64)
        score = (x - 0.5) @ weight
        y = (score > 0).long()

        def model(z: Tensor) -> Tensor:
            value = (z - 0.5) @ weight
            return torch.stack([-value, value], 1)

        robust = score.abs() > threat.dual_norm(weight.expand(200, 8))
        assert 0 < robust.double().mean() < 1
        pgd_attack = PGDAttack(threat, steps=100, step_size=threat.eps / 10, bounds=None)
        for attack in (pgd_attack, APGDAttack(threat, bounds=None)):
            assert torch.equal(model(attack(model, x, y)).argmax(1) == y, robust)


class TestSets:
    @given(
        search=st.sampled_from(sorted(SEARCHES)),
        name=st.sampled_from(sorted(THREATS)),
        seed=st.integers(0, 2**31),
        best=st.booleans(),
    )
    def test_the_result_is_inside_ball_and_bounds(self, search: str, name: str, seed: int, best: bool) -> None:
        threat, find = THREATS[name], SEARCHES[search]
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(3, 2, 4, 4, generator=generator)
        weight = torch.randn(2, 4, 4, generator=generator)
        x_adv = find(lambda z, rows: (z * weight).flatten(1).sum(1).sin(), x, threat, steps=6, best=best, seed=seed)
        assert bool((threat.norm(x_adv - x) <= 1 + 1e-5).all())
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())

    @pytest.mark.parametrize("kind", [PGDAttack, APGDAttack])
    def test_eps_per_sample_and_per_channel_are_each_alone(self, kind: type[IteratedAttack]) -> None:
        model, (x, y) = make_model("conv"), make_batch(3)
        per_sample = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64).view(3, 1, 1, 1)
        together = kind(Linf(per_sample), steps=4, random_start=False)(model, x, y)
        for row, eps in enumerate((0.02, 0.05, 0.1)):
            alone = kind(Linf(eps), steps=4, random_start=False)(model, x[row : row + 1], y[row : row + 1])
            assert torch.allclose(together[row : row + 1], alone, atol=1e-9)
        per_channel = torch.tensor([0.02, 0.1], dtype=torch.float64).view(2, 1, 1)
        moved = (kind(Linf(per_channel), steps=4)(model, x, y) - x).abs().amax((0, 2, 3))
        assert bool((moved <= torch.tensor([0.02, 0.1]) + 1e-9).all())
        assert moved[1] > 0.05

    @pytest.mark.parametrize("kind", [PGDAttack, APGDAttack])
    def test_per_channel_bounds_and_eps_are_the_normalised_pixel_attack(self, kind: type[IteratedAttack]) -> None:
        model, (pixels, y) = make_model("conv"), make_batch()
        mean, std = [0.3, 0.6], [0.2, 0.4]
        m, s = (torch.tensor(v, dtype=torch.float64).view(2, 1, 1) for v in (mean, std))
        wrapped = with_normalization(model, mean, std).double()
        on_pixels = kind(Linf(0.1), steps=5, random_start=False)(wrapped, pixels, y)
        normalised = kind(Linf(0.1 / s), steps=5, random_start=False, bounds=(-m / s, (1 - m) / s))
        assert torch.allclose(normalised(model, (pixels - m) / s, y) * s + m, on_pixels, atol=1e-6)

    @pytest.mark.parametrize("search", SEARCHES)
    def test_clamp_does_not_hide_the_slope_of_pixels_out_of_bounds(self, search: str) -> None:
        x = torch.full((1, 4), 1.01)
        attack = {"out_of_bounds": "clamp", "random_start": False}
        x_adv = SEARCHES[search](lambda z, rows: -z.sum(1), x, Linf(0.05), steps=10, **attack)
        assert torch.allclose(x_adv, torch.full((1, 4), 0.96))

    @pytest.mark.parametrize("search", SEARCHES)
    def test_the_model_sees_nothing_out_of_bounds(self, search: str) -> None:
        x = torch.rand(4, 30) * 1.5 - 0.25
        seen: list[Tensor] = []
        options = {"steps": 3, "out_of_bounds": "clamp"}
        SEARCHES[search](lambda z, rows: (seen.append(z.detach()), z.sin().sum(1))[1], x, Linf(0.1), **options)
        assert len(seen) == 4
        assert all(bool(((z >= 0) & (z <= 1)).all()) for z in seen)

    def test_clamp_accepts_what_augmentation_makes(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        x = x * 3 - 1
        x_adv = PGDAttack(Linf(0.1), steps=3, out_of_bounds="clamp")(model, x, y)
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
        # the published recipe: into the ball around x, then into [0, 1]
        assert bool(((x_adv - x.clamp(0, 1)).abs() <= 0.1 + 1e-9).all())
        far_outside = (x < -0.1) | (x > 1.1)
        assert torch.equal(x_adv[far_outside], x.clamp(0, 1)[far_outside])

    def test_noise_of_n_fgsm_is_not_projected_away(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        moved = (NFGSM(Linf(0.01), noise=2.0, bounds=None, seed=0)(model, x, y) - x).abs()
        assert bool((moved <= 0.03 + 1e-9).all())
        assert (moved > 0.0101).double().mean() > 0.3


class TestDefinitions:
    def test_fgsm_is_one_full_step_of_pgd(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        for threat in THREATS.values():
            one_step = PGDAttack(threat, steps=1, step_size=threat.eps, random_start=False, best=False)
            assert torch.equal(FGSM(threat)(model, x, y), one_step(model, x, y))

    def test_fgsm_is_the_sign_of_the_gradient(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(per_sample_cross_entropy(model(leaf), y).sum(), leaf)
        assert torch.allclose(FGSM(Linf(0.1))(model, x, y), (x + 0.1 * grad.sign()).clamp(0, 1), atol=1e-15)

    def test_n_fgsm_steps_from_the_noisy_point(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        noisy: list[Tensor] = []

        def spying(z: Tensor) -> Tensor:
            noisy.append(z.detach())
            return model(z)

        x_adv = NFGSM(Linf(0.1), noise=1.0, seed=3)(spying, x, y)
        assert len(noisy) == 1
        leaf = noisy[0].clone().requires_grad_()
        (grad,) = torch.autograd.grad(per_sample_cross_entropy(model(leaf), y).sum(), leaf)
        assert torch.allclose(x_adv, (noisy[0] + 0.1 * grad.sign()).clamp(0, 1), atol=1e-12)

    def test_noise_is_uniform_in_the_ball_and_its_bounds(self) -> None:
        x = torch.full((2000, 3), 0.95, dtype=torch.float64)
        moved = Noise(Linf(0.1))(nn.Linear(3, 2).double(), x, torch.zeros(2000, dtype=torch.int64))
        assert moved.max() == 1
        assert (moved - x).abs().max() <= 0.1 + 1e-12
        assert (moved == 1).double().mean().item() == pytest.approx(0.25, abs=0.03)
        inside = (moved - x)[moved < 1]  # uniform from -0.1 to 0.05
        assert inside.mean().item() == pytest.approx(-0.025, abs=0.003)
        assert inside.var().item() == pytest.approx(0.15**2 / 12, rel=0.05)

    def test_noise_asks_the_model_nothing(self) -> None:
        def never(z: Tensor) -> Tensor:
            raise AssertionError("the model was called")

        x, y = make_batch()
        assert not Noise(Linf(0.1)).uses_gradients
        assert (Noise(Linf(0.1))(never, x, y) != x).any()

    def test_a_share_of_n_fgsm_takes_the_step_and_the_others_stay_noisy(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(8)
        seen: list[Tensor] = []

        def spying(z: Tensor) -> Tensor:
            seen.append(z.detach())
            return model(z)

        torch.manual_seed(3)
        x_adv = NFGSM(Linf(0.1), share=0.25, seed=3)(spying, x, y)
        whole = NFGSM(Linf(0.1), seed=3)(model, x, y)
        noisy = Noise(Linf(0.1), seed=3)(model, x, y)
        stepped = (x_adv != noisy).flatten(1).any(1)
        assert stepped.sum() == 2
        assert [len(z) for z in seen] == [2]
        assert torch.allclose(x_adv[stepped], whole[stepped], atol=1e-12)
        assert torch.equal(x_adv[~stepped], noisy[~stepped])

    def test_a_criterion_of_an_attack_is_cross_entropy_where_it_is_called_alone(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        assert torch.equal(
            FGSM(Linf(0.1))(model, x, y), FGSM(Linf(0.1), criterion=per_sample_cross_entropy)(model, x, y)
        )

    def test_default_step_size(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        default = PGDAttack(Linf(0.1), steps=5, seed=0)(model, x, y)
        assert torch.equal(default, PGDAttack(Linf(0.1), steps=5, step_size=0.05, seed=0)(model, x, y))

    def test_targeted_lowers_the_loss_of_the_target(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        target = (y + 1) % CLASSES
        before = per_sample_cross_entropy(model(x), target)
        after = per_sample_cross_entropy(model(PGDAttack(Linf(0.1), targeted=True)(model, x, target)), target)
        assert bool((after < before).all())

    def test_soft_labels_and_another_loss(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()

        for criterion, labels in ((per_sample_cross_entropy, soft_labels(y)), (margin, y)):
            x_adv = PGDAttack(Linf(0.1), criterion=criterion)(model, x, labels)
            assert bool((criterion(model(x_adv), labels) > criterion(model(x), labels)).all())
        one_hot = F.one_hot(y, CLASSES).double()
        hard = PGDAttack(Linf(0.1), seed=0)(model, x, y)
        assert torch.allclose(PGDAttack(Linf(0.1), seed=0)(model, x, one_hot), hard, atol=1e-9)


@pytest.mark.parametrize("search", SEARCHES)
class TestBest:
    def _wave(self, z: Tensor, rows: Tensor) -> Tensor:
        """Rises and falls, so that the last point is seldom the best."""
        return torch.sin(40 * z).flatten(1).sum(1)

    def test_returns_the_highest_of_all_visited_points(self, search: str) -> None:
        x = torch.rand(6, 5, dtype=torch.float64)
        visited: list[Tensor] = []

        def watched(z: Tensor, rows: Tensor) -> Tensor:
            losses = self._wave(z, rows)
            visited.append(losses.detach())
            return losses

        x_adv = SEARCHES[search](watched, x, Linf(0.2), steps=7, restarts=3, seed=0)
        assert len(visited) == 3 * (7 + 1)
        highest = torch.stack(visited).amax(0)
        assert torch.allclose(self._wave(x_adv, torch.arange(6)), highest, atol=1e-12)

    def test_the_last_point_is_visited_too(self, search: str) -> None:
        x = torch.full((2, 3), 0.5)
        x_adv = SEARCHES[search](lambda z, rows: z.sum(1), x, Linf(0.1), steps=1, random_start=False)
        assert torch.allclose(x_adv, x + 0.1)

    def test_without_it_the_last_point_is_returned_for_one_pass_less(self, search: str) -> None:
        x = torch.rand(6, 5, dtype=torch.float64)
        visited: list[Tensor] = []

        def watched(z: Tensor, rows: Tensor) -> Tensor:
            visited.append(z.detach())
            return self._wave(z, rows)

        last = SEARCHES[search](watched, x, Linf(0.2), steps=7, best=False, seed=0)
        assert len(visited) == 7
        SEARCHES[search](watched, x, Linf(0.2), steps=7, seed=0)
        assert len(visited) == 7 + 7 + 1
        assert torch.equal(last, visited[-1])

    def test_more_restarts_are_never_worse(self, search: str) -> None:
        x = torch.rand(6, 5, dtype=torch.float64)
        found = [SEARCHES[search](self._wave, x, Linf(0.2), steps=10, restarts=n, seed=1) for n in (1, 2, 5)]
        losses = [self._wave(x_adv, torch.arange(6)) for x_adv in found]
        assert bool((losses[1] >= losses[0]).all())
        assert bool((losses[2] >= losses[1]).all())
        assert bool((losses[2] > losses[0]).any())

    def test_a_given_start_is_where_the_first_restart_starts(self, search: str) -> None:
        x = torch.full((3, 2), 0.5)
        start = torch.tensor([[0.05, 0.0], [-0.02, 0.1], [0.3, 0.0]])
        seen: list[Tensor] = []
        options = {"steps": 1, "restarts": 2, "start": start}
        SEARCHES[search](lambda z, rows: (seen.append(z.detach()), z.sum(1))[1], x, Linf(0.1), **options)
        assert torch.allclose(seen[0], x + start.clamp(-0.1, 0.1))
        assert not torch.equal(seen[2], seen[0])

    def test_a_point_whose_loss_is_not_a_number_is_never_the_highest(self, search: str) -> None:
        """A network in half precision overflows at some point, and the points before and after still count."""
        x = torch.rand(6, 5, dtype=torch.float64)
        visited: list[Tensor] = []

        def overflowing(z: Tensor, rows: Tensor) -> Tensor:
            visited.append(self._wave(z.detach(), rows))
            return self._wave(z, rows) if len(visited) != 4 else self._wave(z, rows) * torch.nan

        x_adv = SEARCHES[search](overflowing, x, Linf(0.2), steps=7, seed=0)
        highest = torch.stack(visited[:3] + visited[4:]).amax(0)
        assert torch.allclose(self._wave(x_adv, torch.arange(6)), highest, atol=1e-12)


class TestAPGD:
    def test_checkpoints_are_those_of_the_paper(self) -> None:
        shares = [0.0, 0.22]
        while shares[-1] < 1:
            shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
        expected = [round(100 * share) for share in shares[1:-1]]
        assert list(Halving(100).checkpoints) == expected == [22, 41, 57, 70, 80, 87, 93, 99]
        assert list(Halving(100).checkpoints.values()) == [22, 19, 16, 13, 10, 7, 6, 6]
        for steps in range(1, 60):
            ends = [0, *Halving(steps).checkpoints]
            assert ends[-1] < steps
            assert [end - before for before, end in pairwise(ends)] == list(Halving(steps).checkpoints.values())

    def _landscape(self, rows: Tensor, coordinates: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """Waves along some directions, other ones for each sample, and where to start."""
        generator = torch.Generator().manual_seed(4)
        directions = torch.randn(len(rows), 6, coordinates, generator=generator, dtype=torch.float64)
        start = 0.3 * torch.randn(len(rows), coordinates, generator=generator, dtype=torch.float64)

        def losses_at(z: Tensor, rows: Tensor) -> Tensor:
            return (3 * torch.einsum("bkd,bd->bk", directions[rows], z)).sin().sum(1)

        return losses_at, start

    def _visited(self, threat: ThreatModel, coordinates: int, steps: int) -> tuple[Tensor, Tensor, list[Callable]]:
        """Where APGD went with 20 samples, ``(samples, points, ...)``, where it started, and each sample's function."""
        rows, visited = torch.arange(20), []
        losses_at, start = self._landscape(rows, coordinates)
        start = threat.project(start)

        def watched(z: Tensor, rows: Tensor) -> Tensor:
            visited.append(z.detach())
            return losses_at(z, rows)

        apgd(watched, torch.zeros_like(start), threat, steps=steps, start=start, bounds=None)
        functions = [lambda z, row=row: losses_at(z, rows[row : row + 1]) for row in rows.tolist()]
        return torch.stack(visited, 1), start, functions

    @pytest.mark.parametrize("threat", [Linf(0.4), L2(0.7)])
    @pytest.mark.parametrize(
        ("steps", "checkpoints"), [(100, [22, 41, 57, 70, 80, 87, 93, 99]), (20, [4, 7, 9, *range(10, 20)])]
    )
    def test_goes_where_the_algorithm_goes(self, threat: ThreatModel, steps: int, checkpoints: list[int]) -> None:
        visited, start, functions = self._visited(threat, 5, steps)
        for row, function in enumerate(functions):
            expected = _halved_ascent(function, threat, start[row : row + 1], checkpoints, steps)
            assert torch.allclose(visited[row], torch.cat(expected), atol=1e-6)

    def test_goes_where_the_algorithm_for_l1_goes(self) -> None:
        visited, start, functions = self._visited(L1(2.0), 30, 100)
        for row, function in enumerate(functions):
            expected = _thinned_ascent(function, L1(2.0), start[row : row + 1], 4, 100)
            assert torch.allclose(visited[row], torch.cat(expected), atol=1e-6)

    def test_returns_to_the_highest_point_and_halves_its_steps_where_they_do_not_rise(self) -> None:
        """Of a function that falls from its start on all sides, each checkpoint begins a shorter trip from there."""
        seen: list[float] = []

        def losses_at(z: Tensor, rows: Tensor) -> Tensor:
            seen.append(z.item())
            return -(z - 1e-6).abs().sum(1)

        zero = torch.zeros(1, 1, dtype=torch.float64)
        x_adv = apgd(losses_at, zero, Linf(1.0), steps=100, random_start=False, bounds=None)
        assert torch.equal(x_adv, zero)
        assert seen[1] == 1.0
        for trip, checkpoint in enumerate([22, 41, 57, 70, 80, 87, 93, 99], start=1):
            step = min(2.0 * 0.5**trip, 1.0)
            # from 0 by the step, and by the momentum of the move from the point before the last to 0
            assert seen[checkpoint + 1] == pytest.approx(0.75 * step - 0.25 * seen[checkpoint - 1])

    def test_finds_a_peak_that_needs_steps_shorter_than_the_radius(self) -> None:
        def losses_at(z: Tensor, rows: Tensor) -> Tensor:
            return -(z - 0.3).abs().sum(1)

        zero = torch.zeros(1, 1, dtype=torch.float64)
        options = {"steps": 100, "random_start": False, "bounds": None}
        by_apgd = apgd(losses_at, zero, Linf(1.0), **options)
        by_pgd = pgd(losses_at, zero, Linf(1.0), step_size=2.0, **options)
        assert abs(float(by_apgd) - 0.3) < 0.01
        assert abs(float(by_pgd) - 0.3) > 0.2

    @pytest.mark.parametrize("threat", [Linf(0.4), L2(1.1)])
    def test_climbs_higher_than_pgd_in_as_many_steps(self, threat: ThreatModel) -> None:
        losses_at, start = self._landscape(torch.arange(100), 5)
        x = torch.zeros_like(start)
        found = [find(losses_at, x, threat, steps=40, seed=0, bounds=None) for find in (apgd, pgd)]
        by_apgd, by_pgd = (losses_at(x_adv, torch.arange(100)) for x_adv in found)
        assert by_apgd.mean() > by_pgd.mean() + 0.1

    def test_in_l1_gets_past_the_edge_of_the_pixel_range(self) -> None:
        """Coordinates that are at their limit keep their place though the projection shortens all others."""
        x = torch.rand(8, 200, dtype=torch.float64)
        slope = torch.randn(8, 200, dtype=torch.float64)
        room = torch.where(slope > 0, 1 - x, x)
        best = torch.stack([s @ _greedy(s, r, 6.0) for s, r in zip(slope, room, strict=True)])
        x_adv = apgd(lambda z, rows: (z * slope[rows]).sum(1), x, L1(6.0), steps=100)
        assert ((slope * (x_adv - x)).sum(1) / best).mean() > 0.99


def _linear(classes: int, coordinates: int, size: int, seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor], Tensor]:
    """Weights of a linear classifier, the classifier, and pixels."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, coordinates, generator=generator, dtype=torch.float64)
    x = torch.rand(size, coordinates, generator=generator, dtype=torch.float64)
    return weight, lambda z: (z - 0.5) @ weight.T, x


@pytest.mark.parametrize("halving", [False, True])
class TestTargeted:
    @pytest.mark.parametrize("threat", [Linf(0.03), L2(0.12), L1(0.25)])
    def test_gives_the_exact_robust_accuracy_of_a_linear_classifier(self, threat: ThreatModel, halving: bool) -> None:
        """A sample is broken if and only if its margin to some class is below the dual norm of the weights between."""
        weight, model, x = _linear(classes=6, coordinates=12, size=200, seed=0)
        y = model(x).argmax(1)
        margins = model(x).gather(1, y[:, None]) - model(x)
        reach = torch.stack([threat.dual_norm(weight[k] - weight[y]) for k in range(6)], 1)
        broken = (margins < reach).any(1)
        assert 0.3 < broken.double().mean() < 0.9
        assert int(((margins < reach).sum(1) == 1).sum()) > 20  # whom one class alone breaks
        x_adv = TargetedAPGDAttack(threat, bounds=None, halving=halving, seed=0)(model, x, y)
        assert torch.equal(model(x_adv).argmax(1) != y, broken)
        assert bool((threat.norm(x_adv - x) <= 1 + 1e-9).all())

    @pytest.mark.parametrize("targets", [3, 9])
    def test_targets_are_the_most_probable_other_classes_in_their_order(
        self, targets: int, halving: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, model, x = _linear(classes=6, coordinates=12, size=20, seed=1)
        y = model(x).argsort(1, descending=True)[:, 1]  # not the predicted class: the most probable other one is
        y[:15] = model(x).argmax(1)[:15]
        ascended: list[tuple[int, int]] = []

        def spying(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
            ascended.extend(zip(y.tolist(), target.tolist(), strict=True))
            return -dlr(logits, y)  # downhill: nobody is fooled who was not

        monkeypatch.setattr(iterated, "targeted_dlr", spying)
        attack = TargetedAPGDAttack(Linf(1e-6), targets=targets, steps=1, bounds=None, halving=halving, seed=0)
        for row in range(15):
            ascended.clear()
            attack(model, x[row : row + 1], y[row : row + 1])
            order = [k for k in model(x[row]).argsort(descending=True).tolist() if k != y[row]][:targets]
            assert ascended[0] == (y[row], y[row])  # asked what it needs
            assert list(dict.fromkeys(ascended[1:])) == [(y[row], target) for target in order]
        for row in range(15, 20):
            ascended.clear()
            attack(model, x[row : row + 1], y[row : row + 1])
            assert ascended[1] == (y[row], model(x[row]).argmax())

    def test_every_target_starts_elsewhere(self, halving: bool) -> None:
        _, model, x = _linear(classes=6, coordinates=12, size=1, seed=0)
        starts: list[Tensor] = []

        def spying(z: Tensor) -> Tensor:
            starts.append(z.detach())
            return model(z)

        TargetedAPGDAttack(Linf(1e-3), targets=3, steps=1, halving=halving, seed=0)(spying, x, model(x).argmax(1))
        noisy = torch.cat(starts[1:2] if halving else starts[1::2]) - x
        assert noisy.shape == (3, 12)
        assert bool((torch.pdist(noisy) > 1e-4).all())

    def test_fooled_samples_leave_at_once(self, halving: bool) -> None:
        weight, model, x = _linear(classes=6, coordinates=12, size=30, seed=2)
        weight[:, -1] = 0  # the last coordinate says who a sample is, and nothing may change it
        x[:, -1] = torch.arange(30) / 30
        eps = torch.full((1, 12), 0.03, dtype=torch.float64)
        eps[:, -1] = 0
        y, fooled, passes = model(x).argmax(1), set(), torch.zeros(30, dtype=torch.int64)

        def spying(z: Tensor) -> Tensor:
            who = (z.detach()[:, -1] * 30).round().long()
            logits = model(z)
            assert not fooled.intersection(who.tolist())
            fooled.update(who[logits.argmax(1) != y[who]].tolist())
            passes.index_add_(0, who, torch.ones_like(who))
            return logits

        x_adv = TargetedAPGDAttack(Linf(eps), steps=20, halving=halving, seed=0)(spying, x, y)
        broken = model(x_adv).argmax(1) != y
        assert sorted(fooled) == broken.nonzero().flatten().tolist()
        assert 5 < len(fooled) < 25
        whole = passes[~broken].unique()
        assert len(whole) == 1
        assert bool((passes[broken] < whole).all())

    @pytest.mark.parametrize("threat", [Linf(1e-4), L1(1e-3)])
    def test_halving_takes_349_gradient_passes_instead_of_900(self, threat: ThreatModel, halving: bool) -> None:
        _, model, x = _linear(classes=10, coordinates=12, size=20, seed=0)
        x = x[(model(x).topk(2, 1).values.diff(dim=1) < -0.1).squeeze(1)]
        y = model(x).argmax(1)
        passes = {True: 0, False: 0}

        def counting(z: Tensor) -> Tensor:
            passes[torch.is_grad_enabled()] += len(z)
            return model(z)

        x_adv = TargetedAPGDAttack(threat, halving=halving, seed=0)(counting, x, y)
        assert torch.equal(model(x_adv).argmax(1), y)
        gradients, scored = (349, 1) if halving else (900, 9)
        assert passes == {True: gradients * len(x), False: (1 + scored) * len(x)}

    def test_returns_the_highest_point_of_all_visited(self, halving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        _, model, x = _linear(classes=6, coordinates=12, size=6, seed=0)
        y = model(x).argmax(1)
        ratios: list[float] = []

        def spying(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
            found = targeted_dlr(logits, y, target)
            ratios.extend(found.tolist())
            return found

        monkeypatch.setattr(iterated, "targeted_dlr", spying)
        for row in range(6):
            ratios.clear()
            attack = TargetedAPGDAttack(Linf(1e-3), targets=3, steps=20, halving=halving, seed=0)
            x_adv = attack(model, x[row : row + 1], y[row : row + 1])
            targets = model(x[row]).argsort(descending=True)[1:4]
            reached = targeted_dlr(model(x_adv).expand(3, 6), y[row].expand(3), targets)
            assert reached.max().item() == pytest.approx(max(ratios[1:]), abs=1e-12)  # the first asks what it needs

    def test_soft_labels_and_few_classes_are_refused(self, halving: bool, unchecked: None) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        attack = TargetedAPGDAttack(Linf(0.1), steps=2, halving=halving)
        with pytest.raises(ValueError, match="argmax"):
            attack(model, x, soft_labels(y))
        with pytest.raises(ValueError, match="at least 4"):
            attack(lambda z: model(z)[:, :3], x, y.clamp(max=2))
        with pytest.raises(ValueError, match="targets"):
            TargetedAPGDAttack(Linf(0.1), targets=0, steps=5, halving=halving)


class TestForEvaluation:
    """The form in which an evaluation runs an attack, of which it scores the result itself."""

    @pytest.mark.parametrize("kind", [PGDAttack, APGDAttack])
    def test_fooled_samples_leave_and_the_last_point_is_not_scored_twice(self, kind: type[IteratedAttack]) -> None:
        form = kind(Linf(0.1), steps=7, criterion=margin).for_evaluation(5)
        assert (form.early_stop, form.best, form.seed) == (True, False, 5)
        assert (form.steps, form.criterion, form.threat.eps) == (7, margin, 0.1)
        assert kind(Linf(0.1), restarts=2).for_evaluation(5).best

    @pytest.mark.parametrize("name", ATTACKS)
    def test_a_seed_of_its_own_is_kept(self, name: str) -> None:
        assert getattr(ATTACKS[name].for_evaluation(5), "seed", 5) == 5
        assert getattr(ATTACKS[name].seeded(5), "seed", 5) == 5
        if name != "FGSM":
            assert replace(ATTACKS[name], seed=3).for_evaluation(5).seed == 3
            assert replace(ATTACKS[name], seed=0).seeded(5).seed == 0

    @pytest.mark.parametrize("restarts", [1, 3])
    @pytest.mark.parametrize("kind", [PGDAttack, APGDAttack])
    def test_breaks_whom_any_visited_point_breaks(self, kind: type[IteratedAttack], restarts: int) -> None:
        model, (x, y) = make_model("conv"), make_batch(60)
        y[:40] = model(x).argmax(1)[:40]
        broken, passes = torch.zeros(60, dtype=torch.bool), [0, 0]

        def spying(z: Tensor) -> Tensor:
            logits = model(z)
            broken.logical_or_(logits.argmax(1) != y)
            passes[0] += len(z)
            return logits

        def counting(z: Tensor) -> Tensor:
            passes[1] += len(z)
            return model(z)

        attack = kind(Linf(0.05), steps=10, restarts=restarts, seed=0)
        attack(spying, x, y)
        x_adv = attack.for_evaluation(1)(counting, x, y)
        assert 0.2 < broken.double().mean() < 0.9
        assert torch.equal(model(x_adv).argmax(1) != y, broken)
        assert passes[1] < passes[0]


@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (FGSM(Linf(0.1)), "FGSM"),
        (NFGSM(Linf(0.1), criterion=margin), "N-FGSM margin"),
        (PGDAttack(Linf(0.1)), "PGD-10"),
        (PGDAttack(Linf(0.1), steps=40, criterion=nn.CrossEntropyLoss(reduction="none")), "PGD-40 CrossEntropyLoss"),
        (APGDAttack(Linf(0.1)), "APGD-CE"),
        (APGDAttack(Linf(0.1), criterion=dlr), "APGD-DLR"),
        (TargetedAPGDAttack(Linf(0.1)), "APGD-T"),
        (TargetedAPGDAttack(Linf(0.1), halving=True), "APGD-T (halving)"),
    ],
)
def test_a_name_says_what_is_ascended_and_how(attack: Attack, name: str) -> None:
    assert attack.name == name


class TestScaled:
    @pytest.mark.parametrize("name", ATTACKS)
    def test_is_the_attack_on_the_larger_ball(self, name: str) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        attack = _seeded(name)
        by_hand = replace(attack, threat=attack.threat.with_eps(0.5 * attack.threat.eps))
        assert torch.equal(attack.scaled(0.5)(model, x, y), by_hand(model, x, y))
        assert not torch.equal(attack.scaled(0.5)(model, x, y), attack(model, x, y))
        assert torch.equal(attack.scaled(0.0)(model, x, y), x)

    def test_steps_grow_with_the_ball(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        scaled = PGDAttack(Linf(0.05), steps=3, step_size=0.02, best=False, seed=0).scaled(2.0)
        by_hand = PGDAttack(Linf(0.1), steps=3, step_size=0.04, best=False, seed=0)
        assert torch.equal(scaled(model, x, y), by_hand(model, x, y))
        assert scaled.step_size == 0.04


class TestEarlyStop:
    @pytest.mark.parametrize("kind", [PGDAttack, APGDAttack])
    def test_fooled_samples_leave_and_stay_fooled(self, kind: type[IteratedAttack]) -> None:
        model, (x, y) = make_model("conv"), make_batch(40)
        sizes: list[int] = []

        def spying(z: Tensor) -> Tensor:
            sizes.append(len(z))
            return model(z)

        full = kind(Linf(0.3), steps=10, seed=0)(model, x, y)
        stopped = kind(Linf(0.3), steps=10, seed=0, early_stop=True)(spying, x, y)
        assert torch.equal(model(full).argmax(1) == y, model(stopped).argmax(1) == y)
        assert sizes[-1] < sizes[0] == 40
        assert sizes == sorted(sizes, reverse=True)

    @pytest.mark.parametrize("search", SEARCHES)
    def test_rows_follow_the_samples(self, search: str) -> None:
        x = torch.rand(5, 3)
        seen: list[list[int]] = []

        def losses_at(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(rows.tolist())
            return z.sum(1), rows == len(seen) - 1

        SEARCHES[search](losses_at, x, Linf(0.1), steps=3)
        assert seen == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [2, 3, 4], [3, 4]]

    @pytest.mark.parametrize("search", SEARCHES)
    def test_a_done_sample_keeps_its_point_even_if_its_loss_is_lower(self, search: str) -> None:
        x = torch.full((1, 2), 0.5)
        points: list[Tensor] = []

        def losses_at(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            points.append(z.detach())
            return -len(points) + 1e-9 * z.sum(1), torch.tensor([len(points) == 3])

        for best in (True, False):
            points.clear()
            assert torch.equal(SEARCHES[search](losses_at, x, Linf(0.1), steps=5, best=best), points[2])

    @pytest.mark.parametrize("search", SEARCHES)
    def test_who_is_done_at_the_last_point_of_a_restart_is_not_attacked_again(self, search: str) -> None:
        x = torch.rand(3, 4)
        seen: list[list[int]] = []

        def losses_at(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(rows.tolist())
            return z.sum(1), (rows == 1) & torch.tensor(len(seen) == 3)

        SEARCHES[search](losses_at, x, Linf(0.1), steps=2, restarts=2)
        assert seen == [[0, 1, 2]] * 3 + [[0, 2]] * 3

    @pytest.mark.parametrize("kind", [PGDAttack, APGDAttack])
    def test_targeted_stops_at_the_target(self, kind: type[IteratedAttack]) -> None:
        model, (x, y) = make_model("conv"), make_batch(40)
        target = (y + 1) % CLASSES
        full = kind(Linf(0.3), targeted=True, seed=0)(model, x, target)
        stopped = kind(Linf(0.3), targeted=True, early_stop=True, seed=0)(model, x, target)
        assert torch.equal(model(full).argmax(1) == target, model(stopped).argmax(1) == target)
        assert bool((model(stopped).argmax(1) == target).any())


class TestNoise:
    @pytest.mark.parametrize("threat", list(THREATS.values()), ids=list(THREATS))
    def test_depends_on_seed_sample_and_restart_alone(self, threat: ThreatModel) -> None:
        x = torch.rand(6, 2, 3, 3)
        attack = {"steps": 1, "step_size": 0.0, "best": False, "seed": 5}

        def flat(z: Tensor, rows: Tensor) -> Tensor:
            return z.flatten(1).sum(1)

        whole = pgd(flat, x, threat, **attack)
        order = torch.tensor([4, 1, 3])
        some = pgd(flat, x[order], threat, index=order, **attack)
        assert torch.equal(whole[order], some)
        assert torch.equal(whole, pgd(flat, x, threat, **attack))
        assert not torch.equal(whole, pgd(flat, x, threat, **{**attack, "seed": 6}))
        assert not torch.equal(whole[0] - x[0], whole[1] - x[1])

    def test_every_restart_starts_elsewhere(self) -> None:
        x, starts = torch.rand(3, 5), []

        def losses_at(z: Tensor, rows: Tensor) -> Tensor:
            starts.append(z.detach())
            return z.sum(1)

        pgd(losses_at, x, Linf(0.1), steps=1, restarts=2, seed=0)
        assert not torch.equal(starts[0], starts[2])

    def test_does_not_depend_on_the_memory_format(self) -> None:
        x = torch.rand(2, 3, 4, 4)
        attack = {"steps": 1, "step_size": 0.0, "best": False, "bounds": None}
        for seed in (0, None):
            noisy = []
            for format in (torch.contiguous_format, torch.channels_last):
                torch.manual_seed(0)
                z = x.contiguous(memory_format=format)
                noisy.append(pgd(lambda z, rows: z.flatten(1).sum(1), z, Linf(0.1), seed=seed, **attack))
            assert torch.equal(*noisy)

    def test_verdicts_do_not_depend_on_the_batch(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(12)
        attack = PGDAttack(Linf(0.1), steps=4, restarts=2, seed=0, early_stop=True)
        whole = attack(model, x, y, index=torch.arange(12))
        parts = [attack(model, x[i : i + 5], y[i : i + 5], index=torch.arange(12)[i : i + 5]) for i in (0, 5, 10)]
        assert torch.allclose(torch.cat(parts), whole, atol=1e-12)

    def test_without_a_seed_the_default_generator_decides(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        results = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            results.append(PGDAttack(Linf(0.1), steps=1)(model, x, y))
        assert torch.equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    def test_with_a_seed_the_default_generator_is_untouched(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        state = torch.get_rng_state()
        PGDAttack(Linf(0.1), seed=0)(model, x, y)
        assert torch.equal(torch.get_rng_state(), state)


def _seeded(name: str, **options: object) -> Attack:
    """The attack with reproducible noise, where it has any."""
    seed = {} if name == "FGSM" else {"seed": 0}
    return replace(ATTACKS[name], **seed, **options)


def test_the_form_of_n_fgsm_for_evaluation_attacks_every_sample() -> None:
    assert NFGSM(Linf(0.1), share=0.5).for_evaluation(3).share == 1


class TestInsideATransform:
    @pytest.mark.parametrize("name", [name for name in ATTACKS if "APGD-T" not in name])
    def test_the_point_is_the_eager_one(self, name: str) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        attack = ATTACKS[name]
        torch.manual_seed(0)
        expected = attack(model, x, y)

        def attacked(z: Tensor) -> tuple[Tensor, Tensor]:
            x_adv = attack(model, z, y)
            return x_adv.sum(), x_adv

        torch.manual_seed(0)
        _, found = torch.func.grad(attacked, has_aux=True)(x)
        assert torch.allclose(found, expected, atol=1e-12)

    @pytest.mark.parametrize("kind", [FGSM, NFGSM, PGDAttack, APGDAttack])
    def test_evaluation_mode_is_evaluation_mode(self, kind: type[Attack]) -> None:
        model, (x, y) = make_model("dropout_eval").train(), make_batch()
        objective = PenalizedLoss(at=kind(Linf(0.1), mode="eval"))
        torch.manual_seed(0)
        expected = objective(model, x, y).x

        def point(z: Tensor) -> tuple[Tensor, Tensor]:
            out = objective(model, z, y)
            return out.total, out.x

        torch.manual_seed(0)
        _, found = torch.func.grad(point, has_aux=True)(x)
        assert torch.allclose(found, expected, atol=1e-12)
        assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ATTACKS)
class TestContracts:
    def test_pickle_copy_repr(self, name: str) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        attack = copy.copy(ATTACKS[name])
        torch.manual_seed(0)
        expected = attack(model, x, y)
        for twin in (pickle.loads(pickle.dumps(attack)), copy.deepcopy(attack)):
            torch.manual_seed(0)
            assert torch.equal(twin(model, x, y), expected)
            assert repr(twin) == repr(attack)
        assert "eps=" in repr(attack)

    def test_is_frozen(self, name: str) -> None:
        with pytest.raises(AttributeError):
            ATTACKS[name].threat = Linf(1.0)

    @pytest.mark.parametrize("mode", ["keep", "eval"])
    def test_leaves_the_model_as_it_was(self, name: str, mode: str) -> None:
        model, (x, y) = make_model("batch_norm_eval"), make_batch()
        model[0].train()  # a mixture of modes, each of which must come back
        flags = [module.training for module in model.modules()]
        state = copy.deepcopy(model.state_dict())
        before = x.clone()
        x_adv = replace(ATTACKS[name], mode=mode)(model, x, y)
        assert [module.training for module in model.modules()] == flags
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        assert torch.equal(x, before)
        assert x.grad is None
        assert not x_adv.requires_grad
        assert x_adv.dtype == x.dtype

    def test_running_statistics_do_not_move(self, name: str) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch()
        state = copy.deepcopy(model.state_dict())
        with pytest.warns(GradregWarning, match="BatchNorm2d"):
            ATTACKS[name](model, x, y)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())

    def test_eval_mode_is_restored_after_an_exception(self, name: str) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch()
        flags = [module.training for module in model.modules()]
        attack = replace(ATTACKS[name], mode="eval")
        with pytest.raises(ValueError, match="bounds"):
            attack(model, x + 5, y)
        if name != "noise":  # which looks at no labels
            with pytest.raises(ValueError, match="classes"):
                attack(model, x, y + CLASSES)
        assert [module.training for module in model.modules()] == flags

    def test_eval_mode_attacks_in_eval_mode(self, name: str) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch()
        evaluated = copy.deepcopy(model).eval()
        attack, kept = _seeded(name, mode="eval"), _seeded(name)
        assert torch.equal(attack(model, x, y), kept(evaluated, x, y))

    def test_samples_do_not_see_their_batch(self, name: str) -> None:
        """Nor the size of their batch, nor each other's radius and bounds."""
        model, (x, _) = make_model("conv"), make_batch(9)
        y = model(x).argmax(1)
        bounds = x.amin((1, 2, 3), keepdim=True) - 0.01, x.amax((1, 2, 3), keepdim=True) + 0.01
        factors = torch.linspace(0.2, 1.0, 9, dtype=torch.float64).view(9, 1, 1, 1)
        together = _seeded(name, bounds=bounds).scaled(factors)(model, x, y)
        for rows in ([3], [7, 0, 4, 1, 2]):
            some = _seeded(name, bounds=(bounds[0][rows], bounds[1][rows])).scaled(factors[rows])
            found = some(model, x[rows], y[rows], index=torch.tensor(rows))
            assert torch.allclose(found, together[rows], atol=1e-9)
        alone = _seeded(name, bounds=tuple(side[3].item() for side in bounds)).scaled(factors[3].item())
        assert torch.allclose(alone(model, x[3:4], y[3:4], index=torch.tensor([3])), together[3:4], atol=1e-9)

    def test_works_where_grad_is_disabled(self, name: str) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        attack = _seeded(name)
        expected = attack(model, x, y)
        with torch.no_grad():
            assert torch.equal(attack(model, x, y), expected)
            assert not torch.is_grad_enabled()
        with torch.inference_mode():
            assert torch.equal(attack(model, x.clone(), y.clone()), expected)

    def test_perturbs_in_float32_under_autocast(self, name: str) -> None:
        model, (x, y) = make_model("conv", torch.float32), make_batch(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x_adv = ATTACKS[name](model, x, y)
        assert x_adv.dtype == torch.float32
        reach = 2.0 if name == "N-FGSM" else 1.0
        assert bool((ATTACKS[name].threat.norm(x_adv - x) <= reach + 1e-5).all())

    def test_a_first_layer_that_works_in_place_is_harmless(self, name: str) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        attack = _seeded(name)
        in_place, out_of_place = (nn.Sequential(nn.SiLU(inplace=flag), model) for flag in (True, False))
        before = x.clone()
        assert torch.equal(attack(in_place, x, y), attack(out_of_place, x, y))
        assert torch.equal(x, before)


class _Elsewhere(Tensor):
    """Its values can be read, but it says that it is not on the CPU."""

    device = property(lambda self: torch.device("meta"))


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def _fails(self, error: type[Exception], match: str, x: Tensor, y: Tensor, **options: object) -> None:
        model = options.pop("model", None) or make_model("conv")
        with pytest.raises(error, match=match):
            PGDAttack(options.pop("threat", Linf(0.1)), **options)(model, x, y)

    def test_images_of_bytes(self) -> None:
        x, y = make_batch()
        self._fails(TypeError, "float", (x * 255).byte(), y)

    def test_half_precision(self) -> None:
        x, y = make_batch()
        self._fails(TypeError, "float32", x.bfloat16(), y, model=make_model("conv", torch.bfloat16))

    def test_not_a_number(self) -> None:
        x, y = make_batch()
        x[0, 0, 0, 0] = float("nan")
        self._fails(ValueError, "NaN", x, y)

    def test_pixels_out_of_bounds(self) -> None:
        x, y = make_batch()
        self._fails(ValueError, "bounds", (x - 0.5) / 0.2, y)
        self._fails(ValueError, "bounds", x * 255, y)

    def test_eps_in_another_unit(self) -> None:
        x, y = make_batch()
        self._fails(ValueError, "unit", x, y, threat=Linf(8))

    @pytest.mark.parametrize("name", ATTACKS)
    def test_eps_in_another_unit_on_another_device(self, name: str) -> None:
        """Values are looked at once where that waits for the device, and this is what for."""
        x, y = make_batch()
        attack = ATTACKS[name].scaled(100.0)
        if isinstance(attack.threat, Linf):
            with pytest.raises(ValueError, match="unit"):
                attack(make_model("conv"), x.as_subclass(_Elsewhere), y)
        with pytest.raises(ValueError, match="NaN"):
            ATTACKS[name].scaled(1.0)(make_model("conv"), (x * float("nan")).as_subclass(_Elsewhere), y)

    def test_ignored_label(self) -> None:
        x, y = make_batch()
        y[1] = -100
        self._fails(ValueError, "-100", x, y)

    def test_a_model_without_a_gradient(self) -> None:
        x, y = make_batch()
        model = make_model("conv")
        self._fails(RuntimeError, "depend", x, y, model=lambda z: model(z.detach()).detach())

    def test_a_model_that_returns_nan(self) -> None:
        x, y = make_batch()
        model = make_model("conv")
        self._fails(RuntimeError, "NaN", x, y, model=lambda z: model(z) * float("nan"))

    def test_a_criterion_that_averages(self) -> None:
        self._fails(ValueError, "reduction", *make_batch(), criterion=nn.CrossEntropyLoss())

    def test_a_model_that_returns_no_tensor(self) -> None:
        model = make_model("conv")
        self._fails(TypeError, "tensor", *make_batch(), model=lambda z: {"scores": model(z)})
        self._fails(TypeError, "tensor", *make_batch(), model=lambda z: (model(z), z))

    def test_a_model_that_detaches_its_input_but_trains(self) -> None:
        model = make_model("conv")
        self._fails(RuntimeError, "depend", *make_batch(), model=lambda z: model(z.detach()))

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"steps": 0}, "steps"),
            ({"restarts": 0}, "restarts"),
            ({"restarts": 2, "best": False}, "best"),
            ({"restarts": 2, "random_start": False}, "random_start"),
            ({"mode": "train"}, "mode"),
            ({"out_of_bounds": "ignore"}, "out_of_bounds"),
            ({"bounds": (1.0, 0.0)}, "lowest"),
        ],
    )
    def test_options(self, options: dict[str, object], match: str) -> None:
        self._fails(ValueError, match, *make_batch(), **options)

    def test_a_model_instead_of_the_threat(self) -> None:
        with pytest.raises(TypeError, match="threat"):
            PGDAttack(make_model("conv"))

    def test_noise_of_n_fgsm(self) -> None:
        with pytest.raises(ValueError, match="noise"):
            NFGSM(Linf(0.1), noise=-1.0)

    def test_a_front_end_without_a_slope(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.warns(GradregWarning, match="exactly"):
            PGDAttack(Linf(0.1))(lambda z: model(torch.round(z * 255) / 255), x, y)

    def test_a_saturated_loss(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.warns(GradregWarning, match="saturated"):
            PGDAttack(Linf(0.1))(lambda z: model(z) * 0 + 1e4 * F.one_hot(y, CLASSES), x, y)

    def test_early_stop_without_classes(self) -> None:
        x, y = make_batch()
        binary = PGDAttack(Linf(0.1), early_stop=True, criterion=lambda logits, y: F.softplus(-logits * y).squeeze(1))
        with pytest.raises(ValueError, match="early_stop"):
            binary(lambda z: z.flatten(1)[:, :1], x, y.double()[:, None])

    def test_eval_mode_of_a_function(self) -> None:
        model = make_model("conv")
        self._fails(TypeError, "function", *make_batch(), mode="eval", model=lambda z: model(z))

    def test_shapes_of_pgd(self) -> None:
        x, _ = make_batch()

        def flat(z: Tensor, rows: Tensor) -> Tensor:
            return z.flatten(1).sum(1)

        for options, match in (
            ({"start": x[:2]}, "start"),
            ({"start": x.float()}, "start"),
            ({"index": torch.arange(5)}, "seed"),
            ({"index": torch.arange(3), "seed": 0}, "position"),
            ({"bounds": (torch.zeros(2), torch.ones(2))}, "channels"),
        ):
            with pytest.raises(ValueError, match=match):
                pgd(flat, x, Linf(0.1), **options)
        with pytest.raises(ValueError, match="bool"):
            pgd(lambda z, rows: (flat(z, rows), torch.ones(len(z))), x, Linf(0.1))

    def test_samples_cannot_leave_inside_a_transform(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.raises(RuntimeError, match="early_stop"):
            torch.func.grad(lambda z: PGDAttack(Linf(0.1), early_stop=True)(model, z, y).sum())(x)

    @pytest.mark.parametrize("share", [0.0, -0.5, 1.5, math.nan])
    def test_share_of_n_fgsm(self, share: float) -> None:
        with pytest.raises(ValueError, match="share"):
            NFGSM(Linf(0.1), share=share)

    def test_dropout_in_training_mode_warns(self) -> None:
        model, (x, y) = make_model("dropout_eval").train(), make_batch()
        with pytest.warns(GradregWarning, match="Dropout") as caught:
            PGDAttack(Linf(0.1))(model, x, y)
        assert [warning.filename for warning in caught] == [__file__]
