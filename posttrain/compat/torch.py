"""torch: learning-rate schedules that continue with another number of parameter groups, and names of operators.

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
