"""Small programs that try one piece of the machine each; `posttrain doctor` runs every one in a process of its own.

    python -m posttrain.cli.doctor_probes torch | imports | images | vllm | deepspeed | ray | sandbox

A probe that works ends with one line of JSON, {"found": "...", ...}, and exit code 0. A probe that fails raises. They
really run the libraries, at the smallest size: vLLM loads a model and samples from it, two DeepSpeed ranks take a step,
Ray runs a task. The caller (doctor.py) sets the deadline and cleans up.
"""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from posttrain.actors.parent import die_with_parent

VOCABULARY = 64
KV_CACHE_BYTES = 96 << 20

Found = dict[str, Any]


def probe_torch() -> Found:
    """Which build of torch this is, and the accelerators that it sees."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [
        f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
        for i in range(count)
    ]
    return {"found": ", ".join(gpus) or "none", "gpus": gpus, "cuda": torch.version.cuda}


def probe_imports() -> Found:
    """Do the two imports that fail if torchvision was built for another version of torch."""
    import transformers
    from vllm import LLM

    return {"found": f"transformers.{transformers.Llama4ForCausalLM.__name__} and vllm.{LLM.__name__}"}


def probe_images() -> Found:
    """The image processor of Llama 4 makes tiles of a picture."""
    from PIL import Image
    from transformers import Llama4ImageProcessor

    processor = Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
    tiles = processor(Image.new("RGB", (90, 40)), return_tensors="pt")["pixel_values"]
    return {"found": f"Llama 4's processor makes {len(tiles)} tiles of {tiles.shape[-1]} pixels of a picture"}


def write_tiny_model(folder: Path) -> None:
    """A dense Llama of two layers with random weights and a word-level tokenizer, as a Hugging Face folder."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def probe_vllm() -> Found:
    """vLLM loads a tiny model and samples one token with its log-probability."""
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory(prefix="posttrain-doctor-") as folder:
        write_tiny_model(Path(folder))
        engine = LLM(
            model=folder,
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=2,
            kv_cache_memory_bytes=KV_CACHE_BYTES,
        )
        settings = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, ignore_eos=True)
        output = engine.generate(["w5 w6 w7"], settings, use_tqdm=False)[0].outputs[0]
    if len(output.token_ids) != 1 or not output.logprobs:
        raise RuntimeError(f"asked for one token with its log-probability, got {output}")
    return {"found": f"loaded a tiny model and sampled {output.text.strip()!r}"}


def deepspeed_rank(rank: int, world: int, folder: Path) -> None:
    """One rank of `probe_deepspeed`: a ZeRO-1 step on a linear layer, gradients averaged over gloo."""
    import deepspeed
    import torch
    import torch.distributed as dist

    from posttrain.compat.deepspeed import import_muon_uncompiled, skip_shared_memory_all_reduce
    from posttrain.parallel.ending import end_rank

    skip_shared_memory_all_reduce()
    import_muon_uncompiled()

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")  # DeepSpeed reads it; the store below is a file, so no port is opened
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,
    }
    layer = torch.nn.Linear(4, 1, bias=False)
    engine: Any = deepspeed.initialize(model=layer, config=settings)[0]
    before = layer.weight.detach().clone()
    loss = engine(torch.full((1, 4), float(rank + 1))).sum()
    engine.backward(loss)
    engine.step()
    after = layer.weight.detach().clone()
    others = [torch.empty_like(after) for _ in range(world)]
    dist.all_gather(others, after)
    if torch.equal(before, after) or not all(torch.equal(after, other) for other in others):
        raise RuntimeError("the weights did not change, or differ between the ranks")
    end_rank()


def probe_deepspeed() -> Found:
    """Two ranks of DeepSpeed take one ZeRO-1 step over gloo and end with the same weights."""
    world = 2
    with tempfile.TemporaryDirectory(prefix="posttrain-doctor-") as folder:
        command = [sys.executable, "-P", "-m", "posttrain.cli.doctor_probes", "deepspeed-rank"]
        logs = [Path(folder, f"rank{rank}.log") for rank in range(world)]
        ranks = []
        for rank, log in enumerate(logs):
            with log.open("wb") as file:
                one = [*command, str(rank), str(world), folder]
                ranks.append(subprocess.Popen(one, stdout=file, stderr=subprocess.STDOUT))
        codes = [rank.wait() for rank in ranks]
        printed_by = [log.read_text(errors="replace") for log in logs]
    print(*printed_by, sep="")
    if any(codes):
        raise RuntimeError(rank_failure(codes, printed_by))
    return {"found": f"{world} ranks took a ZeRO-1 step over gloo"}


def rank_failure(codes: list[int], printed: list[str]) -> str:
    """One line about the ranks that failed: how each ended, and the last line that it printed."""
    ends = []
    for rank, (code, text) in enumerate(zip(codes, printed, strict=True)):
        if code:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
            last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "nothing was printed")
            ends.append(f"rank {rank} {how}; its last line: {last}")
    return "; ".join(ends)


def probe_ray() -> Found:
    """A local Ray with token authentication starts and runs one task."""
    import ray

    from posttrain.compat.ray import needed_servers_only

    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:  # Ray's sockets allow 107 characters in all
        with needed_servers_only():  # as a pipeline starts it
            ray.init(
                address="local",
                num_cpus=1,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=80 << 20,
                _temp_dir=folder,
            )
        try:
            answer = ray.get(ray.remote(lambda: 3).remote(), timeout=60)
        finally:
            ray.shutdown()
            time.sleep(0.2)  # Ray's daemons write into the folder for a moment after they were stopped
    if answer != 3:
        raise RuntimeError(f"a task returned {answer!r} instead of 3")
    return {"found": "started with token authentication and ran a task"}


def probe_sandbox() -> Found:
    """Run a program in the sandbox, as rewards that run model-written code do."""
    from posttrain.scoring.sandbox.run import find_sandbox, run_python

    result = run_python("print(6 * 7)")
    if result.stdout.strip() != b"42":
        raise RuntimeError(f"a sandboxed program ended with {result.exit_code}: {result.stderr}")
    return {"found": f"{find_sandbox()} ran a program"}


PROBES = {
    "torch": probe_torch,
    "imports": probe_imports,
    "images": probe_images,
    "vllm": probe_vllm,
    "deepspeed": probe_deepspeed,
    "ray": probe_ray,
    "sandbox": probe_sandbox,
}


def main(arguments: list[str]) -> None:
    die_with_parent()
    gc.disable()  # a probe ends soon, and the collector would take a fifth of the time of its imports
    if arguments[0] == "deepspeed-rank":
        deepspeed_rank(int(arguments[1]), int(arguments[2]), Path(arguments[3]))
    else:
        print("\n" + json.dumps(PROBES[arguments[0]]()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
