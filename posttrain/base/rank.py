"""The processes of base training: `python -m posttrain.base.rank SPEC.json`.

The first process imports all modules and then forks the others, which saves each of them five seconds of importing. If
one dies, the others fail in the next exchange. If the process that started them dies, all of them end.

    every step, on each process:
      own documents -> forward, backward -> sum of gradients over processes -> Muon (own matrices, exchanged) + AdamW

Rank 0 writes one JSON line for each step to stdout, a checkpoint now and then, and the model at the end. A training
that was cut goes on from the checkpoint. It runs on the CPU, in fp32, with one thread for each process.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
import torch.nn.functional as F

from posttrain.actors.parent import die_with_parent
from posttrain.base.checkpoint import Checkpoints, is_due
from posttrain.base.config import StageConfig
from posttrain.base.corpus import Document
from posttrain.base.courses import COURSES
from posttrain.base.muon import Muon
from posttrain.base.pictures.model import tiles_of
from posttrain.base.sets import draw_sets
from posttrain.data.tokenizer import Tokenizer
from posttrain.parallel.ending import end_rank

# In the names of matrices that AdamW trains. No norm follows the vision adapter and the projector, so by Muon's large
# updates their features would soon be a hundred times as large as embeddings of tokens, and drown what the layers add.
_UNNORMED = ("vision_adapter", "multi_modal_projector")
_FOR_ADAM = ("embed_tokens", "lm_head", "router", "positional_embedding", *_UNNORMED)
_UNNORMED_RATE = 0.25  # of the learning rate of AdamW


def main(spec_path: str) -> None:
    """Train as a spec says.

    Its keys: "config", "seed", "out" (the model folder to write), "checkpoints" and "training" (see `Checkpoints`),
    "parent" (process id of the process that starts this one).
    """
    spec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    die_with_parent(spec["parent"])
    metrics = _own_stdout()
    config = StageConfig.model_validate(spec["config"])
    torch.set_num_threads(1)
    rank = _fork(config.processes)
    if config.processes > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = f"file://{Path(spec_path).with_suffix('.store')}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=config.processes)
    checkpoints = Checkpoints(Path(spec["checkpoints"]), spec["training"])
    model, tokenizer = _train(config, spec["seed"], rank, checkpoints=checkpoints, metrics=metrics)
    if rank == 0:
        out = Path(spec["out"])
        # The coefficient is for this stage alone; later stages choose their own.
        model.config.get_text_config().router_aux_loss_coef = 0.0
        model.save_pretrained(out)
        COURSES[config.puzzles].save(tokenizer, out)
    end_rank(forked=config.processes - 1 if rank == 0 else 0)


def _fork(processes: int) -> int:
    """Fork the other processes. Returns in every process, with its rank."""
    import posttrain.model.vision.fusion  # noqa: F401  (imported once, before the fork, because it is slow)

    first = os.getpid()
    for rank in range(1, processes):
        if os.fork() == 0:
            die_with_parent(first)
            return rank
    return 0


def _own_stdout() -> TextIO:
    """Reserve stdout for metrics: output that libraries print goes to stderr."""
    metrics = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return metrics


def _train(config: StageConfig, seed: int, rank: int, *, checkpoints: Checkpoints, metrics: TextIO) -> tuple[Any, Any]:
    course = COURSES[config.puzzles]
    tokenizer = course.build_tokenizer()
    model = course.build_model(config.model, tokenizer, config.balance_coefficient, seed=seed)
    model.train()
    matrices, others = _split_parameters(model)
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    done = checkpoints.load(model, muon, adam)
    batches = islice(_batches(config, seed, rank, tokenizer=tokenizer), done, None)
    for step in range(done, config.steps):
        started = time.perf_counter()
        values = _backward(model, next(batches), tokenizer.pad_token_id, config=config)
        scale = _update(model, muon, adam, config=config, step=step)
        if rank == 0:
            line = {"step": step + 1, **values, "lr_scale": scale, "step_s": time.perf_counter() - started}
            print(json.dumps(line), file=metrics, flush=True)
        if is_due(step + 1, config.steps):
            checkpoints.save(step + 1, model, muon=muon, adam=adam)
    return model, tokenizer


def _update(model: Any, muon: Muon, adam: torch.optim.Optimizer, *, config: StageConfig, step: int) -> float:
    """Update the weights by the gradients of a step, and clear the gradients. Returns the factor on the peak rates."""
    scale = learning_rate_scale(config, step)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    muon.step(config.muon_learning_rate * scale)
    for group in adam.param_groups:
        group["lr"] = config.adam_learning_rate * scale * group["rate"]
    adam.step()
    model.zero_grad()
    return scale


def learning_rate_scale(config: StageConfig, step: int) -> float:
    """The factor on the peak learning rates at a step, counted from 0: linear warm-up, constant, linear decay."""
    left = 1 - step / config.steps
    up = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    down = min(1.0, max(0.02, left / config.decay_share)) if config.decay_share else 1.0
    return up * down


def _split_parameters(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[dict[str, Any]]]:
    """Matrices inside the layers, for Muon; and groups for AdamW with their rates: the embeddings of tokens and places,
    the head, routers and norms; what no norm follows.
    """
    matrices, others, unnormed = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not any(part in name for part in _FOR_ADAM):
            matrices.append(parameter)
        else:
            (unnormed if any(part in name for part in _UNNORMED) else others).append(parameter)
    groups = [{"params": others, "rate": 1.0}, {"params": unnormed, "rate": _UNNORMED_RATE}]
    return matrices, [group for group in groups if group["params"]]


def _batches(config: StageConfig, seed: int, rank: int, *, tokenizer: Tokenizer) -> Iterator[list[Document]]:
    """An endless sequence of batches for this process. The share of worked replies depends on the steps done."""
    course = COURSES[config.puzzles]
    taken_keys = draw_sets(seed, config.sets, course.puzzles).keys()
    corpus = course.text(tokenizer, config.text, taken_keys, seed=f"corpus {seed} {rank}")
    taken = 0
    while True:
        late = taken >= config.text.switch_at * config.steps
        for batch in corpus.batches(config.batch_tokens // config.processes, late):
            yield batch
            taken += 1


def _backward(model: Any, batch: list[Document], pad_id: int, *, config: StageConfig) -> dict[str, float]:
    """Accumulate gradients of the mean loss over the reply tokens of all processes; return the step's metrics."""
    ids_BS, reply_BS = _pad(batch, pad_id)
    pictures = [picture for document in batch for picture in document.pictures]
    shown = {"pixel_values": tiles_of(pictures)} if pictures else {}
    body = getattr(model, model.base_model_prefix)
    outputs = body(ids_BS[:, :-1], attention_mask=ids_BS[:, :-1] != pad_id, **shown)
    logits_TV = model.get_output_embeddings()(outputs.last_hidden_state[reply_BS[:, 1:]])
    loss_sum = F.cross_entropy(logits_TV, ids_BS[:, 1:][reply_BS[:, 1:]], reduction="sum")
    count = logits_TV.shape[0]
    total = loss_sum
    if outputs.aux_loss is not None:  # it is None without a layer of experts, or with a coefficient of 0
        total = total + config.balance_coefficient * outputs.aux_loss * count
    total.backward()
    totals = _sum_over_processes(model, torch.tensor([loss_sum.item(), count, ids_BS.numel()]))
    loss, tokens, seen = totals[0] / totals[1], totals[1], totals[2]
    for parameter in model.parameters():
        parameter.grad.div_(tokens)
    return {"loss": float(loss), "reply_tokens": int(tokens), "tokens": int(seen)}


def _pad(batch: list[Document], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, int64 [B, S], padded on the right, and a mask of the replies, bool [B, S]."""
    longest = max(len(document.ids) for document in batch)
    ids_BS = torch.full((len(batch), longest), pad_id)
    reply_BS = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, document in enumerate(batch):
        ids_BS[row, : len(document.ids)] = torch.tensor(document.ids)
        for start, end in document.replies:
            reply_BS[row, start:end] = True
    return ids_BS, reply_BS


def _sum_over_processes(model: Any, extra: torch.Tensor) -> torch.Tensor:
    """Sum all gradients, and `extra` (fp32 [N]), over the processes in one exchange. Returns the sum of `extra`."""
    if not dist.is_initialized():
        return extra
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [extra])
    dist.all_reduce(flat)
    *parts, total = flat.split([gradient.numel() for gradient in gradients] + [extra.numel()])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return total


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException:
        # Python's own end may print what native libraries still hold, and the stage shows the last lines of the log.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
