"""TRL's DPOTrainer with token ids instead of text as data, and with the losses of `posttrain.dpo.losses`.

TRL always tokenizes preference data itself. Here its tokenization is turned off, because prompts must have exactly the
token ids that sampling sends, and a truncated reply must not get an end-of-turn token.

TRL's loss is a mean over the pairs of a forward, and its supervised term a mean over the tokens of a forward. So the
split of a step into forwards and ranks would change what is learned. Here both are divided by the counts of the whole
step.

TRL runs a prompt once for each of its two replies. Here both are behind one copy of it, where the model allows that;
in a batch with pictures the text model reads the prompt twice, and each picture is encoded once.
"""

from collections.abc import Mapping
from typing import Any

import torch
from trl.trainer.dpo_trainer import DPOTrainer

from posttrain.compat.trl import reference_pass_with_whole_model, reference_written_on_each_host
from posttrain.dpo.losses import LOSSES, PairInputs, step_share
from posttrain.dpo.shared import run_shared
from posttrain.model.sharing import accept_trees
from posttrain.tune.engine import EngineTrainer
from posttrain.tune.pictures import PictureTrainer
from posttrain.tune.steps import StepTrainer

REFERENCE = "ref"  # TRL's name for the frozen copy of the adapters that a training starts from
NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")


