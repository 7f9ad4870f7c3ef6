"""The custom operators as torch sees them: opcheck, gradcheck, compilation, what they import."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import (
    EXACT,
    HEAD_LEAVES,
    diff_inputs,
    head,
    linear_inputs,
    logits,
    run,
)
from torch import Tensor

from stepagent import ops
from stepagent.ops import linear, linear_diff, pairs, rewards, sums, token_diff, tokens

OFFSETS = torch.tensor([0, 2, 2, 5, 6, 6])  # two empty steps, one of them last


def test_memory_is_poisoned_in_these_tests() -> None:
    assert linear.torch.empty(3).isnan().all()
    assert not torch.ones(3).isnan().any()


def op_calls(**shapes: int) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    arguments = head(**shapes)
    leaves = {k: arguments[k].requires_grad_() for k in HEAD_LEAVES}
    given = logits()
    given["logits_NV"].requires_grad_()
    values_N = torch.randn(6, dtype=torch.float64, requires_grad=True)
    bare = {
        **arguments,
        "bias_V": None,
        "rows_N": None,
        "softcap": None,
        "temperature": torch.ones((), dtype=torch.float64),
    }
    bare["labels_N"] = torch.tensor([0, -100, 3, *[2] * (shapes.get("R", 7) - 3)])
    frozen = {**arguments, **{k: v.detach() for k, v in leaves.items() if k != "hidden_RH"}}
    double = {"temperature": arguments["temperature"].double()}
    arguments, frozen = arguments | double, frozen | double
    ref = {f"ref_{k}": arguments[k].detach().flip(0) for k in HEAD_LEAVES}
    pair = {**arguments, **ref, "ref_rows_N": arguments["rows_N"]}
    shared = {**pair, **frozen, **{f"ref_{k}": frozen[k] for k in ("weight_VH", "bias_V")}}
    token_inputs = (given["logits_NV"], given["labels_N"], given["temperature"].double())
    two_logits = (token_inputs[0], logits(seed=3)["logits_NV"], *token_inputs[1:])
    return {
        "linear": (linear.linear_logprobs_op, linear_inputs(arguments)),
        "linear, bare": (
            linear.linear_logprobs_op,
            (*linear_inputs(bare)[:7], False, *linear_inputs(bare)[8:]),
        ),
        "linear, frozen head": (linear.linear_logprobs_op, linear_inputs(frozen)),
        "linear, kept gradient": (linear.linear_logprobs_op, linear_inputs(frozen, "gradient")),
        "linear, kept logits": (linear.linear_logprobs_op, linear_inputs(bare, "logits", 200)),
        "linear diff": (linear_diff.linear_logprob_diff_op, diff_inputs(pair)),
        "linear diff, kept gradient": (
            linear_diff.linear_logprob_diff_op,
            diff_inputs(shared, "gradient"),
        ),
        "token": (tokens.token_logprobs_op, (*token_inputs, True, "device")),
        "token, no entropy": (tokens.token_logprobs_op, (*token_inputs, False, "device")),
        "diff": (token_diff.logprob_diff_op, (*two_logits, "device")),
        "steps": (sums.step_sums_op, (values_N, OFFSETS)),
        "step rewards": (
            rewards.step_rewards_op,
            (values_N, values_N.detach().flip(0), OFFSETS, 0.3),
        ),
        "step pairs": (
            pairs.step_pair_loss_op,
            (
                values_N,
                values_N.detach().flip(0),
                OFFSETS,
                torch.tensor([0, 0, 1]),
                torch.tensor([2, 3, 1]),
                0.3,
            ),
        ),
    }


# What others call and what compiled graphs hold: an operator keeps its name and its order.
SCHEMAS = """
linear_logprob_diff(Tensor hidden_RH, Tensor weight_VH, Tensor ref_hidden_RH, Tensor ref_weight_VH,\
 Tensor labels_N, Tensor? rows_N, Tensor? ref_rows_N, Tensor? bias_V, Tensor? ref_bias_V,\
 Tensor temperature, float? softcap, str keep, SymInt keep_bytes, str group, str check)\
 -> (Tensor, Tensor, Tensor, Tensor, Tensor)
linear_logprobs(Tensor hidden_RH, Tensor weight_VH, Tensor labels_N, Tensor? rows_N,\
 Tensor? bias_V, Tensor temperature, float? softcap, bool with_entropy, str keep,\
 SymInt keep_bytes, str group, str check, bool batch_invariant, Tensor? kept_NK=None)\
 -> (Tensor, Tensor, Tensor, Tensor, Tensor)
