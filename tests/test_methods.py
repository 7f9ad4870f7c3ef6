"""Methods are files behind one protocol, and one of your own needs no change elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_noise import trajectories
from tiny_models import babyai_tokenizer, tiny_agent

import stepagent as sa
from stepagent.learning import methods
from stepagent.learning.config import StepAgentConfig
from stepagent.learning.trainer import StepAgentTrainer

PAGE = Path(__file__).parents[1] / "docs" / "training.md"
HINGE = re.search(r"```python\n(from dataclasses.*?)\nargs = ", PAGE.read_text(), re.S)


@pytest.fixture
def hinge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The method of the docs, in a file of its own; its module's name."""
    assert HINGE is not None
    monkeypatch.setattr(methods, "_registered", {})
    (tmp_path / "my_hinge.py").write_text(HINGE.group(1))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_hinge", raising=False)
    return "my_hinge"


@pytest.fixture
def config(tmp_path: Path) -> Any:
    def make(**options: Any) -> StepAgentConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "cycles": 2,
        }
        return StepAgentConfig(**defaults | options)

    return make


def trainer(args: StepAgentConfig, **options: Any) -> StepAgentTrainer:
    return StepAgentTrainer(tiny_agent(), args, trajectories(), babyai_tokenizer(), **options)


def weights(made: StepAgentTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.model.parameters()])


def test_the_method_of_the_docs_is_short():
    assert HINGE is not None
    assert len(HINGE.group(1).splitlines()) < 60


def test_a_method_of_your_own_learns_by_its_loss(hinge, config):
    args = config(method=f"{hinge}:Hinge", method_options={"margin": 2.0}, samples=3)
    made = trainer(args)
    made.train()
    cycles = [entry for entry in made.state.log_history if "cycle" in entry]
    assert cycles[1]["ahead"] > cycles[0]["ahead"]
    batch = made._collate(made._comparisons)
    with torch.no_grad():
        loss = float(made.compute_loss(made.model, batch))
    logps = [s.sum() for s in np.split(_logps(made, batch), batch["steps"].offsets[1:-1].numpy())]
    pairs = zip(batch["steps"].expert_P.tolist(), batch["steps"].agent_P.tolist(), strict=True)
    expected = np.mean([max(0.0, 2.0 - logps[e] + logps[a]) for e, a in pairs])
    assert loss == pytest.approx(expected, rel=1e-5)


def _logps(made: StepAgentTrainer, batch: dict[str, Any]) -> np.ndarray:
    with torch.no_grad():
        return sa.models.score_trees(made.model, batch["trees"]).double().numpy()


def test_a_method_of_your_own_resumes_bit_for_bit(hinge, config, tmp_path):
    options = {"method": f"{hinge}:Hinge", "samples": 2, "save_strategy": "steps", "save_steps": 1}
    whole = trainer(config(**options))
    whole.train()
    steps = whole.state.global_step
    again = trainer(config(**options))
    again.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{steps // 2 + 1}"))
    assert torch.equal(weights(again), weights(whole))


def test_a_registered_name_is_a_method(hinge, config):
    __import__(hinge)
    assert trainer(config(method="hinge"))._method.options.margin == 1.0
    with pytest.raises(ValueError, match="'sft', which there is already"):
        sa.methods.register_method("sft")(sa.methods.Method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dager"}, "got 'dager'; did you mean 'dagger'"),
        ({"method": "nowhere:Method"}, "method must be importable, got 'nowhere:Method'"),
        ({"method": "pathlib:Path"}, "must be a subclass of stepagent.methods.Method"),
        (
            {"method": "sft", "beta": 0.5},
            "beta is an option of method='implicit' or 'eto' or 'ipr' or 'istar', got beta=0.5",
        ),
        ({"clip": 0.1}, "clip is an option of method='inverse'.* with method='implicit'"),
        ({"method": "sft", "baseline": "group"}, "baseline is an option of method='inverse'"),
        (
            {"method": "dagger", "states": "expert"},
            "method='dagger' asks the expert",
        ),
        (
            {"method_options": {"margin": 2}},
            r"method_options must be of \[\] for",
        ),
        ({"method_options": {"beta": 2}}, r"method_options must be of \[\] .* got 'beta'"),
        ({"method_options": "[1]"}, "method_options must be a JSON object"),
        ({"method_options": "{"}, "method_options must be a JSON object"),
    ],
)
def test_what_is_no_method_or_of_another_is_refused(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_an_unknown_option_of_your_own_is_refused(hinge, config):
    with pytest.raises(ValueError, match=r"must be of \['margin'\] .* got 'margni'"):
        config(method=f"{hinge}:Hinge", method_options={"margni": 2})


def test_dagger_is_sft_at_the_agents_states(config):
    assert methods.method_class("dagger") is methods.method_class("sft", "agent")
    args = config(method="dagger")
    assert (args.states, args.has_cycles) == ("agent", True)
    with pytest.raises(ValueError, match="states='agent' needs env"):
        trainer(args)
