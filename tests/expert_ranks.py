"""One rank of the expert-parallel tests, and the same training in one plain process to compare with.

    python tests/expert_ranks.py RANK WORLD PORT FOLDER

FOLDER holds model/ and cases.json, a list of what to run in turn; rank 0 writes NAME.safetensors and NAME.json there.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

ROWS, LENGTH, STEPS = 4, 33, 10
RATE = {"sgd": 0.02, "adamw": 1e-3}
CLIP = 1.0


def data(vocabulary: int) -> torch.Tensor:
    """Token ids [STEPS, ROWS, LENGTH]."""
    return torch.randint(3, vocabulary, (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(3))


def load(folder: Path, dtype: str) -> Any:
    from posttrain.model.load import load_model

    if dtype == "float64":  # the native model's grouped products have none
        return load_model(folder / "model", "transformers").double().train()
    return load_model(folder / "model", "native", dtype).train()


def row_loss(model: Any, row: torch.Tensor) -> torch.Tensor:
    """Mean over a row's tokens, so the mean over all rows is one loss whoever computes them."""
    return model(input_ids=row[None], labels=row[None], use_cache=False).loss


class MasterAdamW:
    """torch's AdamW on fp32 copies of the parameters, which are rounded into them after each step."""

    def __init__(self, parameters: Any, **options: Any):
        self._parameters = list(parameters)
        self._masters = [parameter.detach().float().clone() for parameter in self._parameters]
        self._adamw = torch.optim.AdamW(self._masters, **options)

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
        self._adamw.step()
        for parameter, master in zip(self._parameters, self._masters, strict=True):
            parameter.copy_(master)

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def one_process(folder: Path, optimizer: str, dtype: str = "float32", rows_at_once: int = 1) -> dict[str, Any]:
    """losses, first_gradients and weights of the plain training."""
    model = load(folder, dtype)
    if optimizer == "sgd":
        stepper: Any = torch.optim.SGD(model.parameters(), lr=RATE["sgd"], momentum=0.9)
    else:
        kind = MasterAdamW if dtype == "bfloat16" else torch.optim.AdamW
        stepper = kind(model.parameters(), lr=RATE["adamw"], betas=(0.9, 0.95), weight_decay=0.01)
    losses, first = [], {}
    for step, rows in enumerate(data(model.config.vocab_size)):
        total = 0.0
        for chunk in rows.split(rows_at_once):
            loss = model(input_ids=chunk, labels=chunk, use_cache=False).loss * len(chunk) / ROWS
            loss.backward()
            total += float(loss.detach())
        if step == 0:
            first = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        stepper.step()
        stepper.zero_grad()
        losses.append(total)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    return {"losses": losses, "first_gradients": first, "weights": weights}


def build(folder: Path, case: dict[str, Any]) -> Any:
    from posttrain.config.training import OptimizerConfig, ParallelConfig
    from posttrain.parallel.engine import build_engine, deepspeed_config

    parallel = ParallelConfig(processes=case["processes"], expert=case["expert"], zero=case["zero"])
    optimizer = OptimizerConfig(learning_rate=RATE["adamw"], weight_decay=0.01, max_grad_norm=CLIP)
    dtype = case.get("dtype", "float32")
    config = deepspeed_config(parallel, optimizer, dtype)
    if case["optimizer"] == "sgd":
        config["optimizer"] = {"type": "SGD", "params": {"lr": RATE["sgd"], "momentum": 0.9}}
    return build_engine(load(folder, dtype), config)


def train(engine: Any, rank: int, world: int, steps: range, on_first: Any = None) -> list[float]:
    losses = []
    every = data(engine.module.config.vocab_size)
    for step in steps:
        rows = every[step].chunk(world)[rank]
        total = torch.zeros(())
        for index, row in enumerate(rows):
            engine.set_gradient_accumulation_boundary(index == len(rows) - 1)
            loss = row_loss(engine, row)
            engine.backward(loss * world / ROWS)
            total += loss.detach() / ROWS
        if step == 0 and on_first is not None:
            on_first(engine)
        engine.step()
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    return losses


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    """Whole gradients by name, before they are clipped."""
    from deepspeed.utils import safe_get_full_grad

    from posttrain.parallel.tensors import trained_tensors

    return {item.name: item.join(lambda p: safe_get_full_grad(p).view(getattr(p, "ds_shape", p.shape))).float().clone()
            for item in trained_tensors(engine.module)}  # fmt: skip


def weights(engine: Any) -> dict[str, torch.Tensor]:
    from posttrain.parallel.tensors import read_weights, whole_tensors

    return {item.name: value.clone() for item, value in read_weights(whole_tensors(engine.module))}


def run(case: dict[str, Any], rank: int, world: int, folder: Path) -> dict[str, Any]:
    from posttrain.parallel import state

    engine = build(folder, case)
    kept: dict[str, Any] = {}
    begin = case.get("begin", 0)
    if begin:
        state.load_state(engine, folder / case["resume"])
        kept["loaded"] = weights(engine)
    steps = range(begin, case.get("end", STEPS))
    losses = train(engine, rank, world, steps, lambda engine: kept.update(first=gradients(engine)))
    if "save" in case:
        (folder / case["save"]).mkdir(exist_ok=True)
        state.save_state(engine, folder / case["save"])
    kept["weights"] = weights(engine)
    if "export" in case:
        from transformers import AutoTokenizer

        from posttrain.parallel.export import export_model

        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        export_model(
            engine.module,
            engine.module.config,
            "Llama4ForCausalLM",
            tokenizer=tokenizer,
            path=folder / case["export"],
            shard_bytes=case.get("shard_bytes", 1 << 30),
        )
    kinds = sorted({type(module).__name__ for module in engine.module.modules() if "MoE" in type(module).__name__})
    engine.destroy()
    return {"losses": losses, "kinds": kinds, **kept}


def main() -> None:
    rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    from safetensors.torch import save_file

    from posttrain.actors.garbage import large_imports
    from posttrain.parallel.ending import end_rank
    from posttrain.parallel.engine import join_ranks

    torch.set_num_threads(1)
    with large_imports():
        join_ranks(rank, world, ("127.0.0.1", port))
        import posttrain.model.load
        import posttrain.parallel.state  # noqa: F401
    for case in json.loads((folder / "cases.json").read_text()):
        if case["processes"] != world:
            continue
        result = run(case, rank, world, folder)
        if rank == 0:
            tensors = {f"{part}/{name}": value.contiguous() for part, values in result.items()
                       if isinstance(values, dict) for name, value in values.items()}  # fmt: skip
            save_file(tensors, folder / f"{case['name']}.safetensors")
            plain = {part: values for part, values in result.items() if not isinstance(values, dict)}
            (folder / f"{case['name']}.json").write_text(json.dumps(plain))
    end_rank()


if __name__ == "__main__":
    main()
