"""Where each form comes to rest when the policy cannot be the expert: the laws, in float64."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "fixed_points.py"
    spec = importlib.util.spec_from_file_location("fixed_points", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradient(loss, logits):
    return torch.func.grad(loss)(logits)


def random_logits(toy, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(toy.untrained().shape, generator=generator, dtype=torch.float64)


def start_of_a_cycle(toy, logits, expert, temperature, beta=1.0):
    negatives = toy.at_temperature(logits, temperature)
    return gradient(lambda x: toy.implicit_loss(x, expert, logits, negatives, beta), logits)


def test_the_policy_is_a_distribution(toy):
    for temperature in (0.0, 0.5, 1.0):
        total = toy.at_temperature(random_logits(toy, 0), temperature).sum()
        torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("phrasings", [1, 4, 12])
def test_a_cycle_of_the_implicit_form_begins_as_supervised_learning(toy, phrasings, beta):
    """Samples at temperature 1 have a score of mean 0, in any parameterisation: β/2 × SFT's."""
    logits, expert = random_logits(toy, phrasings), toy.random_expert(phrasings, seed=1)
    supervised = gradient(lambda x: toy.sft_loss(x, expert), logits)
    found = start_of_a_cycle(toy, logits, expert, temperature=1.0, beta=beta)
    torch.testing.assert_close(found, beta / 2 * supervised, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_negatives_of_another_temperature_rest_elsewhere(toy, temperature):
    expert = toy.random_expert(4, seed=0)
    converged = toy.supervised(expert)
    at_one = start_of_a_cycle(toy, converged, expert, temperature=1.0).abs().max()
    elsewhere = start_of_a_cycle(toy, converged, expert, temperature).abs().max()
    assert at_one < 1e-3
    assert elsewhere > 0.02


def test_the_implicit_form_ends_where_supervised_learning_ends(toy):
    """From SFT that was cut short, with several phrasings and from one; never beyond it."""
    for phrasings in (1, 4):
        expert = toy.random_expert(phrasings, seed=2)
        early, converged = toy.supervised(expert, 25), toy.supervised(expert)
        ended = toy.valid(toy.implicit(early, expert), expert)
        assert ended > toy.valid(early, expert) + 0.1
        assert ended == pytest.approx(toy.valid(converged, expert), abs=5e-3)


def test_the_inverse_form_begins_as_descent_of_the_jensen_shannon_divergence(toy):
    """∇ E_π[−log D*] = −2 ∇ JS(π ‖ π_E), the reward held fixed (a GAN's envelope)."""
    logits, expert = random_logits(toy, 5), toy.random_expert(4, seed=3)
    rewards = toy.inverse_rewards(toy.log_policy(logits).exp(), expert, "agent")
    found = gradient(lambda x: toy.inverse_loss(x, logits, rewards), logits)
    divergence = gradient(lambda x: toy.jensen_shannon(x, expert), logits)
    torch.testing.assert_close(found, 2 * divergence, atol=1e-12, rtol=0)


def test_the_difference_form_begins_as_descent_of_the_reverse_kl(toy):
    logits = random_logits(toy, 6)
    expert = torch.distributions.Dirichlet(torch.ones(len(toy.TEXTS)).double()).sample()
    rewards = toy.inverse_rewards(toy.log_policy(logits).exp(), expert, "difference")
    found = gradient(lambda x: toy.inverse_loss(x, logits, rewards), logits)

    def reverse_kl(x):
        log_pi = toy.log_policy(x)
        return (log_pi.exp() * (log_pi - (expert + 1e-6).log())).sum()

    torch.testing.assert_close(found, gradient(reverse_kl, logits), atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_inverse_form_gains_where_the_expert_has_several_ways(toy, seed):
    """It gives up phrasings for validity; where there is one phrasing, it is SFT."""
    expert = toy.random_expert(4, seed)
    converged = toy.supervised(expert)
    ended = toy.inverse(converged, expert)
    assert toy.valid(ended, expert) > toy.valid(converged, expert) + 0.04
    assert toy.jensen_shannon(ended, expert) < toy.jensen_shannon(converged, expert)
    assert toy.phrasings_in_use(ended, expert) < 4


def test_with_one_phrasing_nothing_is_left_to_gain(toy):
    expert = toy.random_expert(1, seed=0)
    converged = toy.supervised(expert)
    assert toy.valid(converged, expert) > 0.99
    for ended in (toy.implicit(converged, expert, cycles=2), toy.inverse(converged, expert)):
        assert toy.valid(ended, expert) == pytest.approx(1.0, abs=0.01)
