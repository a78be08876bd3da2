"""torch: schedules for another number of parameter groups, names of operators, attention with its log-sum-exp.

Importing this module does not import torch.
"""

from functools import partial
from typing import Any

from posttrain.compat.patches import patch, record

_patch = partial(patch, "torch")


@_patch(
    "2.13.0",
    "gap",
    reason="The state of a `LambdaLR` has one entry for each parameter group. Experts that are divided among ranks are "
    "groups of their own, so a state that was saved in another layout does not fit",
    reference="torch/optim/lr_scheduler.py, `LambdaLR.load_state_dict`",
    test="tests/test_compat.py::test_torch_still_ties_a_schedule_to_its_parameter_groups",
)
def advance_schedule(schedule: Any, steps: int) -> None:
    """Set a `LambdaLR` to its state after `steps` steps, for any number of parameter groups."""
    schedule.last_epoch = steps
    schedule._step_count = steps + 1
    rates = [base * scale(steps) for base, scale in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


@_patch(
    "2.13.0",
    "gap",
    reason="A policy of selective checkpointing is called with operators. The class that names them is private",
    reference="torch/_ops.py, `OpOverload`; torch.utils.checkpoint.create_selective_checkpoint_contexts",
    test="tests/test_model.py::test_selective_checkpointing_computes_no_product_or_attention_again",
)
def operator_name(op: Any) -> str:
    """The name of an operator without its overload, such as aten::mm; "" for any other object."""
    import torch

    return op.name().partition(".")[0] if isinstance(op, torch._ops.OpOverload) else ""


@_patch(
    "2.13.0",
    "gap",
    reason="`scaled_dot_product_attention` does not return the log-sum-exp of scores, by which attention over parts of "
    "the keys is merged. The operator behind it does",
    reference="aten/src/ATen/native/native_functions.yaml, `_scaled_dot_product_flash_attention_for_cpu`",
    test="tests/test_shared_prefix.py::test_all_ways_of_attention_are_that_of_the_documents",
)
def flash_attention(q: Any, k: Any, v: Any, *, causal: bool, mask: Any = None) -> tuple[Any, Any]:
    """Attention on a CPU. q [R, H, Q, d], k and v [R, H, K, d], mask None or to be added to the scores.

    Returns the output and the log-sum-exp of each query's scores [R, H, Q], in fp32 (fp64 for fp64).
    """
    import torch

    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)


@_patch(
    "2.13.0",
    "gap",
    reason="The gradients of a part of the keys need the log-sum-exp of all of them, which only this operator takes",
    reference="aten/src/ATen/native/native_functions.yaml, `_scaled_dot_product_flash_attention_for_cpu_backward`",
    test="tests/test_shared_prefix.py::test_all_ways_of_attention_are_that_of_the_documents",
)
def flash_attention_gradients(
    grad: Any, inputs: tuple[Any, Any, Any], outputs: tuple[Any, Any], *, causal: bool, mask: Any = None
) -> tuple[Any, Any, Any]:
    """The gradients of q, k and v. grad: of the output. inputs, outputs: of `flash_attention`."""
    import torch

    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, *inputs, *outputs, 0.0, causal, attn_mask=mask)


record(
    "posttrain.parallel.ending.end_rank",
    "torch",
    "2.13.0",
    kind="fault",
    reason="If a thread of gloo asks for Python's lock while Python finalises, the process aborts (status -6). So a "
    "rank ends without finalisation",
    reference="pytorch/pytorch#190489, pytorch/pytorch#179291",
    test="tests/test_rank_ending.py::test_a_late_callback_aborts_finalisation_and_not_a_rank_that_ends",
)
