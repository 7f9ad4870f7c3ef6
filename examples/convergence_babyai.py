"""The same question on a real environment: how close to the expert does each cycle bring the agent?

BabyAI's bot says what the expert does at any state. It does one thing, so the divergence from the
expert is KL(π_E ‖ π) = −log π(a_E | s), averaged over states: those of held-out expert
trajectories, and those that the agent itself comes to on held-out levels. Agreement is how often an
action sampled from π is the expert's, which is E π(a_E | s).

Starts from the supervised model of a finished demo and continues in three ways, each with the
demo's settings and as many updates: SFT, StepAgent implicit, StepAgent inverse (the last two at the
agent's own states).

    stepagent demo && python examples/convergence_babyai.py --demo runs/demo
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import stepagent as sa
from stepagent.tools.demo import Settings, stage_options

WAYS = {
    "SFT continued": "sft_continued",
    "StepAgent, implicit": "stepagent",
    "StepAgent, inverse": "inverse",
}
MEASURES = {
    "kl_expert_states": "KL(π_E ‖ π), expert's states",
    "kl_agent_states": "KL(π_E ‖ π), agent's states",
    "agreement_expert_states": "agreement, expert's states",
    "agreement_agent_states": "agreement, agent's states",
}


class Distance:
    """KL and agreement at two kinds of states."""

    def __init__(self, settings, tokenizer, held_out, episodes):
        self.settings, self.tokenizer, self.episodes = settings, tokenizer, episodes
        self.trunks = [sa.encode(t, tokenizer) for t in held_out[:episodes]]

    @torch.no_grad()
    def __call__(self, model):
        nothing = [[[] for _ in trunk.action_spans] for trunk in self.trunks]
        expert = self._logps(model, self.trunks, nothing, branch=0)
        trunks, answers = sa.rollout_and_query(
            model,
            self.settings.environment,
            None,
            tokenizer=self.tokenizer,
            seeds=self.settings.validation_seeds[: self.episodes],
            max_new_tokens=3,
            temperature=1.0,
            eos_token_id=self.tokenizer.eos_token_id,
            max_steps=self.settings.rollout_max_steps,
        )
        agent = self._logps(model, trunks, answers, branch=1)
        return {
            "kl_expert_states": float(-expert.mean()),
            "kl_agent_states": float(-agent.mean()),
            "agreement_expert_states": float(expert.exp().mean()),
            "agreement_agent_states": float(agent.exp().mean()),
        }

    def _logps(self, model, trunks, branches, branch):
        """log π of the expert's action at each state: the trunk's own, or the answer."""
        parts = []
        for tree in sa.pack_step_pairs(trunks, branches, max_tokens=4096):
            logps = sa.step_sums(sa.score_trees(model, [tree]), tree.step_offsets)
            parts.append(logps[torch.from_numpy(tree.step_branch == branch)])
        return torch.cat(parts)


class AfterEachCycle(TrainerCallback):
    def __init__(self, measure, epochs_per_cycle):
        self.measure, self.every, self.curve = measure, epochs_per_cycle, []

    def on_epoch_end(self, args, state, control, model=None, **_):
        if round(state.epoch) % self.every == 0:
            self.curve.append(self.measure(model))


def curves(demo, episodes):
    """The measures before the first cycle and after each, for each way to continue."""
    settings = Settings(**json.loads((demo / "settings.json").read_text()))
    tokenizer = AutoTokenizer.from_pretrained(demo / "tokenizer")
    trajectories = sa.load_trajectories(demo / "expert.jsonl")
    held_out = sa.load_trajectories(demo / "expert_held_out.jsonl")
    measure = Distance(settings, tokenizer, held_out, episodes)
    found = {}
    for name, stage in WAYS.items():
        model = AutoModelForCausalLM.from_pretrained(demo / "sft", use_safetensors=True)
        watch = AfterEachCycle(measure, settings.epochs_per_cycle)
        before = measure(model)
        with tempfile.TemporaryDirectory() as folder:
            args = sa.StepAgentConfig(
                output_dir=folder, save_strategy="no", **stage_options(settings, stage)
            )
            sa.StepAgentTrainer(
                model,
                args,
                trajectories,
                tokenizer,
                env=settings.environment if args.states == "agent" else None,
                callbacks=[watch],
            ).train()
        found[name] = [before, *watch.curve]
    return found


def plot(found, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(2, 2).flat, MEASURES.items(), strict=True):
        for name, curve in found.items():
            axes.plot([point[measure] for point in curve], "o-", markersize=4, label=name)
        axes.set(title=title, xlabel="cycle (0: SFT)", xticks=range(len(curve)))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"))
    parser.add_argument("--episodes", type=int, default=100, help="of either kind of states")
    parser.add_argument("--output", type=Path, default=Path("convergence_babyai"))
    args = parser.parse_args()
    found = curves(args.demo, args.episodes)
    args.output.with_suffix(".json").write_text(json.dumps(found, indent=1))
    plot(found, args.output.with_suffix(".png"))
    for name, curve in found.items():
        last = {measure: round(value, 3) for measure, value in curve[-1].items()}
        print(f"{name}: {last}")
    print(f"Wrote {args.output}.json and {args.output}.png")


if __name__ == "__main__":
    main()
