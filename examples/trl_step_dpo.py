"""TRL's DPOTrainer on step pairs: as rows that TRL pads, and as token trees (TRL 1.16).

An expert's trajectory, and at each of its steps an action that the agent tried: the expert's is
preferred. As rows, each pair holds its whole state twice; as a tree, every token is encoded once.
The loss is the same.

    python examples/trl_step_dpo.py        # a tiny model from scratch, offline, in seconds
"""

import copy
import tempfile

import torch
from datasets import Dataset
from trl import DPOConfig

import stepagent as sa
from stepagent.integrations.trl import StepDPOTrainer, TreeDPOTrainer, tree_rows
from stepagent.tools.small_models import small_llama, word_tokenizer

# What the expert saw and did, and what the agent would have done there.
STEPS = [
    ("go to the red ball . red ball 1 left", "turn left", "turn right"),
    ("red ball 3 ahead", "go forward", "turn left"),
    ("red ball 1 ahead . blue key 2 right", "go forward", "stop"),
    ("you are at the red ball", "stop", "go forward"),
]


def said(role, content):
    return {"role": role, "content": content}


def trajectory():
    turns = [(said("user", seen), said("assistant", done)) for seen, done, _ in STEPS]
    return sa.Trajectory([message for turn in turns for message in turn])


def pairs_as_rows(expert) -> list[dict]:
    return [
        {
            "prompt": expert.messages[: 2 * t + 1],
            "chosen": [said("assistant", done)],
            "rejected": [said("assistant", tried)],
        }
        for t, (_, done, tried) in enumerate(STEPS)
    ]


def pairs_as_tree(expert, tokenizer) -> list[dict]:
    def ids(text):  # of one action, as the model would write it
        trunk = sa.encode(sa.Trajectory([said("user", "stop"), said("assistant", text)]), tokenizer)
        return trunk.input_ids[slice(*trunk.action_spans[0])]

    return tree_rows([sa.encode(expert, tokenizer)], [[[ids(tried)] for *_, tried in STEPS]])


def make_trainer(trainer_class, folder, **options):
    """The tiny model, its frozen copy as the reference, and the step pairs."""
    expert = trajectory()
    tried = [sa.Trajectory([said("user", "stop"), said("assistant", text)]) for *_, text in STEPS]
    tokenizer = word_tokenizer([expert, *tried])
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden_size=32, layers=2)
    tree = issubclass(trainer_class, TreeDPOTrainer)
    rows = pairs_as_tree(expert, tokenizer) if tree else pairs_as_rows(expert)
    args = DPOConfig(
        folder,
        beta=1.0,
        learning_rate=1e-2,
        per_device_train_batch_size=len(rows),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=False,
        dataloader_pin_memory=False,
        **options,
    )
    data = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer}
    return trainer_class(model, copy.deepcopy(model), args, **data)


def main() -> None:
    for trainer_class in (StepDPOTrainer, TreeDPOTrainer):
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(trainer_class, folder, num_train_epochs=5, disable_tqdm=True)
            trainer.train()
        steps = [step for step in trainer.state.log_history if "loss" in step]
        losses = " ".join(f"{step['loss']:.4f}" for step in steps)
        print(f"{trainer_class.__name__}: {losses}, accuracy {steps[-1]['rewards/accuracies']:.0%}")


if __name__ == "__main__":
    main()
