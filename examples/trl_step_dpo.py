"""TRL's DPOTrainer with its loss computed by stepagent's ops (written for TRL 1.16).

A row of TRL's batch is a state and one action taken there: the expert's (chosen) or the agent's
(rejected). Each action is a step, so DPO is StepAgent's implicit step reward, and the loss is

    r_s = β Σ_{n in s} (log π(y_n) − log π_ref(y_n)),    −log σ(r_chosen − r_rejected)

The head runs on the hidden rows that predict an action's tokens and on nothing else. Rows here hold
their whole prefix, as TRL pads them; `stepagent.StepAgentTrainer` encodes each prefix once.

Left out: losses other than TRL's default, adapters and precomputed reference log-probs (both come
without a `ref_model`), the metrics logits/* and mean_token_accuracy, which need the logits.

    python examples/trl_step_dpo.py        # a tiny model from scratch, offline, in seconds
"""

import copy
import tempfile

import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

import stepagent as sa
from stepagent.models import hidden_states, lm_head
from stepagent.tools.small_models import small_llama, word_tokenizer


class StepDPOTrainer(DPOTrainer):
    def __init__(self, model, ref_model, args, **kwargs):
        default = (["sigmoid"], "reverse_kl", None, False, False)
        extras = (args.use_weighting, args.precompute_ref_log_probs)
        asked = (args.loss_type, args.f_divergence_type, args.ld_alpha, *extras)
        if asked != default or ref_model is None:
            raise ValueError("StepDPOTrainer needs TRL's default loss and a ref_model")
        super().__init__(model, ref_model, args, **kwargs)

    def _compute_loss(self, model, inputs, return_outputs):
        if return_outputs:
            raise ValueError("StepDPOTrainer builds no logits to return: leave out compute_metrics")
        ids_BL, acted_BL = inputs["input_ids"], inputs["completion_mask"].bool()[:, 1:]
        labels_N = ids_BL[:, 1:][acted_BL]
        rows_N = F.pad(acted_BL, (0, 1)).flatten().nonzero().squeeze(1)  # token k: row k − 1
        step_offsets = F.pad(acted_BL.sum(1).cumsum(0), (1, 0))

        def score(model):
            keys = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            hidden_BLH = hidden_states(model, **keys, use_cache=False)
            head = lm_head(model)
            return sa.linear_logprobs(
                hidden_BLH.flatten(0, 1).to(head.weight_VH.dtype),
                head.weight_VH,
                labels_N,
                rows_N=rows_N,
                bias_V=head.bias_V,
                temperature=head.logit_divisor,
                softcap=head.softcap,
                return_entropy=True,
            )

        logps_N, entropy_N = score(model)
        with torch.no_grad():
            ref_logps_N, _ = score(self.ref_model)
        rewards_S = sa.step_rewards(logps_N, ref_logps_N, step_offsets, beta=self.beta)
        chosen_P, rejected_P = rewards_S.chunk(2)  # TRL's batch is [chosen, rejected]
        self._log_step(inputs, chosen_P, rejected_P, sa.step_sums(logps_N, step_offsets), entropy_N)
        return sa.implicit_step_loss(chosen_P, rejected_P).mean()

    @torch.no_grad()
    def _log_step(self, inputs, chosen_P, rejected_P, logps_S, entropy_N):
        """TRL's own metrics, under its names."""
        mode = "train" if self.model.training else "eval"
        gather = self.accelerator.gather
        if mode == "train":
            tokens = gather(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        scored = gather(torch.tensor(len(entropy_N), device=entropy_N.device)).sum()
        values = {
            "entropy": gather(entropy_N.sum()).sum() / scored.clamp(min=1),
            "rewards/chosen": gather(chosen_P).mean(),
            "rewards/rejected": gather(rejected_P).mean(),
            "rewards/accuracies": gather((chosen_P > rejected_P).float()).mean(),
            "rewards/margins": gather(chosen_P - rejected_P).mean(),
            "logps/chosen": gather(logps_S.chunk(2)[0]).mean(),
            "logps/rejected": gather(logps_S.chunk(2)[1]).mean(),
        }
        for name, value in values.items():
            self._metrics[mode][name].append(value.item())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


# Where the agent stands, what the expert does there, what the agent did.
STEP_PAIRS = [
    ("go to the red ball . red ball 1 left", "turn left", "turn right"),
    ("go to the red ball . red ball 3 ahead", "go forward", "turn left"),
    ("go to the blue key . blue key 2 right", "turn right", "go forward"),
    ("go to the blue key . blue key 1 ahead", "stop", "go forward"),
]


def step_pairs() -> Dataset:
    def message(role, content):
        return [{"role": role, "content": content}]

    return Dataset.from_list(
        [
            {
                "prompt": message("user", state),
                "chosen": message("assistant", expert),
                "rejected": message("assistant", agent),
            }
            for state, expert, agent in STEP_PAIRS
        ]
    )


def make_trainer(trainer_class, folder, **options):
    """The tiny model, its frozen copy as the reference, and the step pairs."""
    pairs = step_pairs()
    turns = [sa.Trajectory(row["prompt"] + row[k]) for row in pairs for k in ("chosen", "rejected")]
    tokenizer = word_tokenizer(turns)
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden_size=32, layers=2)
    args = DPOConfig(
        folder,
        beta=1.0,
        learning_rate=1e-2,
        per_device_train_batch_size=len(pairs),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        dataloader_pin_memory=False,
        **options,
    )
    data = {"train_dataset": pairs, "processing_class": tokenizer}
    return trainer_class(model, copy.deepcopy(model), args, **data)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(StepDPOTrainer, folder, num_train_epochs=10)
        trainer.train()
    for step in trainer.state.log_history:
        if "loss" in step:
            margin, accuracy = step["rewards/margins"], step["rewards/accuracies"]
            print(f"loss {step['loss']:.4f}  margin {margin:+.3f}  accuracy {accuracy:.0%}")


if __name__ == "__main__":
    main()
