"""Figures of rl.py for the rollout worker, compared with vLLM alone.

rollout_vs_raw, _50m      tokens a second of our rollout worker (requests and pieces through Ray, log-probabilities,
                          versions, the ledger on the disk) / tokens a second of `vllm.LLM.generate` in a Ray actor of
                          its own. Both have the same model, prompts, lengths and log-probabilities, get all requests at
                          once, and take turns. `LLM` runs in both of its modes, with its core in a process of its own
                          and without; the faster one counts
"""

import asyncio
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rl_models import save, start_engine

from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.context import BusyLog, StageContext
from posttrain.pipeline.ray_session import ray_session
from posttrain.records import DrawnPrompt, Media, Message, Prompt, Row
from posttrain.rl.history.ledger import Ledger
from posttrain.sampling.arguments import ENGINE_ENV, engine_arguments
from posttrain.sampling.requests import SampleRequest
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.workers import RolloutWorkers

PROMPT_TOKENS = 20
SHAPES = {"1m": (512, 128, 4), "50m": (128, 48, 3)}  # requests, tokens of each reply, rounds
ENGINE = EngineConfig(max_model_len=256, kv_cache_gib=0.5)


class RawLLM:
    """`vllm.LLM` with our engine's settings, and with its worker's extension: that one mends a fault of vLLM without
    which no picture can be sampled from on a CPU (posttrain/compat/vllm_images.py).
    """

    def __init__(self, served: dict[str, Any], engine: EngineConfig = ENGINE):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        from vllm import LLM

        ours = {"weight_transfer_config", "stream_interval"}
        arguments = engine_arguments(ServedModelConfig(**served), engine)
        self._llm = LLM(**{name: value for name, value in arguments.items() if name not in ours})

    def tokens_per_s(self, prompts: list[Any], num_tokens: int, replies: int = 1) -> float:
        """prompts: as vLLM takes them. replies: to each."""
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=1.0, max_tokens=num_tokens, logprobs=0, detokenize=False, flat_logprobs=True, ignore_eos=True,
            n=replies,
        )  # fmt: skip
        began = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(reply.token_ids) for output in outputs for reply in output.outputs)
        return tokens / (time.perf_counter() - began)


class Ours:
    """One rollout worker that gets all requests at once. Its transitions are written to a ledger."""

    def __init__(self, actor: Any, folder: Path):
        self._folder, self._next = folder, 0
        log = BusyLog(StageContext("rl", folder, folder / "events.jsonl"), "ours", "generate")
        self._engines: Any = SimpleNamespace(
            names=["ours"], seats=[0], actors=[actor], logs={"ours": log}, places=[None], is_ready=lambda seat: True
        )
        self._ledger = Ledger(folder / "ledger.sqlite")

    def tokens_per_s(self, requests: list[SampleRequest]) -> float:
        return asyncio.run(self._run(requests))

    async def _run(self, requests: list[SampleRequest]) -> float:
        ledger, done = self._ledger, asyncio.Event()
        left, tokens = len(requests), 0

        def finished(flight: Flight) -> None:
            nonlocal left, tokens
            ledger.generated(flight.order, flight.replies)
            left, tokens = left - 1, tokens + sum(rollout.num_sampled for rollout in flight.rollouts)
            if not left:
                done.set()

        async def keep() -> None:
            while True:
                await ledger.flush()
                await asyncio.sleep(0.05)

        context = StageContext("rl", self._folder, self._folder / "events.jsonl")
        workers = RolloutWorkers(
            context, self._engines, deadline_s=ENGINE.deadline_s, finished=finished,
            begun=lambda flight: ledger.sampled_so_far(flight.order, flight.replies),
        )  # fmt: skip
        row = Row("p", "sums", (Message("user", "1 + 1 ="),))
        began = time.perf_counter()
        running = [asyncio.ensure_future(workers.run()), asyncio.ensure_future(keep())]
        for request in requests:
            self._next += 1
            ledger.reserve(self._next, "p", "sums", system=None, prompts_seen=0, stamp=0)
            prompt = Prompt(row.messages, request.prompt_ids, tuple(map(Media, request.pictures)))
            workers.send(Flight(self._next, 0, DrawnPrompt(row, None, prompt), request))
        waiting = asyncio.ensure_future(done.wait())
        await asyncio.wait({waiting, *running}, return_when=asyncio.FIRST_COMPLETED)
        ended = time.perf_counter()
        for task in running:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return tokens / (ended - began)

    def close(self) -> None:
        self._ledger.close()


def rollout_vs_raw(size: str) -> tuple[float, dict[str, float]]:
    requests, num_tokens, rounds = SHAPES[size]
    prompts = [tuple(5 + (7 * i + 3 * j) % 400 for j in range(PROMPT_TOKENS)) for i in range(requests)]
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        served = save(size, Path(scratch) / "model")
        ours = [SampleRequest(ids, max_tokens=num_tokens) for ids in prompts]
        raw = [{"prompt_token_ids": list(ids)} for ids in prompts]
        ratio, medians = beside_raw(served, ENGINE, ours, raw=raw, rounds=rounds, folder=Path(scratch))
    return ratio, {**medians, "requests": requests, "tokens_per_reply": num_tokens}


def beside_raw(
    served: ServedModelConfig,
    engine: EngineConfig,
    requests: list[SampleRequest],
    *,
    raw: list[dict[str, Any]],
    rounds: int,
    folder: Path,
) -> tuple[float, dict[str, float]]:
    """Our tokens a second / those of the faster mode of `LLM`, and the medians of each. Ray must be initialised.

    requests, raw: the same, for us and as vLLM takes them. folder: for our ledger.
    """
    import ray

    ours = Ours(start_engine("ours", served, engine), folder)
    try:
        peers = {
            name: ray.remote(RawLLM)
            .options(
                num_cpus=0.3,
                runtime_env={"env_vars": {**ENGINE_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": own_core}},
            )
            .remote(served.model_dump(), engine)
            for name, own_core in (("raw_in_process", "0"), ("raw_own_core", "1"))
        }
        rates: dict[str, list[float]] = {"ours": [], **{name: [] for name in peers}}
        for _ in range(1 + rounds):  # the first round warms up
            rates["ours"].append(ours.tokens_per_s(requests))
            for name, actor in peers.items():
                work = actor.tokens_per_s.remote(raw, requests[0].max_tokens, requests[0].n)
                rates[name].append(ray.get(work))
    finally:
        ours.close()
    rates = {name: values[1:] for name, values in rates.items()}
    peer = max(peers, key=lambda name: statistics.median(rates[name]))
    ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rates[peer], strict=True))
    return ratio, {f"{name}_tokens_per_s": statistics.median(values) for name, values in rates.items()}
