"""Weights from GPU to GPU: vLLM's own transfer engines behind the interface of `SharedWeights`.

nccl: one broadcast to all engines, on any host. ipc: the engine reads the trainer's GPU memory, on the same GPU.

In vLLM the trainer calls the engines through a client and waits for them. Here the trainer only publishes, and RL's
controller tells each engine when to load the new version. `publish` copies the weights on their GPU, starts vLLM's
sender in a thread and returns a manifest of plain JSON. The next `publish` waits until the version before has been
sent. Neither backend has been run, because they need GPUs; tests show that the manifests are what vLLM's classes take.
"""

import base64
import os
import pickle
import queue
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch

from posttrain.hosts.placement import in_cluster, this_address, this_node
from posttrain.hosts.relay import Relay
from posttrain.sampling.manifests import GpuManifest, Manifest
from posttrain.sampling.weights import SharedWeights, TensorSpec, WeightTransferError

Backend = Literal["shm", "nccl", "ipc"]


class Publisher(Protocol):
    """The trainer's end of a backend."""

    def publish(self, specs: Sequence[TensorSpec], values: Iterable[torch.Tensor], policy_version: int) -> Manifest:
        """Make the tensors, in the order of `specs`, ready for the engines to load as `policy_version`."""
        ...

    def close(self) -> None:
        """Free memory, threads and files."""
        ...


def make_publisher(
    backend: Backend, num_engines: int, tensor_parallel: int, *, deadline_s: float, delta: bool = False
) -> Publisher:
    """The trainer's end of a backend. `num_engines` engines of `tensor_parallel` GPUs each load every version.

    delta: for shm, whether other hosts may pull what changed since the version before.
    """
    if backend == "shm" and in_cluster():
        return SharedWeights(relay=Relay(this_address()), node=this_node(), delta=delta)
    if backend == "shm":
        return SharedWeights(delta=delta)
    return GpuWeights(backend, 1 + num_engines * tensor_parallel, deadline_s)


class _Client:
    """The client that vLLM's sender calls instead of the engines, which RL's controller calls itself."""

    def __init__(self) -> None:
        self.updates: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()
        self.taken = threading.Event()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Nothing to do: the manifest carries the init info to the engine."""

    def start_weight_update(self) -> None:
        """Nothing to do: the engine starts the update when it is told to load the weights."""

    def update_weights(self, update_info: Any) -> None:
        """Keep the sender, and so its tensors, waiting until the engines have loaded them."""
        self.updates.put(update_info)
        self.taken.wait()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing to do: the engine finishes the update when it has loaded the weights."""


