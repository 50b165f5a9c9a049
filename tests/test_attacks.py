"""Attacks: at the known optimum of a linear model, inside their sets, reproducible, and without side effects."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradreg import FGSM, L1, L2, NFGSM, Attack, GradregWarning, Linf, PGDAttack, ThreatModel, pgd, with_normalization

from cases import CLASSES, make_batch, make_model, per_sample_cross_entropy, soft_labels

THREATS = {"Linf": Linf(0.1), "L2": L2(0.5), "L1": L1(2.0)}
ATTACKS: dict[str, Attack] = {
    "PGD": PGDAttack(Linf(0.1), steps=3),
    "PGD L2": PGDAttack(L2(0.5), steps=3),
    "PGD L1": PGDAttack(L1(2.0), steps=3),
    "FGSM": FGSM(Linf(0.1)),
    "N-FGSM": NFGSM(Linf(0.1), noise=1.0),
}


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


class TestLinearOptimum:
    """A linear function has its maximum over ball and box in closed form."""

    @pytest.mark.parametrize("threat", [Linf(0.3), L2(0.9), L1(1.7)])
    @pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
    @pytest.mark.parametrize("seed", range(3))
    def test_is_reached(self, threat: ThreatModel, bounds: tuple[float, float] | None, seed: int) -> None:
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

        x_adv = pgd(lambda z, rows: (z * slope[rows]).sum(1), x, threat, steps=400, step_size=0.02, bounds=bounds)
        reached = (slope * (x_adv - x)).sum(1)
        assert bool((reached <= best + 1e-9).all())
        # In L1 the projection takes from full coordinates too: the search ends a fraction of a step from the optimum.
        tolerance = {Linf: 1e-9, L2: 5e-5, L1: 0.02 / 1.7}[type(threat)]
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
        attack = PGDAttack(threat, steps=100, step_size=threat.eps / 10, bounds=None)
        x_adv = attack(model, x, y)
        assert 0 < robust.double().mean() < 1
        assert torch.equal(model(x_adv).argmax(1) == y, robust)


class TestSets:
    @given(name=st.sampled_from(sorted(THREATS)), seed=st.integers(0, 2**31), best=st.booleans())
    def test_the_result_is_inside_ball_and_bounds(self, name: str, seed: int, best: bool) -> None:
        threat = THREATS[name]
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(3, 2, 4, 4, generator=generator)
        weight = torch.randn(2, 4, 4, generator=generator)
        x_adv = pgd(lambda z, rows: (z * weight).flatten(1).sum(1).sin(), x, threat, steps=4, best=best, seed=seed)
        assert bool((threat.norm(x_adv - x) <= 1 + 1e-5).all())
        assert bool(((x_adv >= 0) & (x_adv <= 1)).all())

    def test_eps_per_sample_and_per_channel_are_each_alone(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(3)
        per_sample = torch.tensor([0.02, 0.05, 0.1], dtype=torch.float64).view(3, 1, 1, 1)
        together = PGDAttack(Linf(per_sample), steps=4, random_start=False)(model, x, y)
        for row, eps in enumerate((0.02, 0.05, 0.1)):
            alone = PGDAttack(Linf(eps), steps=4, random_start=False)(model, x[row : row + 1], y[row : row + 1])
            assert torch.allclose(together[row : row + 1], alone, atol=1e-9)
        per_channel = torch.tensor([0.02, 0.1], dtype=torch.float64).view(2, 1, 1)
        moved = (PGDAttack(Linf(per_channel), steps=4)(model, x, y) - x).abs().amax((0, 2, 3))
        assert bool((moved <= torch.tensor([0.02, 0.1]) + 1e-9).all())
        assert moved[1] > 0.05

    def test_per_channel_bounds_and_eps_are_the_normalised_pixel_attack(self) -> None:
        model, (pixels, y) = make_model("conv"), make_batch()
        mean, std = [0.3, 0.6], [0.2, 0.4]
        m, s = (torch.tensor(v, dtype=torch.float64).view(2, 1, 1) for v in (mean, std))
        wrapped = with_normalization(model, mean, std).double()
        on_pixels = PGDAttack(Linf(0.1), steps=5, random_start=False)(wrapped, pixels, y)
        normalised = PGDAttack(Linf(0.1 / s), steps=5, random_start=False, bounds=(-m / s, (1 - m) / s))
        assert torch.allclose(normalised(model, (pixels - m) / s, y) * s + m, on_pixels, atol=1e-6)

    def test_clamp_does_not_hide_the_slope_of_pixels_out_of_bounds(self) -> None:
        x = torch.full((1, 4), 1.01)
        attack = {"out_of_bounds": "clamp", "random_start": False}
        x_adv = pgd(lambda z, rows: -z.sum(1), x, Linf(0.05), steps=10, **attack)
        assert torch.allclose(x_adv, torch.full((1, 4), 0.96))

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

        def margin(logits: Tensor, y: Tensor) -> Tensor:
            true = logits.gather(1, y[:, None]).squeeze(1)
            return (logits - 1e9 * F.one_hot(y, CLASSES)).amax(1) - true

        for criterion, labels in ((per_sample_cross_entropy, soft_labels(y)), (margin, y)):
            x_adv = PGDAttack(Linf(0.1), criterion=criterion)(model, x, labels)
            assert bool((criterion(model(x_adv), labels) > criterion(model(x), labels)).all())
        one_hot = F.one_hot(y, CLASSES).double()
        hard = PGDAttack(Linf(0.1), seed=0)(model, x, y)
        assert torch.allclose(PGDAttack(Linf(0.1), seed=0)(model, x, one_hot), hard, atol=1e-9)


class TestBest:
    def _wave(self, z: Tensor, rows: Tensor) -> Tensor:
        """Rises and falls, so that the last point is seldom the best."""
        return torch.sin(40 * z).flatten(1).sum(1)

    def test_returns_the_highest_of_all_visited_points(self) -> None:
        x = torch.rand(6, 5, dtype=torch.float64)
        visited: list[Tensor] = []

        def watched(z: Tensor, rows: Tensor) -> Tensor:
            losses = self._wave(z, rows)
            visited.append(losses.detach())
            return losses

        x_adv = pgd(watched, x, Linf(0.2), steps=7, restarts=3, seed=0)
        assert len(visited) == 3 * (7 + 1)
        highest = torch.stack(visited).amax(0)
        assert torch.allclose(self._wave(x_adv, torch.arange(6)), highest, atol=1e-12)

    def test_the_last_point_is_visited_too(self) -> None:
        x = torch.full((2, 3), 0.5)
        x_adv = pgd(lambda z, rows: z.sum(1), x, Linf(0.1), steps=1, step_size=0.1, random_start=False)
        assert torch.allclose(x_adv, x + 0.1)

    def test_without_it_the_last_point_is_returned_for_one_pass_less(self) -> None:
        x = torch.rand(6, 5, dtype=torch.float64)
        calls = [0]

        def counted(z: Tensor, rows: Tensor) -> Tensor:
            calls[0] += 1
            return self._wave(z, rows)

        pgd(counted, x, Linf(0.2), steps=7, best=False)
        assert calls == [7]

    def test_more_restarts_are_never_worse(self) -> None:
        x = torch.rand(6, 5, dtype=torch.float64)
        losses = [self._wave(pgd(self._wave, x, Linf(0.2), restarts=n, seed=1), torch.arange(6)) for n in (1, 2, 5)]
        assert bool((losses[1] >= losses[0]).all())
        assert bool((losses[2] >= losses[1]).all())

    def test_a_given_start_is_where_it_starts(self) -> None:
        x = torch.full((3, 2), 0.5)
        start = torch.full((3, 2), 0.05)
        seen: list[Tensor] = []
        pgd(lambda z, rows: (seen.append(z.detach()), z.sum(1))[1], x, Linf(0.1), steps=1, start=start)
        assert torch.allclose(seen[0], x + start)


class TestEarlyStop:
    def test_fooled_samples_leave_and_stay_fooled(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(40)
        sizes: list[int] = []

        def spying(z: Tensor) -> Tensor:
            sizes.append(len(z))
            return model(z)

        full = PGDAttack(Linf(0.3), steps=10, seed=0)(model, x, y)
        stopped = PGDAttack(Linf(0.3), steps=10, seed=0, early_stop=True)(spying, x, y)
        assert torch.equal(model(full).argmax(1) == y, model(stopped).argmax(1) == y)
        assert sizes[-1] < sizes[0] == 40
        assert sizes == sorted(sizes, reverse=True)

    def test_rows_follow_the_samples(self) -> None:
        x = torch.rand(5, 3)
        seen: list[list[int]] = []

        def losses_at(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            seen.append(rows.tolist())
            return z.sum(1), rows == len(seen) - 1

        pgd(losses_at, x, Linf(0.1), steps=3)
        assert seen == [[0, 1, 2, 3, 4], [1, 2, 3, 4], [2, 3, 4], [3, 4]]

    def test_a_done_sample_keeps_its_point_even_if_its_loss_is_lower(self) -> None:
        x = torch.full((1, 2), 0.5)
        points: list[Tensor] = []

        def losses_at(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            points.append(z.detach())
            return -len(points) + 1e-9 * z.sum(1), torch.tensor([len(points) == 3])

        for best in (True, False):
            points.clear()
            assert torch.equal(pgd(losses_at, x, Linf(0.1), steps=5, best=best), points[2])

    def test_targeted_stops_at_the_target(self) -> None:
        model, (x, y) = make_model("conv"), make_batch(40)
        target = (y + 1) % CLASSES
        full = PGDAttack(Linf(0.3), targeted=True, seed=0)(model, x, target)
        stopped = PGDAttack(Linf(0.3), targeted=True, early_stop=True, seed=0)(model, x, target)
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
    return type(ATTACKS[name])(ATTACKS[name].threat, **seed, **options)


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
        attack = type(ATTACKS[name])(ATTACKS[name].threat, mode=mode)
        x_adv = attack(model, x, y)
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
        with pytest.warns(GradregWarning, match="BatchNorm2d is in training mode"):
            ATTACKS[name](model, x, y)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())

    def test_eval_mode_is_restored_after_an_exception(self, name: str) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch()
        flags = [module.training for module in model.modules()]
        attack = type(ATTACKS[name])(ATTACKS[name].threat, mode="eval", criterion=lambda logits, y: logits.mean())
        with pytest.raises(ValueError, match="reduction"):
            attack(model, x, y)
        assert [module.training for module in model.modules()] == flags

    def test_eval_mode_attacks_in_eval_mode(self, name: str) -> None:
        model, (x, y) = make_model("batch_norm_train"), make_batch()
        evaluated = copy.deepcopy(model).eval()
        attack, kept = _seeded(name, mode="eval"), _seeded(name)
        assert torch.equal(attack(model, x, y), kept(evaluated, x, y))

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


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def _fails(self, error: type[Exception], match: str, x: Tensor, y: Tensor, **options: object) -> None:
        model = options.pop("model", None) or make_model("conv")
        with pytest.raises(error, match=match):
            PGDAttack(options.pop("threat", Linf(0.1)), **options)(model, x, y)

    def test_images_of_bytes(self) -> None:
        x, y = make_batch()
        self._fails(TypeError, r"x.float\(\) / 255", (x * 255).byte(), y)

    def test_half_precision(self) -> None:
        x, y = make_batch()
        self._fails(TypeError, "torch.autocast", x.bfloat16(), y, model=make_model("conv", torch.bfloat16))

    def test_not_a_number(self) -> None:
        x, y = make_batch()
        x[0, 0, 0, 0] = float("nan")
        self._fails(ValueError, "an attack would do nothing", x, y)

    def test_pixels_out_of_bounds(self) -> None:
        x, y = make_batch()
        self._fails(ValueError, "with_normalization", (x - 0.5) / 0.2, y)
        self._fails(ValueError, 'out_of_bounds="clamp"', x * 255, y)

    def test_eps_in_another_unit(self) -> None:
        x, y = make_batch()
        self._fails(ValueError, r"Linf\(4 / 255\), not Linf\(4\)", x, y, threat=Linf(8))

    def test_ignored_label(self) -> None:
        x, y = make_batch()
        y[1] = -100
        self._fails(ValueError, "-100", x, y)

    def test_a_model_without_a_gradient(self) -> None:
        x, y = make_batch()
        model = make_model("conv")
        self._fails(RuntimeError, "detaches it", x, y, model=lambda z: model(z.detach()).detach())

    def test_a_model_that_returns_nan(self) -> None:
        x, y = make_batch()
        model = make_model("conv")
        self._fails(RuntimeError, "samples are NaN", x, y, model=lambda z: model(z) * float("nan"))

    def test_a_criterion_that_averages(self) -> None:
        self._fails(ValueError, 'reduction="none"', *make_batch(), criterion=nn.CrossEntropyLoss())

    def test_a_model_that_returns_no_tensor(self) -> None:
        model = make_model("conv")
        self._fails(TypeError, "Wrap the model in a module", *make_batch(), model=lambda z: {"logits": model(z)})

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"steps": 0}, "at least 1"),
            ({"restarts": 0}, "at least 1"),
            ({"restarts": 2, "best": False}, "best=True"),
            ({"restarts": 2, "random_start": False}, "random_start=True"),
            ({"mode": "train"}, '"keep" or "eval"'),
            ({"out_of_bounds": "ignore"}, '"check" or "clamp"'),
            ({"bounds": (1.0, 0.0)}, "lowest < highest"),
        ],
    )
    def test_options(self, options: dict[str, object], match: str) -> None:
        self._fails(ValueError, match, *make_batch(), **options)

    def test_a_model_in_the_place_of_the_threat(self) -> None:
        with pytest.raises(TypeError, match=r"attack\(model, x, y\)"):
            PGDAttack(make_model("conv"))

    def test_noise_of_n_fgsm(self) -> None:
        with pytest.raises(ValueError, match="multiple of eps"):
            NFGSM(Linf(0.1), noise=-1.0)

    def test_a_front_end_without_a_slope(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.warns(GradregWarning, match="straight-through"):
            PGDAttack(Linf(0.1))(lambda z: model(torch.round(z * 255) / 255), x, y)

    def test_a_saturated_loss(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.warns(GradregWarning, match="margin of logits"):
            PGDAttack(Linf(0.1))(lambda z: model(z) * 0 + 1e4 * F.one_hot(y, CLASSES), x, y)

    def test_early_stop_without_classes(self) -> None:
        x, y = make_batch()
        self._fails(ValueError, "K > 1", x, y.double()[:, None], early_stop=True, model=lambda z: z.flatten(1)[:, :1],
                    criterion=lambda logits, y: F.softplus(-logits * y).squeeze(1))  # fmt: skip

    def test_eval_mode_of_a_function(self) -> None:
        model = make_model("conv")
        self._fails(TypeError, "needs an nn.Module, got function", *make_batch(), mode="eval", model=lambda z: model(z))

    def test_shapes_of_pgd(self) -> None:
        x, _ = make_batch()

        def flat(z: Tensor, rows: Tensor) -> Tensor:
            return z.flatten(1).sum(1)

        for options, match in (
            ({"start": x[:2]}, "start is a perturbation"),
            ({"start": x.float()}, "start is a perturbation"),
            ({"index": torch.arange(5)}, "noise of a seed"),
            ({"index": torch.arange(3), "seed": 0}, "one position per sample"),
            ({"bounds": (torch.zeros(2), torch.ones(2))}, r"view\(-1, 1, 1\)"),
        ):
            with pytest.raises(ValueError, match=match):
                pgd(flat, x, Linf(0.1), **options)
        with pytest.raises(ValueError, match="bool of shape"):
            pgd(lambda z, rows: (flat(z, rows), torch.ones(len(z))), x, Linf(0.1))

    def test_inside_a_transform(self) -> None:
        model, (x, y) = make_model("conv"), make_batch()
        with pytest.raises(RuntimeError, match="attack first"):
            torch.func.grad(lambda z: PGDAttack(Linf(0.1))(model, z, y).sum())(x)

    def test_dropout_in_training_mode_warns(self) -> None:
        model, (x, y) = make_model("dropout_eval").train(), make_batch()
        with pytest.warns(GradregWarning, match="every step sees another model") as caught:
            PGDAttack(Linf(0.1))(model, x, y)
        assert [warning.filename for warning in caught] == [__file__]