class TokenizedPairTrainer(PictureTrainer, DPOTrainer):
    """Trains on a dataset of prompt_ids, chosen_ids and rejected_ids; with pictures, each once for both replies.

    A pair without replies is blank: nothing is learned from it. nll_weight: weight of the supervised term, the mean
    negative log-likelihood of chosen tokens. shares_prompts: whether the replies of a pair share one copy of its
    prompt. row_keys: as in `StepTrainer`; what a row's dropout is drawn from. leads_host: as in `EngineTrainer`.
    """

    row_keys: Any = None
    leads_host = False
    num_shown = 2

    def __init__(self, model: Any, *args: Any, nll_weight: float = 0.0, shared_prefixes: bool = True, **kwargs: Any):
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.shares_prompts = shared_prefixes and accept_trees(causal) is None
        super().__init__(model, *args, **kwargs)
        # TRL copies adapters from which the training starts, as "ref", for the reference's log-probabilities. These are
        # known now, and nobody shall train, save or merge the copy.
        policy: Any = self.model
        if REFERENCE in getattr(policy, "peft_config", ()):
            policy.delete_adapter(REFERENCE)
        self._nll_weight = nll_weight
        self._sums: dict[str, torch.Tensor] = {}  # sums over this rank's pairs and tokens since the last log

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        self.add_tiles()
        policy: Any = self.model
        was_training = policy.training
        policy.eval()  # the copy of the adapters has dropout, too
        try:
            with reference_pass_with_whole_model(self), reference_written_on_each_host(self, self.leads_host):
                return super()._precompute_ref_logps(*args, **kwargs)
        finally:
            policy.train(was_training)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        """The summed log-probabilities of the chosen and of the rejected replies under the reference, each [P]."""
        return super().compute_ref_log_probs(lambda **arguments: self._run(model, inputs, arguments), inputs)

    def _run(self, model: Any, inputs: Any, arguments: dict[str, Any]) -> Any:
        """The outputs of a forward, with `log_probs` and `entropy`. arguments: those of TRL, a row for each reply."""
        dropped = model.training and self.row_keys is not None
        if not self.shares_prompts or dropped or "pixel_values" in inputs or not inputs["completion_mask"].any():
            return model(**arguments)
        policy: Any = self.model  # with or without adapters
        return run_shared(model, policy.get_base_model() if hasattr(policy, "get_base_model") else policy, inputs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """The pairs and the chosen tokens of a whole optimizer step, over all its forwards and ranks, fp32 [2]."""
        counts = torch.zeros(2, device=device)
        for batch in batch_samples:
            chosen_tokens_P = batch["completion_mask"].chunk(2)[0].sum(dim=1)
            counts += torch.stack([(chosen_tokens_P > 0).sum(), chosen_tokens_P.sum()])
        return self.accelerator.reduce(counts, reduction="sum")  # type: ignore[return-value]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One forward's share of the step's loss. num_items_in_batch: the result of `_get_num_items_in_batch`."""
        pairs, entropy = self._pairs(model, inputs)
        losses_P = LOSSES[self.loss_types[0]](pairs, self.beta)
        with torch.no_grad():
            self._add_figures(pairs, entropy)
        share = step_share(losses_P, pairs.chosen_logprobs_P, self._nll_weight, counts=num_items_in_batch)
        return share * self.accelerator.num_processes  # gradients are averaged over the ranks

    def _pairs(self, model: Any, inputs: Any) -> tuple[PairInputs, torch.Tensor]:
        """The pairs of a forward without blank ones, and the entropy of its reply tokens, summed."""
        mask = inputs["completion_mask"]
        arguments = {name: value for name, value in inputs.items() if name not in NOT_OF_THE_MODEL}
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        arguments |= {"labels": labels, "use_cache": False, "fused_lm_head": True}
        outputs = self._run(model, inputs, arguments)
        chosen_P, rejected_P = outputs.log_probs.sum(dim=1).chunk(2)  # 0 where there is no label
        chosen_tokens_P, rejected_tokens_P = mask.sum(dim=1).chunk(2)
        references = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        columns = (chosen_P, rejected_P, *references, chosen_tokens_P, rejected_tokens_P)
        # Leave out blank pairs, whose length of 0 some losses would divide by.
        return PairInputs(*(column[chosen_tokens_P > 0] for column in columns)), outputs.entropy.sum()

    def held_out_sums(self, model: Any, inputs: Any) -> dict[str, torch.Tensor]:
        """The sums over one forward's pairs and chosen tokens from which `held_out_figures` makes means."""
        pairs, _ = self._pairs(model, inputs)
        margin_P = self.beta * pairs.margin_P
        return {
            "loss": LOSSES[self.loss_types[0]](pairs, self.beta).sum(),
            "nll": -pairs.chosen_logprobs_P.sum(),
            "margin": margin_P.sum(),
            "right": (margin_P > 0).sum(),
            "pairs": margin_P.new_tensor(len(margin_P)),
            "chosen_tokens": pairs.chosen_tokens_P.sum(),
        }

    def held_out_figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The figures of all held-out pairs: the loss that training lowers, mean margin, share ranked right."""
        pairs = sums["pairs"]
        return {
            "held_out_loss": sums["loss"] / pairs + self._nll_weight * sums["nll"] / sums["chosen_tokens"],
            "held_out_margin": sums["margin"] / pairs,
            "held_out_accuracy": sums["right"] / pairs,
        }

    def _add_figures(self, pairs: PairInputs, entropy: torch.Tensor) -> None:
        chosen_P, rejected_P = self.beta * pairs.chosen_scores_P, self.beta * pairs.rejected_scores_P
        found = {
            "pairs": chosen_P.new_tensor(len(chosen_P)),
            "reply_tokens": pairs.chosen_tokens_P.sum() + pairs.rejected_tokens_P.sum(),
            "entropy": entropy,
            "rewards/chosen": chosen_P.sum(),
            "rewards/rejected": rejected_P.sum(),
            "rewards/accuracies": (chosen_P > rejected_P).sum(),
            "rewards/margins": (chosen_P - rejected_P).sum(),
            "logps/chosen": pairs.chosen_logprobs_P.sum(),
            "logps/rejected": pairs.rejected_logprobs_P.sum(),
        }
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.double()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with means over the pairs (for entropy: over the reply tokens) of all ranks since the last log."""
        if self._sums:
            values = self.accelerator.reduce(torch.stack(list(self._sums.values())), reduction="sum")
            sums = dict(zip(self._sums, values.tolist(), strict=True))  # type: ignore[union-attr]
            self._sums = {}
            pairs, reply_tokens = sums.pop("pairs"), sums.pop("reply_tokens")
            logs["entropy"] = sums.pop("entropy") / reply_tokens
            logs |= {name: value / pairs for name, value in sums.items()}
        super().log(logs, start_time)


class PairTrainer(EngineTrainer, StepTrainer, TokenizedPairTrainer):
    """`TokenizedPairTrainer` on a DeepSpeed engine. The last row of its dataset is the blank one."""
