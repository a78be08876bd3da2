"""The trainer: do one optimizer step on a batch of rollouts, and publish the new weights for the engines.

It is one rank of one or several, always with a DeepSpeed engine, and runs at the same time as the rollout engines. It
does not wait for them: the controller gives it a whole batch. Every rank gets all rollouts of a step and takes its
share of the micro-batches. Publishing, saving and checkpoints are collective, and rank 0 writes.

Left out: value models; a forward pass of an old policy, because ratios are to the sampler's log-probabilities; the
reference policy, which has a process of its own and whose log-probabilities come with the samples.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from posttrain.config.training import OptimizerConfig
from posttrain.hosts.folders import FolderOffer
from posttrain.model.adapter import base_folder
from posttrain.model.adapter_start import continues, started_lora
from posttrain.model.router_balance import RouterBalance, native_layers
from posttrain.model.tokenizer import load_tokenizer
from posttrain.parallel.adapters import export_adapter
from posttrain.parallel.engine import engine_report, start_engine
from posttrain.parallel.export import export_model, folder_of_first_rank
from posttrain.parallel.state import load_state, save_state
from posttrain.parallel.tensors import sent_tensors
from posttrain.rl.losses import ratio_of
from posttrain.rl.objective import reference_kl
from posttrain.rl.rollouts.weights import publisher
from posttrain.rl.training.adapters import AdapterProbe, StartAdapters, adapters_off
from posttrain.rl.training.config import TrainingConfig
from posttrain.rl.training.forward import dealt, forward_share
from posttrain.rl.training.policy import load_token_policy, sample_logprobs
from posttrain.rl.training.protocol import SkippedUpdate, StepResult
from posttrain.rl.training.publishing import publish
from posttrain.rl.training.samples import TrainSample, token_advantage_std
from posttrain.sampling.manifests import Manifest
from posttrain.train.routers import figures


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of `steps`."""
    rate = optimizer.learning_rate * min(1.0, (step + 1) / (optimizer.warmup_steps + 1))
    progress = max(0.0, (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps))
    if optimizer.schedule == "linear":
        return rate * (1 - progress)
    if optimizer.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * progress)) / 2
    return rate


