"""vLLM: weight reloading, prefix caches, the queue of requests, and the tokens of unfinished replies.

Importing this module does not import vLLM. The functions of the first part run in vLLM's worker process, those of the
second in its engine core, and those of the third in the process that holds the `AsyncLLM`.
"""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from multiprocessing.context import ForkContext, ForkProcess
from typing import TYPE_CHECKING, Any

from posttrain.compat.patches import patch

if TYPE_CHECKING:
    import torch

_patch = partial(patch, "vllm")
_PIECES = "tests/test_sampling_stream.py::test_pieces_make_whole_replies"

# ------------------------------------------------------------------ in vLLM's worker


@_patch(
    "0.32.0",
    "fault",
    reason="On CPUs vLLM packs expert weights for the kernel on the first load only. After a reload the kernel reads "
    "the old copy, or half of it: reloading identical weights changes log-probabilities by 0.5 without an error",
    reference="tracker of reload faults: vllm-project/vllm#48312; "
    "vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py, `_setup_kernel`",
    test="tests/test_sampling.py::test_reload_repair_is_needed_and_sufficient",
)
def repack_experts_on_reload() -> None:
    """Pack expert weights on every reload. On GPUs, where the kernel reads the parameters, nothing is changed."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or getattr(Method, "_posttrain_repaired", False):
        return
    setup_kernel = Method._setup_kernel

    def setup_kernel_and_prepack(self: Any, layer: Any, w13: "torch.Tensor", w2: "torch.Tensor") -> None:
        is_reload = self.moe_kernel is not None
        setup_kernel(self, layer, w13, w2)
        if is_reload:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    Method._setup_kernel = setup_kernel_and_prepack  # type: ignore[method-assign]
    Method._posttrain_repaired = True  # type: ignore[attr-defined]


@_patch(
    "0.32.0",
    "gap",
    reason="Registering a weight transfer backend twice is an error, and no public function says whether a name is "
    "taken. The module that registers our backend is imported more than once in a process",
    reference="vllm/distributed/weight_transfer/factory.py, `WeightTransferEngineFactory.register_engine`",
    test="tests/test_compat.py::test_vllm_still_refuses_to_register_a_backend_twice",
)
def register_weight_backend(name: str, engine_class: type) -> None:
    """Register a weight transfer backend, unless its name is registered already."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, engine_class)


@_patch(
    "0.32.0",
    "gap",
    reason="No callback says which tensor is being loaded. Without one, an update that hangs could not be traced to a "
    "tensor",
    reference="vllm/distributed/weight_transfer/base.py, `WeightTransferEngine`",
    test="tests/test_sampling.py::test_reload_repair_is_needed_and_sufficient",
)
def note_loaded_tensors(worker: Any, note: Callable[[str], None]) -> None:
    """Call `note` with each tensor's name before this worker's model loads it."""

    def noted(weights: "Iterable[tuple[str, torch.Tensor]]") -> "Iterator[tuple[str, torch.Tensor]]":
        for name, tensor in weights:
            note(name)
            yield name, tensor

    model = worker.model_runner.get_model()
    load_weights = model.load_weights
    model.load_weights = lambda weights: load_weights(noted(weights))


@_patch(
    "0.32.0",
    "gap",
    reason="A vLLM worker has one weight transfer engine for its whole life. Our warm engines take weights through "
    "shared memory from one trainer and over NCCL from the next",
    reference="vllm/distributed/weight_transfer/factory.py; `weight_transfer_engine` of vllm/v1/worker/gpu_worker.py",
    test="tests/test_sampling.py::test_nccl_manifests_are_what_vllm_takes",
)
@contextmanager
def transfer_engine(worker: Any, engine: Any) -> Iterator[None]:
    """Within the block, the worker takes weights through `engine`; None: through the one that vLLM gave it."""
    own = worker.weight_transfer_engine
    if engine is not None:
        worker.weight_transfer_engine = engine
    try:
        yield
    finally:
        worker.weight_transfer_engine = own


# ------------------------------------------------------------------ in vLLM's engine core


@_patch(
    "0.32.0",
    "gap",
    reason="vLLM fixes at the start of an engine whether requests are served by priority. A warm engine serves stages "
    "with and without priorities",
    reference="`policy`, `waiting` and `kv_holding_waiting` of vllm/v1/core/sched/scheduler.py",
    test="tests/test_compat.py::test_a_priority_overtakes_only_where_the_queue_is_changed",
)
def serve_by(scheduler: Any, policy: Any) -> None:
    """Change the `SchedulingPolicy` by which a running scheduler takes waiting requests."""
    from vllm.v1.core.sched.request_queue import create_request_queue

    if scheduler.policy is policy:
        return
    scheduler.policy = policy
    for name in ("waiting", "kv_holding_waiting"):
        queue = create_request_queue(policy)
        for request in getattr(scheduler, name):
            queue.add_request(request)
        setattr(scheduler, name, queue)


