"""transformers: two faults of Llama 4's classes, and the trainer's use of DeepSpeed engines.

Importing this module does not import transformers.
"""

from functools import partial
from typing import Any

from posttrain.compat.patches import patch, record

_patch = partial(patch, "transformers")


@_patch(
    "5.19.0",
    "fault",
    reason="`Llama4ForCausalLM.base_model_prefix` names an attribute that the class does not have. TRL runs the layers "
    "and the head separately, and finds the layers by this prefix",
    reference="transformers/models/llama4/modeling_llama4.py, `Llama4ForCausalLM`",
    test="tests/test_compat.py::test_transformers_still_gives_llama4_a_prefix_that_it_does_not_have",
)
def name_base_model(model: Any) -> None:
    """Set `base_model_prefix` to the name of the attribute that holds the layers."""
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"


@_patch(
    "5.19.0",
    "fault",
    reason="`Llama4TextConfig.router_aux_loss_coef` is 0.001 by default and never read. If a config holds this value "
    "and does not ask for router logits, nobody chose a load-balance loss",
    reference="transformers/models/llama4/configuration_llama4.py",
    test="tests/test_model_router.py::test_which_coefficient_counts",
)
def clear_unread_aux_loss(config: Any) -> None:
    """Set the coefficient of the load-balance loss to 0 if it is only the default that transformers never reads."""
    if config.router_aux_loss_coef == 0.001 and not config.output_router_logits:
        config.router_aux_loss_coef = 0.0


record(
    "posttrain.tune.engine.EngineTrainer",
    "transformers",
    "5.19.0",
    kind="fault",
    reason="With divided experts, `save_model` writes the experts of one rank as if they were all, and a checkpoint "
    "can be loaded in the same layout only. `_prepare_for_training` and `_save_optimizer_and_scheduler` are overridden",
    reference="transformers/trainer.py, `Trainer._save_optimizer_and_scheduler`; deepspeedai/DeepSpeed#7938 (AutoEP)",
    test="tests/test_parallel_stages.py::test_a_stopped_sft_goes_on_in_another_layout",
)
record(
    "posttrain.tune.engine.EngineTrainer",
    "transformers",
    "5.19.0",
    kind="gap",
    reason="Each rank writes the state of its random generators into a checkpoint itself, which needs a file system "
    "that all ranks see. `_save_rng_state` is overridden, so that rank 0 writes all of them",
    reference="transformers/trainer.py, `Trainer._save_rng_state`",
    test="tests/test_parallel_stages.py::test_sft_on_two_ranks_is_the_training_of_one",
)
record(
    "posttrain.tune.steps.StepTrainer",
    "transformers",
    "5.19.0",
    kind="gap",
    reason="A training that ended early and was stopped before its export would train one more step when it is "
    "resumed, because `should_training_stop` is looked at after a step only. So `_run_epoch` is overridden",
    reference="transformers/trainer.py, `Trainer._inner_training_loop`",
    test="tests/test_sft.py::test_a_stage_ends_early_with_the_best_model_also_when_it_was_stopped",
)
record(
    "posttrain.tune.engine.require_engine",
    "transformers",
    "5.19.0",
    kind="fault",
    reason="The variables ACCELERATE_USE_CPU and ACCELERATE_USE_DEEPSPEED turn DeepSpeed off without a message. So "
    "before the first step it is checked that an engine trains the model",
    reference="accelerate/state.py, `AcceleratorState.__init__`",
    test="tests/test_compat.py::test_accelerate_still_turns_deepspeed_off_by_a_variable",
)
record(
    "posttrain.tune.steps.StepTrainer",
    "transformers",
    "5.19.0",
    kind="gap",
    reason="If the rows of an epoch cannot be divided evenly among the ranks, accelerate repeats some rows, and the "
    "trainer cannot weight them. The batch sampler that accelerate wraps is replaced by one that adds blank rows. "
    "`_get_train_sampler` is overridden. `loss_is_scaled_for_ga` is set, as losses are divided by counts of the step",
    reference="accelerate/data_loader.py, `BatchSamplerShard`; transformers/trainer.py, `Trainer.training_step`",
    test="tests/test_parallel_stages.py::test_the_last_step_of_an_epoch_repeats_no_row",
)