linear_logprobs_backward(Tensor grad_logps_N, Tensor? grad_entropy_N, Tensor[] results,\
 Tensor hidden_RH, Tensor weight_VH, Tensor labels_N, Tensor? rows_N, Tensor? bias_V,\
 Tensor temperature, float? softcap, Tensor kept, str keep, str group, bool[] needs,\
 Tensor? kept_NK=None) -> (Tensor, Tensor, Tensor)
logprob_diff(Tensor logits_NV, Tensor ref_logits_NV, Tensor labels_N, Tensor temperature,\
 str check) -> (Tensor, Tensor, Tensor, Tensor)
step_gae(Tensor rewards_S, Tensor values_S, Tensor trajectory_offsets, Tensor? bootstrap_B,\
 float gamma, float lam) -> (Tensor, Tensor)
step_pair_loss(Tensor logps_N, Tensor ref_logps_N, Tensor step_offsets, Tensor expert_steps_P,\
 Tensor agent_steps_P, float beta) -> (Tensor, Tensor)
step_pair_loss_backward(Tensor grad_P, Tensor pull_P, Tensor step_offsets, Tensor expert_steps_P,\
 Tensor agent_steps_P, float beta, SymInt N, ScalarType dtype) -> Tensor
step_rewards(Tensor logps_N, Tensor ref_logps_N, Tensor step_offsets, float beta) -> Tensor
step_rewards_backward(Tensor grad_S, Tensor step_offsets, float beta, SymInt N, ScalarType dtype)\
 -> Tensor
step_sums(Tensor values_N, Tensor step_offsets) -> Tensor
token_logprobs(Tensor logits_NV, Tensor labels_N, Tensor temperature, bool with_entropy,\
 str check) -> (Tensor, Tensor, Tensor, Tensor)
token_logprobs_backward(Tensor grad_logps_N, Tensor? grad_entropy_N, Tensor[] results,\
 Tensor logits_NV, Tensor labels_N, Tensor temperature) -> Tensor
"""


def test_operators_keep_their_names_and_the_order_of_their_schemas() -> None:
    registered = [
        torch._C._get_schema(name, "")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("stepagent::")
    ]
    written = [f"stepagent::{line}" for line in SCHEMAS.strip().splitlines()]
    assert sorted(map(str, registered)) == written


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
@pytest.mark.parametrize("case", op_calls())
def test_opcheck(case: str) -> None:
    op, inputs = op_calls()[case]
    torch.library.opcheck(op.custom_op, inputs)


@pytest.mark.parametrize("case", op_calls())
def test_gradcheck(case: str) -> None:
    op, inputs = op_calls(R=3, H=2, V=4, N=3)[case]
    torch.autograd.gradcheck(lambda *a: op.custom_op(*a), inputs)


def scored_rewards(arguments: dict[str, Any]) -> Tensor:
    logps_N, entropy_N = ops.linear_logprobs(**arguments, return_entropy=True)
    logits_NV = arguments["hidden_RH"] @ arguments["weight_VH"].T
    labels_R = torch.arange(logits_NV.shape[0])
    diff_R, kl_R = ops.logprob_diff(logits_NV, 2 * logits_NV, labels_R, return_kl=True)
    rewards_S = ops.step_rewards(logps_N, entropy_N, torch.tensor([0, 4, 9]), beta=0.5)
    steps = torch.tensor([0, 4, 9]), torch.tensor([0, 1]), torch.tensor([1, 1])
    loss_P = ops.step_pair_loss(logps_N, entropy_N, *steps, beta=0.5)
    sums_S = ops.step_sums(entropy_N, np.array([0, 9]))
    return rewards_S.sum() + (diff_R + kl_R).sum() + sums_S.sum() + loss_P.sum()


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_compile_fullgraph_gives_the_same() -> None:
    compiled = torch.compile(scored_rewards, fullgraph=True, backend="aot_eager")
    expected = run(lambda **a: scored_rewards(a), head(), HEAD_LEAVES)
    actual = run(lambda **a: compiled(a), head(), HEAD_LEAVES)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **EXACT)
    bad = {**head(), "labels_N": torch.full((9,), 17)}
    with pytest.raises(ValueError, match=r"labels_N\[0\] must lie in .*, got 17"):
        compiled(bad)


def test_importing_the_ops_loads_no_triton() -> None:
    code = "import sys, stepagent.ops; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
