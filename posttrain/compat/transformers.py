"""transformers: Llama 4's prefix and unread default, and how its trainer divides a loss.

Importing this module does not import transformers.
"""

from functools import partial
from typing import Any

from posttrain.compat.patches import patch, record

_patch = partial(patch, "transformers")


@_patch(
    "5.19.0",
    "fault",
    reason="`Llama4ForCausalLM.base_model_prefix` names an attribute that the class does not have; TRL finds the "
    "layers by this prefix, because it runs them and the head separately",
    reference="transformers/models/llama4/modeling_llama4.py, `Llama4ForCausalLM`",
    test="tests/test_compat.py::test_transformers_still_gives_llama4_a_prefix_that_it_does_not_have",
)
def name_base_model(model: Any) -> None:
    """Let `base_model_prefix` name the attribute that holds the layers."""
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"


@_patch(
    "5.19.0",
    "fault",
    reason="`Llama4TextConfig.router_aux_loss_coef` is 0.001 by default and never read; a config that holds it, and "
    "does not ask for router logits, never chose a load-balance loss",
    reference="transformers/models/llama4/configuration_llama4.py",
    test="tests/test_model_router.py::test_which_coefficient_counts",
)
def clear_unread_aux_loss(config: Any) -> None:
    """Set the coefficient of the load-balance loss to 0 where it is only the default that nothing reads."""
    if config.router_aux_loss_coef == 0.001 and not config.output_router_logits:
        config.router_aux_loss_coef = 0.0


@_patch(
    "5.19.0",
    "gap",
    reason="Whether the trainer divides a loss by the number of forwards of a step is decided inside `training_step`; "
    "a loss that is added to it must be divided in the same way",
    reference="transformers/trainer.py, `Trainer.training_step`",
    test="tests/test_routers_in_training.py::test_sft_adds_the_mean_of_its_forwards_losses_to_the_loss",
)
def sums_over_forwards(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether the losses of the forwards of a step are added up, rather than averaged by the trainer."""
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    by_count = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    return by_count or trainer.compute_loss_func is not None


record(
    "posttrain.train.engine_trainer.EngineTrainer",
    "transformers",
    "5.19.0",
    kind="fault",
    reason="With divided experts `save_model` writes this rank's experts as if they were all, and a checkpoint opens "
    "in the same layout only. `_prepare_for_training` and `_save_optimizer_and_scheduler` are overridden",
    reference="transformers/trainer.py, `Trainer._save_optimizer_and_scheduler`; deepspeedai/DeepSpeed#7938 (AutoEP)",
    test="tests/test_parallel_stages.py::test_a_stopped_sft_goes_on_in_another_layout",
)
record(
    "posttrain.train.engine_trainer.require_engine",
    "transformers",
    "5.19.0",
    kind="fault",
    reason="ACCELERATE_USE_CPU and ACCELERATE_USE_DEEPSPEED turn DeepSpeed off without a message; the class of what "
    "trains is checked before the first step",
    reference="accelerate/state.py, `AcceleratorState.__init__`",
    test="tests/test_compat.py::test_accelerate_still_turns_deepspeed_off_by_a_variable",
)