class PolicyTrainer:
    """The `Trainer` of a policy. It holds this rank's part of the policy and its optimizer.

    Make it after `join_ranks`. policy_version: how many optimizer steps the policy has had. Every rank must call the
    same method with the same arguments.
    """

    def __init__(self, config: TrainingConfig, seed: int, store: Path | None = None):
        """store: the file of the prompts' pictures; None for a policy that is shown none."""
        self._config = config
        torch.manual_seed(seed)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cpu":
            torch.set_num_threads(max(1, int(config.resources.trainer.cpus)))
        lora = started_lora(config.model, config.lora, config.images)
        policy = load_token_policy(
            config.model,
            config.sampling.temperature,
            config.gradient_checkpointing,
            shared_prefixes=config.shared_prefixes,
            lora=lora,
            images=config.images,
            store=store,
        )
        module = policy.to(self._device)
        self._policy = module.policy
        rates = {} if config.images is None else config.images.learning_rates
        self._engine = start_engine(
            module, config.parallel, config.optimizer, dtype=config.model.dtype, learning_rates=rates
        )
        # Of each group relative to the optimizer's rate.
        self._rates = [group["lr"] / config.optimizer.learning_rate for group in self._engine.optimizer.param_groups]
        if config.parallel.zero == 3:
            module.share_head()
        self._probe = AdapterProbe(self._policy) if lora is not None else None
        self._start = StartAdapters(self._policy) if continues(config.model) else None
        has_routers = native_layers(self._policy) is not None
        self._routers = RouterBalance(self._policy, config.model.router.bias_rate) if has_routers else None
        self._tokenizer = load_tokenizer(config.model.path, config.model.chat_template)
        self._base = self._base_named = base_folder(config.model.path)
        self._weights = publisher(config)
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self.policy_version = 0
        self._skipped_in_a_row = 0

    def report(self) -> dict[str, Any]:
        """See `Trainer.report`."""
        return engine_report(self._engine, self._config.parallel)

    def set_threads(self, threads: int) -> None:
        """See `Trainer.set_threads`."""
        torch.set_num_threads(threads)

    def publish(self) -> Manifest | None:
        """See `Trainer.publish`."""
        return publish(self._weights, sent_tensors(self._engine.module), self.policy_version)

    def probe(self, size: float) -> Manifest | None:
        """See `Trainer.probe`."""
        assert self._probe is not None  # only a training with `lora` is probed
        if size:
            self._probe.set(size)
        else:
            self._probe.restore()
        return self.publish()

    def logprobs(self, samples: Sequence[TrainSample], adapters: bool = True) -> list[list[float]]:
        """See `Trainer.logprobs`."""
        self._engine.eval()
        with nullcontext() if adapters else self._at_the_start():
            return sample_logprobs(self._engine, samples, self._config.micro_batch_tokens, device=self._device)

    def _at_the_start(self) -> AbstractContextManager[None]:
        """A context in which the policy is the one from which the training started."""
        return adapters_off(self._policy) if self._start is None else self._start.in_place()

    def step(self, samples: Sequence[TrainSample], step: int) -> StepResult:
        """See `Trainer.step`.

        If the loss or the gradient is not finite, the weights are not changed, the metric `skipped` is 1, and
        `nonfinite` describes the update. Metrics that are not finite are left out.
        """
        began, cpu_began = time.time(), time.process_time()
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        for group, relative in zip(self._engine.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * relative
        self._engine.train()
        totals, suspects = self._accumulate(samples)
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        applied = self._engine.was_step_applied() and math.isfinite(norm)
        self._skipped_in_a_row = 0 if applied else self._skipped_in_a_row + 1
        nonfinite = None if applied else SkippedUpdate(
            step, self.policy_version, rate, str(totals["loss"]), str(norm), suspects, self._skipped_in_a_row
        )  # fmt: skip
        self.policy_version += 1
        routers = self._routers and self._routers.update(min(1.0, self.policy_version / self._config.steps))
        trained, trained_cpu = time.time(), time.process_time()
        manifest = self.publish()
        metrics = {
            **{name: value for name, value in totals.items() if math.isfinite(value)},
            **(figures(routers) if routers else {}),
            "grad_norm": norm if applied else -1.0,
            "learning_rate": rate,
            "skipped": int(not applied),
            "train_s": trained - began,
            "train_cpu_s": trained_cpu - cpu_began,
            "train_threads": torch.get_num_threads(),
            "publish_s": time.time() - trained,
        }
        return StepResult(metrics, manifest, began, time.time(), nonfinite)

    def _accumulate(self, samples: Sequence[TrainSample]) -> tuple[dict[str, float], list[int]]:
        """Forward and backward of this rank's micro-batches. Each loss is divided by the count of the whole batch.

        Returns the metrics of all ranks, and which samples are in micro-batches whose loss is not finite.
        """
        num_tokens = sum(sample.num_trained for sample in samples)
        config, max_tokens = self._config.loss, self._config.sampling.max_tokens
        sums: dict[str, float] = defaultdict(float)
        largest = {"ratio_max": 0.0, "sampler_trainer_gap_max": 0.0}
        place = {id(sample): index for index, sample in enumerate(samples)}
        suspects_N = torch.zeros(len(samples), device=self._device)
        chunks = dealt(
            samples,
            self._config.micro_batch_tokens,
            shared=self._engine.shares_prefixes,
            tiles=self._engine.tiles,
            rank=self._rank,
            world=self._world,
        )
        for index, (chunk, weight) in enumerate(chunks):
            share = forward_share(
                self._engine, chunk, samples, config=config, max_tokens=max_tokens, device=self._device
            )
            inputs, outputs, entropy_T = share.inputs, share.outputs, share.entropy_T
            loss = weight * share.loss
            if not torch.isfinite(loss):
                loss = loss * math.nan  # makes every gradient NaN, so that the engine skips the step
                suspects_N[[place[id(sample)] for sample in chunk]] = 1
            self._engine.set_gradient_accumulation_boundary(index == len(chunks) - 1)
            self._engine.backward(loss * self._world)  # the engine takes the mean over ranks
            with torch.no_grad():
                log_ratio_T = inputs.policy_logprobs_T - inputs.sampler_logprobs_T
                ratio_T = ratio_of(log_ratio_T)
                sums["loss"] += float(loss)
                # k3 of the sampler from the policy: (r - 1) - log r, always >= 0.
                sums["mismatch_kl"] += weight * float((ratio_T - 1 - log_ratio_T).sum()) / num_tokens
                sums["_weights"] += weight * float(ratio_T.sum())
                sums["_weights_squared"] += weight * float(ratio_T.square().sum())
                largest["ratio_max"] = max(largest["ratio_max"], float(ratio_T.max()))
                gap = float(log_ratio_T.abs().max())
                largest["sampler_trainer_gap_max"] = max(largest["sampler_trainer_gap_max"], gap)
                if config.reference is not None:
                    kl = float(reference_kl(inputs, config.reference, "k3").sum())
                    sums["reference_kl"] += weight * kl / num_tokens
                sums["entropy"] += weight * float(entropy_T.sum()) / num_tokens
                for name, value in outputs.metrics.items():
                    sums[name] += weight * float(value) / num_tokens
        sums = _over_ranks(sums, self._device) | _over_ranks(largest, self._device, dist.ReduceOp.MAX)
        dist.all_reduce(suspects_N)
        squared = sums.pop("_weights_squared")
        sums["ess"] = sums.pop("_weights") ** 2 / (squared * num_tokens) if squared else 0.0
        sums["tokens_trained"] = num_tokens
        sums["advantage_std"] = token_advantage_std(samples)
        return sums, suspects_N.nonzero().flatten().tolist()

    def save(self, folder: str) -> FolderOffer | None:
        """Write the policy as a model folder."""
        architecture = type(self._policy).__name__.removeprefix("Native")
        policy = self._engine.module.policy
        processor = None if self._config.images is None else base_folder(self._config.model.path)
        export_model(
            policy, self._policy.config, architecture, tokenizer=self._tokenizer, path=folder, processor=processor
        )

    def save_adapter(self, folder: str) -> FolderOffer | None:
        """Write the policy's adapters, on the base on which they were trained."""
        export_adapter(self._policy, self._base, tokenizer=self._tokenizer, path=folder, named=self._base_named)

    def save_checkpoint(self, folder: str, controller: dict[str, Any]) -> FolderOffer | None:
        """See `Trainer.save_checkpoint`."""
        with folder_of_first_rank(folder) as aside:
            save_state(self._engine, aside)
            if self._rank == 0:
                state = {
                    "policy_version": self.policy_version,
                    "skipped_in_a_row": self._skipped_in_a_row,
                    "routers": self._routers and self._routers.state(),
                    "controller": controller,
                }
                (aside / "trainer.json").write_text(json.dumps(state))

    def load_checkpoint(self, folder: str) -> dict[str, Any]:
        """Continue from `save_checkpoint` of any layout; returns the controller's state."""
        load_state(self._engine, folder)
        state = json.loads((Path(folder) / "trainer.json").read_text())
        self.policy_version = state["policy_version"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        if self._routers:
            self._routers.load_state(state["routers"])
        return state["controller"]

    def close(self) -> None:
        """Remove the shared-memory segments."""
        self._weights.close()


def _over_ranks(found: dict[str, float], device: str, operation: Any = dist.ReduceOp.SUM) -> dict[str, float]:
    """Reduce each entry over the ranks, by default to a sum. All ranks must have the same names."""
    names = sorted(found)
    values = torch.tensor([found[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(values, operation)
    return dict(zip(names, values.tolist(), strict=True))