@_patch(
    "0.32.0",
    "gap",
    reason="vLLM resets the prefix cache only while no request holds a block, or else computes every running request "
    "again. Without a reset, requests that come after a weight update would read blocks of the old weights",
    reference="vllm-project/vllm#28827; `reset_prefix_cache` of vllm/v1/core/block_pool.py",
    test="tests/test_compat.py::test_vllm_still_keeps_prefixes_while_a_block_is_used",
)
def forget_prefixes(pool: Any) -> None:
    """Make a `BlockPool` forget which prefix each block holds. Running requests keep their blocks."""
    from vllm.v1.core.block_pool import BlockHashToBlockMap

    pool.cached_block_hash_to_block = BlockHashToBlockMap()
    pool.cached_block_hashes_by_block.clear()
    for block in pool.blocks:
        block.reset_hash()


@_patch(
    "0.32.0",
    "gap",
    reason="vLLM reads `cache_salt` only when a request is made. A request that continues with the KV cache of older "
    "weights needs a new salt, so that no other request reuses its blocks",
    reference="`_block_hasher` and `update_block_hashes` of vllm/v1/request.py",
    test="tests/test_sampling_stream.py::test_kept_caches_do_not_leak_into_new_requests",
)
def salt_prefixes(request: Any, salt: str) -> None:
    """Salt the prefix hashes of a running request, so that no request reuses blocks computed under old weights."""
    if request._block_hasher is None:  # no prefix caching
        return
    request.cache_salt = salt
    request.block_hashes = []
    request.update_block_hashes()


# ------------------------------------------------------------------ in the process of the AsyncLLM


@_patch(
    "0.32.0",
    "gap",
    reason="On CPUs, and in every Ray actor, vLLM starts its engine core as a new Python process, which imports all of "
    "vLLM again: three quarters of the core's start. No argument or variable asks for a fork",
    reference="`check_and_update_config` of vllm/platforms/cpu.py; `_maybe_force_spawn` of vllm/utils/system_utils.py",
    test="tests/test_compat.py::test_vllm_still_spawns_its_engine_core_on_cpus",
)
@contextmanager
def forked_core(begin: Callable[[], None]) -> Iterator[None]:
    """Within the block, an engine core that is started is forked from this process, which has vLLM imported.

    begin: called first in the core. vLLM spawns because a process that has used a GPU or has started OpenMP threads
    must not fork, so this is for engines on CPUs whose process has one OpenMP thread. The core makes no call to a
    cluster, and objects that the fork copied are excluded from its garbage collector, so none of Ray's is freed there.
    The core is named through Ray, because vLLM's way of naming a process has no effect in a copy of a Ray actor.
    """
    from ray._raylet import setproctitle  # pyright: ignore[reportAttributeAccessIssue]
    from vllm.v1.engine import utils as engine_utils

    class Core(ForkProcess):
        def run(self) -> None:
            gc.freeze()
            begin()
            setproctitle("VLLM::EngineCore")
            super().run()

    class Context(ForkContext):
        Process = Core

    utils: Any = engine_utils  # the name is not among those that the module offers
    own = utils.get_mp_context
    utils.get_mp_context = Context
    try:
        yield
    finally:
        utils.get_mp_context = own


@_patch(
    "0.32.0",
    "fault",
    reason="vLLM turns Llama 4's attention temperature off for a `max_model_len` of up to 32768, whatever the model's "
    "config says. Log-probabilities are then wrong by up to 0.36",
    reference="vllm-project/vllm#16439; vllm/model_executor/models/llama4.py, `Llama4ForCausalLM.__init__`",
    test="tests/test_model_vllm.py::test_vllm_and_the_native_model_agree",
)
def keep_attention_temperature(text_config: dict[str, Any]) -> dict[str, Any]:
    """Engine arguments that keep the attention temperature if the model's config asks for it; {} otherwise."""
    if not text_config.get("attn_temperature_tuning"):
        return {}
    return {"override_generation_config": {"attn_temperature_tuning": True}}


