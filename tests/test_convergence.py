"""The paper's claim on tabular policies, in float64: where the laws hold, and where they do not."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

SEEDS = range(20)


@pytest.fixture(scope="module")
def tabular() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "convergence.py"
    spec = importlib.util.spec_from_file_location("convergence", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("beta", [0.3, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_implicit_cycle_solved_exactly_is_the_closed_form(tabular, seed, beta):
    """Newton's method on the loss, through the project's own objective, to 1e-9."""
    log_pi, log_expert = tabular.random_policies(seed)
    solved = tabular.solve_implicit(log_pi, log_expert, beta)
    law = tabular.implicit_cycle(log_pi, log_expert, beta)
    torch.testing.assert_close(solved.exp(), law.exp(), atol=1e-9, rtol=0)


def test_the_first_gradient_is_beta_half_of_the_supervised_one(tabular):
    log_pi, log_expert = tabular.random_policies(3)
    gradient = torch.autograd.functional.jacobian(
        lambda x: tabular.implicit_loss(x, log_pi, log_expert, 0.7), log_pi
    )
    supervised = log_pi.exp() - log_expert.exp()  # of −Σ π_E log softmax(logits)
    torch.testing.assert_close(gradient, 0.35 * supervised, atol=1e-12, rtol=0)


@pytest.mark.parametrize("beta", [0.6, 1.0, 2.0])
def test_implicit_converges_above_one_half(tabular, beta):
    for seed in SEEDS:
        distances = tabular.curve(lambda p, e: tabular.implicit_cycle(p, e, beta), seed, 60)
        assert distances[0] > 0.01
        assert distances[-1] < 0.01


def test_implicit_with_beta_one_is_there_after_one_cycle(tabular):
    for seed in SEEDS:
        assert tabular.curve(lambda p, e: tabular.implicit_cycle(p, e, 1.0), seed, 1)[1] < 1e-12


@pytest.mark.parametrize("beta", [0.3, 0.45])
def test_implicit_solved_exactly_diverges_below_one_half(tabular, beta):
    for seed in SEEDS:
        distances = tabular.curve(lambda p, e: tabular.implicit_cycle(p, e, beta), seed, 60)
        assert distances[-1] > 0.1


@pytest.mark.parametrize("beta", [0.45, 0.6, 2.0])
def test_a_cycle_multiplies_the_error_of_log_probs(tabular, beta):
    """log π' − log π_E = (1 − 1/β) (log π − log π_E), up to a constant."""
    log_pi, log_expert = tabular.random_policies(5)
    before = log_pi - log_expert
    after = tabular.implicit_cycle(log_pi, log_expert, beta) - log_expert
    expected = (1 - 1 / beta) * before
    torch.testing.assert_close(after - after[0], expected - expected[0], atol=1e-10, rtol=0)


def test_a_small_beta_with_few_updates_a_cycle_converges(tabular):
    def cycle(log_pi, log_expert):
        return tabular.descend_implicit(log_pi, log_expert, 0.1, updates=4, learning_rate=10.0)

    for seed in SEEDS:
        assert tabular.curve(cycle, seed, 60)[-1] < 0.01


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_inverse_converges_at_the_best_discriminator(tabular, temperature):
    for seed in SEEDS:
        distances = tabular.curve(lambda p, e: tabular.inverse_cycle(p, e, temperature), seed, 60)
        assert distances[-1] < 0.01


def test_inverse_does_not_converge_below_a_quarter(tabular):
    """Its error is multiplied by 1 − 1/(2τ) near the expert: −1.5 for τ = 0.2."""
    for seed in SEEDS:
        distances = tabular.curve(lambda p, e: tabular.inverse_cycle(p, e, 0.2), seed, 60)
        assert distances[-1] > 0.01
    log_expert = tabular.random_policies(4)[1]
    nearby = (log_expert + 1e-6 * torch.arange(5)).log_softmax(0)
    after = tabular.inverse_cycle(nearby, log_expert, 0.2) - log_expert
    before = nearby - log_expert
    torch.testing.assert_close(after - after[0], -1.5 * (before - before[0]), rtol=1e-4, atol=0)


def test_inverse_with_temperature_one_is_the_mean_of_both(tabular):
    log_pi, log_expert = tabular.random_policies(7)
    mean = (log_pi.exp() + log_expert.exp()) / 2
    torch.testing.assert_close(tabular.inverse_cycle(log_pi, log_expert, 1.0).exp(), mean)


@pytest.mark.parametrize("form", ["agent", "expert", "difference"])
def test_the_expert_is_the_fixed_point_of_inverse(tabular, form):
    _, log_expert = tabular.random_policies(8)
    after = tabular.inverse_cycle(log_expert, log_expert, 0.5, form)
    torch.testing.assert_close(after, log_expert, atol=1e-12, rtol=0)


def test_the_difference_form_is_the_implicit_law(tabular):
    log_pi, log_expert = tabular.random_policies(9)
    inverse = tabular.inverse_cycle(log_pi, log_expert, 0.7, "difference")
    torch.testing.assert_close(inverse, tabular.implicit_cycle(log_pi, log_expert, 0.7))


def test_the_example_draws_and_tells(tabular, tmp_path, monkeypatch, capsys):
    output = tmp_path / "curves"
    monkeypatch.setattr(
        "sys.argv", ["convergence", "--cycles", "3", "--seeds", "2", "--output", str(output)]
    )
    tabular.main()
    assert output.with_suffix(".png").stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == len(tabular.CASES) + 1
