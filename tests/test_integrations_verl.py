"""verl's own functions with what stepagent registers in them (verl 0.9.1, in a venv of its own).

pip install -r tests/hosts/verl.txt
pip install --no-deps verl==0.9.1 TransferQueue==0.1.11
pytest tests/test_integrations_verl.py
"""

from __future__ import annotations

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from test_integrations import ADVANTAGES, MASK, REWARDS, UID, close, expected, log_ratio, runs
from tiny_models import tiny_model
from torch import Tensor

if find_spec("verl") is None:
    pytest.skip(
        "verl is not installed: it needs an environment of its own", allow_module_level=True
    )

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # verl's own warnings


def test_importing_verl_registers_all_of_it() -> None:
    import verl  # noqa: F401
    from verl.experimental.reward_loop.reward_manager.registry import get_reward_manager_cls
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn

    for name in ("stepagent_returns", "stepagent_group"):
        assert get_adv_estimator_fn(name).__module__ == "stepagent.integrations.verl"
    for name in ("stepagent_step", "stepagent_implicit"):
        assert get_policy_loss_fn(name).__module__ == "stepagent.integrations.verl_plugin"
    assert get_reward_manager_cls("stepagent").__name__ == "StepRewardManager"


def batch(outcomes: list[float]) -> object:
    from verl import DataProto
    from verl.experimental.reward_loop.reward_manager.registry import get_reward_manager_cls

    B, T = MASK.shape
    prompts = torch.full((B, 3), 5)
    data = DataProto.from_dict(
        tensors={
            "prompts": prompts,
            "responses": torch.arange(B * T).reshape(B, T) % 90 + 3,
            "attention_mask": torch.ones(B, 3 + T, dtype=torch.long),
            "response_mask": MASK,
        },
        non_tensors={
            "uid": np.array(UID, dtype=object),
            "step_rewards": np.array([*REWARDS, None], dtype=object)[:B],
        },
    )
    rewards = get_reward_manager_cls("stepagent").assemble_rm_scores(data, outcomes)
    data.batch["token_level_rewards"] = rewards
    return data


def test_rewards_of_the_manager_become_advantages_in_verls_compute_advantage() -> None:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.ray_trainer import compute_advantage

    config = OmegaConf.create({"gamma": 0.9})
    data = compute_advantage(batch([1.0, 0.0, 1.0, 0.0]), "stepagent_returns", config=config)
    paid = [[*r[:-1], r[-1] + o] for r, o in zip(REWARDS, [1.0, 0.0, 1.0, 0.0], strict=True)]

    def after(b: int, s: int) -> float:
        return sum(0.9**k * r for k, r in enumerate(paid[b][s:]))

    def advantage(b: int, s: int) -> float:
        others = [j for j in range(4) if j != b and UID[j] == UID[b]]
        return after(b, s) - sum(after(j, 0) for j in others) / len(others)

    close(data.batch["advantages"], expected(advantage))


@pytest.mark.parametrize("name", ["stepagent_step", "stepagent_implicit"])
def test_two_steps_of_training_by_verls_policy_loss(name: str) -> None:
    """A model of Hugging Face, verl's configuration and registry; the loss as in float64."""
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig, PolicyLossConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=2,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(loss_mode=name, ppo_kl_coef=0.3),
    )
    ids = torch.cat([torch.full((4, 3), 5), torch.arange(32).reshape(4, 8) % 90 + 3], 1)
    model = tiny_model("llama")
    before = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = expected(lambda b, s: ADVANTAGES[b][s]).float()

    def logps(policy: torch.nn.Module) -> Tensor:
        logits = policy(input_ids=ids).logits[:, 2:-1]
        return logits.log_softmax(-1).gather(2, ids[:, 3:, None]).squeeze(2)

    losses, right = [], []
    with torch.no_grad():
        old = logps(before)
        exact_old = logps(copy.deepcopy(before).double())
    for _ in range(3):
        loss, _ = get_policy_loss_fn(name)(
            old_log_prob=old,
            log_prob=logps(model),
            advantages=given,
            response_mask=MASK,
            loss_agg_mode="token-mean",
            config=config,
            rollout_is_weights=None,
        )
        with torch.no_grad():
            exact = logps(copy.deepcopy(model).double())
        losses.append(loss.item())
        right.append(token_mean(name, exact_old, exact))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(right, abs=1e-5)
    assert losses[2] < losses[0]


def token_mean(name: str, old: Tensor, new: Tensor) -> float:
    total = 0.0
    for b, row in enumerate(MASK.tolist()):
        for s, (start, stop) in enumerate(runs(row)):
            x, a = log_ratio(old, new, b, s), ADVANTAGES[b][s]
            if name == "stepagent_implicit":
                sign = (a > 0) - (a < 0)
                loss = abs(a) * float(np.log1p(np.exp(-sign * 0.3 * x)))
            else:
                ratio = float(np.exp(x))
                loss = -min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            total += loss * (stop - start)
    return total / int(MASK.sum())