@_patch(
    "0.32.0",
    "fault",
    reason="`AsyncLLM.pause_generation` sleeps for 20 ms after the engine core has paused. A whole weight update of a "
    "small model takes no longer",
    reference="`pause_generation` of vllm/v1/engine/async_llm.py",
    test="tests/test_compat.py::test_vllm_still_sleeps_when_it_pauses",
)
async def pause_between_steps(llm: Any) -> None:
    """Pause the scheduler between two steps and keep its requests, with all caches."""
    await llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)


@_patch(
    "0.32.0",
    "gap",
    reason="`AsyncLLM.generate` needs a task for each request and a copy for each token. This function queues "
    "thousands of requests a second without either",
    reference="`add_request` of vllm/v1/engine/output_processor.py and `_add_request` of vllm/v1/engine/async_llm.py",
    test=_PIECES,
)
async def admit(llm: Any, core_request: Any, index: int, *, queue: Any, on_admitted: Callable[[Any], None]) -> None:
    """Queue a request whose outputs go to `queue.put` instead of vLLM's own `RequestOutputCollector`.

    on_admitted: called with the request's `RequestState` before the request is sent to the engine core.
    """
    processor = llm.output_processor
    processor.add_request(core_request, None, None, index, queue)
    on_admitted(processor.request_states[core_request.request_id])
    await llm.engine_core.add_request_async(core_request)


@_patch(
    "0.32.0",
    "gap",
    reason="Preparing a request costs more than queueing it. The requests for the replies to one prompt differ in "
    "their ids only, and no public function prepares a prompt once for many replies",
    reference="`process_inputs` and `assign_request_id` of vllm/v1/engine/input_processor.py",
    test=_PIECES,
)
def prepare_request(llm: Any, prompt: Any, params: Any, *, priority: int) -> Any:
    """An `EngineCoreRequest` without an id. prompt: of `engine_prompt`. Raises ValueError or VLLMClientError if vLLM
    refuses the request."""
    tasks = llm._supported_tasks  # vLLM asks its engine core for them once, at the start
    return llm.input_processor.process_inputs("", prompt, params, supported_tasks=tasks, priority=priority)


@_patch(
    "0.32.0",
    "gap",
    reason="As for `prepare_request`: a prepared request gets its ids afterwards",
    reference="`assign_request_id` of vllm/v1/engine/input_processor.py",
    test=_PIECES,
)
def named_copy(core_request: Any, name: str) -> Any:
    """A copy of a prepared request with the id `name`."""
    named = copy(core_request)
    named.request_id = named.external_req_id = name
    return named


@_patch(
    "0.32.0",
    "gap",
    reason="No public function gives the tokens of a reply before an output carries them. The tokens that have arrived "
    "must be readable after the engine has died, and whenever the reader wants them",
    reference="`RequestState` of vllm/v1/engine/output_processor.py",
    test="tests/test_sampling_stream.py::test_a_killed_core_is_an_error_and_no_token_is_lost",
)
class GrowingReply:
    """The tokens of one unfinished reply that have arrived so far. state: vLLM's `RequestState` of its request."""

    __slots__ = ("_state",)

    def __init__(self, state: Any):
        self._state = state

    @property
    def num_tokens(self) -> int:
        """Tokens that have arrived."""
        return self._state.detokenizer.num_output_tokens()

    def token_ids(self, first: int = 0) -> list[int]:
        """Token ids from place `first` on."""
        return self._state.detokenizer.output_token_ids[first:]

    def logprobs(self, first: int) -> list[float]:
        """Log-probabilities of the sampled tokens from place `first` on."""
        return self._state.logprobs_processor.logprobs.logprobs[first:]

    def choice_logprobs(self) -> dict[int, float]:
        """Log-probabilities by token id, at the only place of a reply whose likeliest tokens were asked for; the
        sampled token is the first."""
        flat = self._state.logprobs_processor.logprobs
        return dict(zip(flat.token_ids, flat.logprobs, strict=True))

    @property
    def version_starts(self) -> list[tuple[str, int]]:
        """(weight version, place of the first token that it sampled), in order."""
        return self._state.weight_version_starts


@_patch(
    "0.32.0",
    "gap",
    reason="No public function gives the process id of the engine core, which must be killed when it is frozen",
    reference="`resources.engine_manager` of vllm/v1/engine/core_client.py",
    test="tests/test_sampling_stream.py::test_a_frozen_core_is_an_error",
)
def core_pid(llm: Any) -> int:
    """Process id of the engine core."""
    return llm.engine_core.resources.engine_manager.processes[0].pid
