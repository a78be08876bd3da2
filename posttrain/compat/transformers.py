"""transformers: Llama 4's prefix and unread default, and what its trainer does on engines.

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


record(
    "posttrain.tune.engine.EngineTrainer",
    "transformers",
    "5.19.0",
    kind="fault",
    reason="With divided experts `save_model` writes this rank's experts as if they were all, and a checkpoint opens "
    "in the same layout only. `_prepare_for_training` and `_save_optimizer_and_scheduler` are overridden",
    reference="transformers/trainer.py, `Trainer._save_optimizer_and_scheduler`; deepspeedai/DeepSpeed#7938 (AutoEP)",
    test="tests/test_parallel_stages.py::test_a_stopped_sft_goes_on_in_another_layout",
)
record(
    "posttrain.tune.engine.require_engine",
    "transformers",
    "5.19.0",
    kind="fault",
    reason="ACCELERATE_USE_CPU and ACCELERATE_USE_DEEPSPEED turn DeepSpeed off without a message; the class of what "
    "trains is checked before the first step",
    reference="accelerate/state.py, `AcceleratorState.__init__`",
    test="tests/test_compat.py::test_accelerate_still_turns_deepspeed_off_by_a_variable",
)
record(
    "posttrain.tune.steps.StepTrainer",
    "transformers",
    "5.19.0",
    kind="gap",
    reason="Where the rows of an epoch do not divide among the ranks, accelerate repeats some, and gives the "
    "trainer no way to weight them; the batch sampler that it wraps is replaced by one that adds blank rows. "
    "`_get_train_sampler` is overridden, and `loss_is_scaled_for_ga` is set, since losses are divided by counts of the "
    "step",
    reference="accelerate/data_loader.py, `BatchSamplerShard`; transformers/trainer.py, `Trainer.training_step`",
    test="tests/test_parallel_stages.py::test_the_last_step_of_an_epoch_repeats_no_row",
)
