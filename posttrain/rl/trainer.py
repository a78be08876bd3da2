"""The trainer: one optimizer step on a batch of rollouts, the new weights published for the engines.

Runs as a Ray actor of its own, at the same time as the engines. It waits for nothing: the controller hands it a whole
batch. Left out: value models, and an old policy's forward pass: the ratio is anchored on the
sampler's log-probabilities.
"""

import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from posttrain.config.shared import OptimizerConfig
from posttrain.model.load import load_model, load_policy, load_tokenizer, save_model
from posttrain.rl.config import RlConfig
from posttrain.rl.losses import LOSSES, LossInputs
from posttrain.rl.samples import MicroBatch, TrainSample, collate, micro_batches
from posttrain.sampling.weights import SharedWeights
from posttrain.train.logprobs import token_logprobs
from posttrain.train.master_adamw import MasterAdamW


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `steps`."""
    rate = optimizer.learning_rate * min(1.0, (step + 1) / (optimizer.warmup_steps + 1))
    progress = max(0.0, (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps))
    if optimizer.schedule == "linear":
        return rate * (1 - progress)
    if optimizer.schedule == "cosine":
        return rate * (1 + math.cos(math.pi * progress)) / 2
    return rate


class PolicyTrainer:
    """Holds the policy and its optimizer. `policy_version` is the number of optimizer steps applied."""

    def __init__(self, config: RlConfig, seed: int):
        self._config = config
        torch.manual_seed(seed)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        if self._device == "cpu":
            torch.set_num_threads(max(1, int(config.resources.trainer.cpus)))
        model: Any = load_policy(config.model)
        self._model = model.to(self._device)
        self._tokenizer = load_tokenizer(config.model.path)
        self._pad_id = 0  # any id: padding is to the right, where no reply token sees it
        self._optimizer = self._make_optimizer()
        self._weights = SharedWeights()
        self.policy_version = 0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        settings = self._config.optimizer
        optimizer = torch.optim.AdamW if self._config.model.dtype == "float32" else MasterAdamW
        return optimizer(
            self._model.parameters(),
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )

    def info(self) -> dict[str, Any]:
        """Process id and number of parameters."""
        return {"pid": os.getpid(), "num_parameters": sum(p.numel() for p in self._model.parameters())}

    def publish(self) -> dict[str, Any]:
        """Write the weights to shared memory; returns the manifest that an engine takes."""
        return self._weights.publish(self._model.state_dict().items(), self.policy_version).to_json()

    def logprobs(self, samples: Sequence[TrainSample]) -> list[list[float]]:
        """Log-probabilities of each sample's reply tokens under the current policy, in the order given."""
        result: list[list[float]] = []
        with torch.no_grad():
            for sample in samples:
                values, _ = self._forward(collate([sample], self._pad_id, self._device), entropy=False)
                result.append(values.tolist())
        return result

    def _forward(self, batch: MicroBatch, entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        hidden_BSH = self._model.model(input_ids=batch.input_ids_BS, use_cache=False).last_hidden_state
        hidden_TH = hidden_BSH.flatten(0, 1)[batch.position_T]
        head = self._model.get_output_embeddings().weight
        return token_logprobs(
            hidden_TH, head, batch.target_T, temperature=self._config.sampling.temperature, entropy=entropy
        )

    def step(self, samples: Sequence[TrainSample], step: int) -> dict[str, Any]:
        """One optimizer step. Returns metrics, the Unix times of start and end, and the manifest of the new weights.

        A loss or gradient that is not finite leaves the weights as they were and is counted in `skipped`.
        """
        began = time.time()
        config = self._config
        rate = learning_rate(config.optimizer, step, config.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._model.train()
        totals = self._accumulate(samples)
        norm = self._clip_gradients()
        finite = math.isfinite(totals["loss"]) and bool(torch.isfinite(norm))
        if finite:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.policy_version += 1
        trained = time.time()
        manifest = self.publish()
        metrics = {
            **totals,
            "grad_norm": float(norm) if torch.isfinite(norm) else -1.0,
            "learning_rate": rate,
            "skipped": int(not finite),
            "train_s": trained - began,
            "publish_s": time.time() - trained,
        }
        return {"metrics": metrics, "began": began, "ended": time.time(), "manifest": manifest}

    def _clip_gradients(self) -> torch.Tensor:
        """Scale gradients down to `optimizer.max_grad_norm`; returns the norm that they had."""
        return torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.optimizer.max_grad_norm)

    def _micro_batches(self, samples: Sequence[TrainSample]) -> list[list[TrainSample]]:
        return micro_batches(samples, self._config.micro_batch_tokens)

    def _accumulate(self, samples: Sequence[TrainSample]) -> dict[str, float]:
        """Forward and backward of every micro-batch; the one place that divides, by the count of the whole batch."""
        num_tokens = sum(len(sample.token_ids) for sample in samples)
        divisors = {"tokens": num_tokens, "sequences": len(samples)}
        loss_function = LOSSES[self._config.loss.name]
        sums: dict[str, float] = defaultdict(float)
        for chunk in self._micro_batches(samples):
            batch = collate(chunk, self._pad_id, self._device)
            policy_T, entropy_T = self._forward(batch, entropy=True)
            outputs = loss_function(
                LossInputs(policy_T, batch.sampler_logprobs_T, batch.advantages_T), self._config.loss
            )
            loss = outputs.loss_sum / divisors[outputs.denominator]
            loss.backward()
            with torch.no_grad():
                log_ratio_T = policy_T - batch.sampler_logprobs_T
                ratio_T = log_ratio_T.exp()
                sums["loss"] += float(loss)
                # k3 of the sampler from the policy: (r - 1) - log r, always >= 0.
                sums["mismatch_kl"] += float((ratio_T - 1 - log_ratio_T).sum()) / num_tokens
                sums["_weights"] += float(ratio_T.sum())
                sums["_weights_squared"] += float(ratio_T.square().sum())
                sums["entropy"] += float(entropy_T.sum()) / num_tokens if entropy_T is not None else 0.0
                for name, value in outputs.metrics.items():
                    sums[name] += float(value) / num_tokens
        squared = sums.pop("_weights_squared")
        sums["ess"] = sums.pop("_weights") ** 2 / (squared * num_tokens) if squared else 0.0
        sums["tokens_trained"] = num_tokens
        return dict(sums)

    def save(self, folder: str) -> None:
        """Write the policy as a model folder."""
        save_model(self._model, self._tokenizer, folder)

    def save_checkpoint(self, folder: str, controller: dict[str, Any]) -> None:
        """Write policy, optimizer and the controller's state; renamed into place when whole."""
        from safetensors.torch import save_file

        target = Path(folder)
        aside = target.with_name(f".{target.name}.writing")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_model(self._model, self._tokenizer, aside / "model")
        tensors, scalars = {}, {}
        for index, state in self._optimizer.state_dict()["state"].items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{index}.{name}"] = value.contiguous()
                else:
                    scalars[f"{index}.{name}"] = value
        save_file(tensors, aside / "optimizer.safetensors")
        state = {"policy_version": self.policy_version, "optimizer_scalars": scalars, "controller": controller}
        (aside / "state.json").write_text(json.dumps(state))
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)

    def load_checkpoint(self, folder: str) -> dict[str, Any]:
        """Continue from `save_checkpoint`; returns the controller's state."""
        from safetensors.torch import load_file

        path = Path(folder)
        state = json.loads((path / "state.json").read_text())
        model = load_model(path / "model", self._config.model.implementation, self._config.model.dtype)
        self._model.load_state_dict(model.state_dict())
        restored: dict[int, dict[str, Any]] = defaultdict(dict)
        for key, value in [*load_file(path / "optimizer.safetensors").items(), *state["optimizer_scalars"].items()]:
            index, _, name = key.partition(".")
            restored[int(index)][name] = value
        full = self._optimizer.state_dict()
        self._optimizer.load_state_dict({"state": dict(restored), "param_groups": full["param_groups"]})
        self.policy_version = state["policy_version"]
        return state["controller"]

    def close(self) -> None:
        """Remove the shared-memory segments."""
        self._weights.close()
