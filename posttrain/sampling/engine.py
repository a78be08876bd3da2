"""One vLLM engine in a Ray actor: samples, takes new weights in flight, and reports which weights sampled each token.

```
submit ──► core (core.py) ──► vLLM's output handler ──► Reply.put ──► outbox ──► collect     pieces, while they grow
generate_wave ─►  ▲                       └─────────► queue ─────► completions               whole replies
update_weights ───┘ build beside generation, pause between two steps, exchange, resume
```

What waits for what: `collect` waits for the first piece of any reply; `update_weights` pauses the scheduler between two
steps, so running requests continue under the new version; `generate_wave` has the engine to itself. Each wait ends with
EngineLostError when the core has died or does not answer within `deadline_s`.
"""

import asyncio
import os
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from posttrain.actors.processes import place_of_this
from posttrain.compat import vllm as compat
from posttrain.compat.vllm_images import forget_weights
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.errors import StageError
from posttrain.hosts.directory import enroll_here, folder_here
from posttrain.hosts.relay import RelayError
from posttrain.sampling.arguments import ENGINE_ENV
from posttrain.sampling.core import Core
from posttrain.sampling.manifests import WeightSource
from posttrain.sampling.packed import Pieces
from posttrain.sampling.pictures import RequestPictures
from posttrain.sampling.requests import Completion, EngineLostError, Piece, SampleRequest, Updated
from posttrain.sampling.roads import reachable
from posttrain.sampling.salts import Salts
from posttrain.sampling.start_failure import PrintedSince, start_error
from posttrain.sampling.stream import Outbox, Reply
from posttrain.sampling.vllm_requests import completions_of, end_of, sampling_params

WAKE_S = 0.01
ADMIT_AT_ONCE = 64