class GpuWeights:
    """The trainer's end of nccl and ipc. world_size: the trainer's rank and all GPUs of the engines."""

    def __init__(self, backend: Literal["nccl", "ipc"], world_size: int, deadline_s: float):
        self.backend: Literal["nccl", "ipc"] = backend
        self._deadline_s = deadline_s
        # On a cluster not by the host's name, which many hosts resolve to themselves: 127.0.1.1.
        self._address = this_address() if in_cluster() else socket.gethostbyname(socket.gethostname())
        self._port = _free_port()
        self._world_size = world_size
        self._peer = f"process {os.getpid()} on {socket.gethostname()}"
        self._engine: Any = None
        self.client = _Client()
        self._tensors: list[tuple[str, torch.Tensor]] = []
        self._sending: threading.Thread | None = None
        self._error: BaseException | None = None
        self._version = -1

    def publish(self, specs: Sequence[TensorSpec], values: Iterable[torch.Tensor], policy_version: int) -> GpuManifest:
        """Copy the tensors on their GPU, and send them as soon as the engines are ready to receive.

        Raises WeightTransferError when the version before was not received within the deadline.
        """
        self._finish()
        self._version = policy_version
        self.hold(specs, values)
        self.client.taken.clear()
        self._sending = threading.Thread(target=self._send, name="send-weights", daemon=True)
        self._sending.start()
        update = self.update_names(specs) if self.backend == "nccl" else self.handles()
        return GpuManifest(self.backend, policy_version, self._peer, self.manifest_init(), update)

    def hold(self, specs: Sequence[TensorSpec], values: Iterable[torch.Tensor]) -> None:
        """Copy the tensors to send next, because the trainer changes its own while they are being sent."""
        self._tensors = [
            (spec.name, value.detach().to(spec.dtype).clone()) for spec, value in zip(specs, values, strict=True)
        ]

    def close(self) -> None:
        """End the sending and vLLM's engine."""
        self.client.taken.set()
        if self._engine is not None:
            self._engine.shutdown()

    def init_info(self) -> Any:
        """vLLM's init info of the trainer's side."""
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        if self.backend == "nccl":
            # One tensor a broadcast, so that an engine that hangs can say at which tensor.
            return NCCLTrainerInitInfo(
                rank=0, master_address=self._address, master_port=self._port, world_size=self._world_size, packed=False
            )
        return IPCTrainerInitInfo(rank=0, packed=False)

    def update_names(self, specs: Sequence[TensorSpec]) -> dict[str, Any]:
        """The fields of vLLM's update info for nccl."""
        return {
            "names": [spec.name for spec in specs],
            "dtype_names": [str(spec.dtype).removeprefix("torch.") for spec in specs],
            "shapes": [list(spec.shape) for spec in specs],
        }

    def manifest_init(self) -> dict[str, Any]:
        """The fields of vLLM's init info on the engine's side."""
        if self.backend == "ipc":
            return {"packed": False}
        return {
            "master_address": self._address,
            "master_port": self._port,
            "world_size": self._world_size,
            "rank_offset": 1,
            "packed": False,
        }

    def _send(self) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        try:
            if self._engine is None:
                self._engine = WeightTransferTrainerFactory.trainer_init(
                    self.init_info(), client=self.client, source=_source(self)
                )
            self._engine.send_weights()
        except BaseException as error:  # raised by `publish`
            self._error = error
            self.client.updates.put(error)

    def handles(self) -> dict[str, Any]:
        """What vLLM's ipc engine would send to the engines. CUDA handles have no JSON form, so they are pickled."""
        try:
            update = self.client.updates.get(timeout=self._deadline_s)
        except queue.Empty:
            raise WeightTransferError(self._say(f"no handles of the tensors in {self._deadline_s:g} s")) from None
        if isinstance(update, BaseException):
            raise WeightTransferError(self._say(str(update))) from update
        return {**update, "ipc_handles": base64.b64encode(pickle.dumps(update["ipc_handles"])).decode()}

    def _finish(self) -> None:
        """Wait for the version before; the engines have loaded it when the controller publishes again."""
        if self._sending is None:
            return
        self.client.taken.set()
        self._sending.join(self._deadline_s)
        while not self.client.updates.empty():  # with nccl the manifest has it already
            self.client.updates.get()
        if self._sending.is_alive():
            last = self._tensors[-1][0] if self._tensors else "none"
            raise WeightTransferError(self._say(f"not taken up to the last tensor {last} in {self._deadline_s:g} s"))
        if self._error is not None:
            raise WeightTransferError(self._say(str(self._error))) from self._error

    def _say(self, message: str) -> str:
        return f"policy version {self._version} from {self._peer} by {self.backend}: {message}"

    @property
    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors that are being sent, with their names in a checkpoint."""
        return self._tensors


def _source(weights: GpuWeights) -> Any:
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.tensors]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            yield from weights.tensors

    return Source()


def open_update(manifest: GpuManifest) -> dict[str, Any]:
    """The fields of vLLM's update info from a manifest, in the engine's worker."""
    update = manifest.update
    if manifest.backend == "ipc":
        return {**update, "ipc_handles": pickle.loads(base64.b64decode(update["ipc_handles"]))}
    return update


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