class EngineActor:
    """A vLLM engine. Made a Ray actor by the registry; every method is a coroutine of one event loop."""

    def __init__(self, name: str, model: dict[str, Any], engine: dict[str, Any]):
        # vLLM is not imported yet. An actor with a `runtime_env` would not get a process that Ray has started already.
        os.environ.update(ENGINE_ENV)
        self.name = name
        settings = EngineConfig(**engine)
        self._folder = str(model["path"])
        self._deadline_s = settings.deadline_s
        self._core = Core(
            name,
            ServedModelConfig(**model),
            settings,
            has_work=lambda: bool(self._outbox.open or self._is_wave),
            on_lost=lambda: self._outbox.flush(),
        )
        self._outbox = Outbox(settings.stream_interval, self._core.hear)
        self._pictures = RequestPictures(name)
        self._tokenizer: Any = None
        self._next_request = 0
        self._num_collecting = 0  # calls of collect
        self._is_wave = False
        self._salts = Salts()
        self._update_lock = asyncio.Lock()

    async def where(self) -> tuple[str, int]:
        """The id of this actor's node in Ray, and its process id: what `kill_process` takes."""
        return place_of_this()

    async def start(self) -> dict[str, Any]:
        """Start the engine; returns its name, process ids and start-up seconds.

        Raises EngineLostError if the engine core was lost meanwhile, and EngineStartError for any other failure. Raises
        UserError if the model lies on another host, and this one has no room for it.
        """
        began, printed = time.time(), PrintedSince()
        await enroll_here(os.getpid())
        folder = await folder_here(self._folder, self._deadline_s)
        try:
            workers = await self._core.start(folder)
            self._tokenizer = self._core.llm.get_tokenizer()
            await self._pictures.ready(self._core.llm, self._tokenizer)
        except EngineLostError:
            raise
        except Exception as error:
            traceback.print_exc()
            raise start_error(self.name, error, printed.lines()) from None
        return {"name": self.name, "pid": os.getpid(), "worker_pids": workers, "start_s": time.time() - began}

    async def pids(self) -> dict[str, int]:
        """Process ids of the actor and of the engine's core."""
        return {"actor": os.getpid(), "core": compat.core_pid(self._core.llm)}

    async def shutdown(self) -> None:
        """Stop the engine core; the actor is killed afterwards."""
        self._core.shutdown()

    # ------------------------------------------------------------------ pieces, while replies grow

    async def submit(self, requests: Sequence[tuple[int, SampleRequest]]) -> None:
        """Admit requests under the caller's keys. Returns when the engine has them.

        Raises StageError, and admits none, if a key is in use, a request cannot be sampled or a wave is being sampled.
        Raises EngineLostError if the engine is lost.
        """
        self._core.check()
        self._refuse_beside_wave()
        admitted: list[tuple[Reply, Any]] = []
        finished: list[Piece] = []
        keys = [key for key, _ in requests]
        self._refuse_keys(keys)
        shown, llm = [item for item in requests if item[1].pictures], self._core.llm
        rendered = {key: await self._pictures.rendered(llm, request, self._tokenizer) for key, request in shown}
        if rendered:  # others may have been admitted meanwhile
            self._refuse_beside_wave()
            self._refuse_keys(keys)
        for key, request in requests:
            self._prepare(key, request, admitted, finished=finished, rendered=rendered.get(key))
        for reply, _ in admitted:  # before the first await, so that no other call takes the same key
            self._outbox.admit(reply)
        for piece in finished:
            self._outbox.add_piece(piece)
        for place, (reply, core_request) in enumerate(admitted):
            if self._outbox.open.get(reply.key, {}).get(reply.index) is not reply:
                continue  # cancelled while others were admitted
            await self._admit(reply, core_request)
            if place % ADMIT_AT_ONCE == ADMIT_AT_ONCE - 1:
                await asyncio.sleep(0)  # outputs are taken in meanwhile

    async def _admit(self, reply: Reply, core_request: Any) -> None:
        """Queue a request and send it to the core. It is called thousands of times a second, and waits for nothing."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await compat.admit(self._core.llm, core_request, reply.index, queue=reply, on_admitted=reply.follow)
        except EngineDeadError:
            raise self._core.died() from None

    async def collect(self, wait_s: float) -> tuple[list[Piece], float]:
        """Every piece since the last call, and the Unix time; waits up to `wait_s` for the first.

        Raises EngineLostError when the engine is lost; the tokens that were here before are returned first.
        """
        self._num_collecting += 1
        try:
            if not self._core.is_lost:
                await self._outbox.wait(wait_s)
        finally:
            self._num_collecting -= 1
        pieces = Pieces(self._outbox.take(self._decode))
        if not pieces:
            self._core.check()
        return pieces, time.time()

    async def cancel(self, keys: Iterable[int]) -> None:
        """End requests and drop the pieces that were not collected. Keys that are not in the engine are ignored."""
        replies = [reply for key in keys for reply in self._outbox.remove(key)]
        if replies and not self._core.is_lost:
            await self._core.alive(self._core.llm.abort([reply.request_id for reply in replies], internal=True))

    async def forget(self) -> None:
        """End every request of `submit`, and every `collect` that still waits.

        A `collect` of an earlier caller, which may have died, would take the pieces of the next caller.
        """
        await self.cancel(list(self._outbox.open))
        while self._num_collecting:
            self._outbox.wake()
            await asyncio.sleep(WAKE_S)

    def _refuse_keys(self, keys: Sequence[int]) -> None:
        if len(set(keys)) < len(keys) or any(key in self._outbox.open for key in keys):
            raise StageError(f"engine {self.name}: a key was submitted twice, among {sorted(keys)[:10]}")

    def _prepare(
        self,
        key: int,
        request: SampleRequest,
        admitted: list[tuple[Reply, Any]],
        *,
        finished: list[Piece],
        rendered: Any = None,
    ) -> None:
        """Make the engine's request for each reply. A reply that is at its end already becomes a finished piece."""
        shared: Any = None  # replies that start from the prompt alone differ in their ids only
        for index, begun in enumerate(request.begun or ((),) * request.n):
            ended = end_of(begun, request, self._decode)
            if ended:
                finished.append(Piece(key, index, len(begun), (), (), (), ended, self._decode(list(begun))))
                continue
            self._next_request += 1
            name = f"{self.name}-{self._next_request}"
            if begun or shared is None:
                prompt = self._pictures.prompt(
                    key, [*request.prompt_ids, *begun], rendered, salt=self._salts.of(request)
                )
                params = sampling_params(request, len(begun), stream=True)
                core_request = self._core_request(key, prompt, params, priority=request.priority)
                if not begun:
                    shared = core_request
            else:
                core_request = shared
            reply = Reply(self._outbox, key, index, request_id=name, begun=begun, choice_ids=request.choice_ids)
            admitted.append((reply, compat.named_copy(core_request, name)))

    def _core_request(self, key: int, prompt: Any, params: Any, *, priority: int) -> Any:
        """vLLM's own request. Raises StageError if vLLM refuses it."""
        from vllm.exceptions import VLLMClientError

        try:
            return compat.prepare_request(self._core.llm, prompt, params, priority=priority)
        except (ValueError, VLLMClientError) as error:
            raise StageError(f"engine {self.name}: request {key} cannot be sampled: {error}") from None

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    # ------------------------------------------------------------------ whole replies

    async def generate_wave(
        self, requests: Sequence[SampleRequest], seed: int
    ) -> tuple[list[list[Completion]], float, float]:
        """Sample every request; the tokens depend on the weights, the requests and `seed` alone.

        Returns the completions by request, and the Unix times of the first start and the last end.

        The scheduler is held while the caches are emptied, the worker's generator is seeded and all requests are
        queued in their order; then nothing else is in the engine until they are finished. vLLM draws the tokens of a
        step from one generator in the order of its batch, so a request beside a wave would change its tokens: one that
        comes during a wave is refused. A request with a seed of its own draws by that. Raises StageError if requests
        are in flight.
        """
        began = time.time()
        self._core.check()
        self._refuse_for_wave(requests)
        async with self._update_lock:
            if self._outbox.open:
                raise StageError(f"engine {self.name}: a wave was asked for with other requests in flight")
            self._is_wave = True
            try:
                await self._core.ask("wave", compat.pause_between_steps(self._core.llm))
                await self._core.ask("wave", forget_weights(self._core.llm, running=True))
                await self._core.ask("wave", self._core.llm.collective_rpc("seed_sampling", args=(seed,)))
                queues = [await self._core.alive(self._add(request)) for request in requests]
                await self._core.ask("wave", self._core.llm.resume_generation())
                outputs = await self._core.alive(asyncio.gather(*(queue.get() for queue in queues)))
            finally:
                self._is_wave = False
        return [completions_of(output, self._decode) for output in outputs], began, time.time()

    async def sample(self, requests: Sequence[SampleRequest]) -> list[list[Completion]]:
        """Sample every request, beside others. Returns the completions by request, when all are finished.

        Raises EngineLostError if the engine is lost, and StageError during a wave.
        """
        self._core.check()
        self._refuse_beside_wave()
        queues = [await self._core.alive(self._add(request)) for request in requests]
        outputs = await self._core.alive(asyncio.gather(*(queue.get() for queue in queues)))
        return [completions_of(output, self._decode) for output in outputs]

    async def _add(self, request: SampleRequest) -> Any:
        self._next_request += 1
        name = f"{self.name}-{self._next_request}"
        rendered = await self._pictures.rendered(self._core.llm, request, self._tokenizer)
        prompt = self._pictures.prompt(name, list(request.prompt_ids), rendered, salt=self._salts.of(request))
        params = sampling_params(request)
        return await self._core.llm.add_request(name, prompt, params, priority=request.priority)

    def _refuse_beside_wave(self) -> None:
        if self._is_wave:
            raise StageError(
                f"engine {self.name}: a wave is being sampled, and a request beside it would change its tokens"
            )

    def _refuse_for_wave(self, requests: Sequence[SampleRequest]) -> None:
        if any(request.begun or request.choice_ids for request in requests):
            raise StageError(f"engine {self.name}: replies that were begun elsewhere, and choices, are for submit")

    # ------------------------------------------------------------------ weights

    async def update_weights(
        self, source: WeightSource, policy_version: int, kv: Literal["recompute", "keep"] = "recompute"
    ) -> Updated:
        """Load new weights between two steps of the engine. Running requests continue with them.

        kv="recompute": the KV cache of running requests is computed again, so that every later token is exactly the new
        policy's. kv="keep": running requests continue on the KV cache of the old weights, so their later tokens belong
        to neither policy alone. So do later turns of rollouts that were begun before (salts.py). The recorded
        log-probabilities are right in both cases. Other requests that come later never read what was computed with the
        old weights.

        Raises EngineLostError, which names engine, version and tensor, when the update fails or makes no progress for
        `deadline_s`. Some weights may be new and others old then, so the engine is of no use.
        """
        async with self._update_lock:
            self._core.check()
            try:
                source = await reachable(source, self._deadline_s)  # generation goes on meanwhile
            except RelayError as error:
                raise EngineLostError(f"engine {self.name}: {error}") from None
            keeps = self._salts.outlast(kv, policy_version)
            updated = await self._core.update_weights(source, policy_version, kv, prefixes=not keeps)
            self._salts.updated(kv, policy_version)
            return updated

    async def update_phases(self) -> dict[str, float]:
        """Seconds of the phases of the last update: verify and build beside generation; then, while it pauses, stop
        (the step in flight), exchange (or load, if nothing was built), forget (caches), resume."""
        return self._core.update_phases
