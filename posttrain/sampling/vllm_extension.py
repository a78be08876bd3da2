"""Runs inside vLLM's worker process: the shared-memory weight backend and the methods of our worker extension.

vLLM imports this module through `worker_extension_cls`; importing it registers the backend `shm`.

Source: vLLM's interfaces `WeightTransferEngine` (vllm/distributed/weight_transfer/base.py) and layerwise reload
(vllm/model_executor/model_loader/reload).
"""

import os
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from posttrain.actors.parent import die_with_parent
from posttrain.compat.vllm import (
    note_loaded_tensors,
    register_weight_backend,
    repack_experts_on_reload,
    transfer_engine,
)
from posttrain.compat.vllm_images import contiguous_patches
from posttrain.compat.vllm_seeds import draw_by_place
from posttrain.compat.vllm_twin import TwinModel, can_have_twin
from posttrain.sampling.manifests import FolderWeights, GpuManifest, WeightManifest, from_plain
from posttrain.sampling.progress import BUILT, FAILED, Progress
from posttrain.sampling.transfer import open_update
from posttrain.sampling.weights import open_weights

_progress: Progress | None = None


def note(text: str) -> None:
    """Write what this worker begins to work on, so that an update that hangs can be traced to it."""
    if _progress is not None:
        _progress.note(text)


@dataclass
class ShmInitInfo(WeightTransferInitInfo):
    """Empty: trainer and engine need not exchange anything before the first update."""


@dataclass
class ShmUpdateInfo(WeightTransferUpdateInfo):
    """`source`: a `WeightManifest` or `FolderWeights`, by `to_plain`."""

    source: dict[str, Any] = field(default_factory=dict)


class ShmWeightTransferEngine(WeightTransferEngine[ShmInitInfo, ShmUpdateInfo]):
    """Reads checkpoint-format weights from shared memory (or a folder) into the running model."""

    init_info_cls = ShmInitInfo
    update_info_cls = ShmUpdateInfo

    def init_transfer_engine(self, init_info: ShmInitInfo) -> None:
        """Nothing to set up."""

    def start_weight_update(self) -> None:
        """Bring the layers back to the layout that checkpoints have."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ShmUpdateInfo, *args: object, **kwargs: object) -> None:
        """Load every tensor of the source; vLLM's own loader shards and fuses as for a checkpoint."""
        model: Any = self.model
        source = from_plain(update_info.source)
        assert not isinstance(source, GpuManifest)
        model.load_weights(open_weights(source))

    def finish_weight_update(self) -> None:
        """Bring the layers into the layout that the kernels read."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to free."""


class WorkerExtension:
    """Methods added to vLLM's worker, called through `collective_rpc`."""

    def die_with_parent(self) -> int:
        """Ask Linux to kill this process when the one that started it dies; returns this process's id."""
        die_with_parent()
        return os.getpid()

    def note_progress(self, path: str) -> None:
        """Write the name of each tensor into the file at `path` before it is loaded, whatever the backend."""
        global _progress
        _progress = Progress(path)
        note_loaded_tensors(self, lambda name: note(f"tensor {name}"))

    def seed_sampling(self, seed: int) -> None:
        """Seed the generators that tokens are drawn from."""
        torch.manual_seed(seed)

    def draw_by_place(self) -> None:
        """Draw the tokens of requests with a seed of their own by the seed and the token's place alone."""
        draw_by_place(self.model_runner)

    # Attributes of vLLM's worker, to which vLLM adds this class.
    start_weight_update: Any
    update_weights: Any
    finish_weight_update: Any
    weight_transfer_engine: Any
    vllm_config: Any
    device: Any
    model_runner: Any

    def apply_weights(self, source: dict[str, Any]) -> None:
        """One whole weight update: between two engine steps when generation is paused.

        source: a `WeightSource`, by `to_plain`.
        """
        manifest = from_plain(source)
        with transfer_engine(self, self._engine_of(manifest) if isinstance(manifest, GpuManifest) else None):
            self.start_weight_update()
            self.update_weights(open_update(manifest) if isinstance(manifest, GpuManifest) else {"source": source})
            self.finish_weight_update()

    def build_weights(self, source: dict[str, Any]) -> bool:
        """Begin to build new weights in a thread, beside generation, for `exchange_weights`.

        The note BUILT tells that the thread is done, and FAILED that it gave up. Returns False, and does nothing, if
        that is not possible here: `apply_weights` is.
        """
        manifest = from_plain(source)
        if isinstance(manifest, GpuManifest) or not self._has_twin():
            return False
        note("the first tensor")
        self._build = _Build(self._twin, manifest)
        self._build.start()
        return True

    def exchange_weights(self) -> None:
        """Give the model the weights that were built. Raises what the building raised."""
        self._build.finish()
        self._twin.exchange()

    _twin: Any  # a `TwinModel`; None if the model cannot have one
    _build: "_Build"

    def _has_twin(self) -> bool:
        if "_twin" not in self.__dict__:
            model = self.model_runner.get_model()
            is_wanted = os.environ.get("POSTTRAIN_WITHOUT_TWIN") != "1"  # set by a test and a benchmark only
            self._twin = TwinModel(model) if is_wanted and can_have_twin(model) else None
        return self._twin is not None

    def _engine_of(self, manifest: GpuManifest) -> Any:
        """vLLM's transfer engine of another backend; it connects to the trainer at the trainer's first manifest."""
        engines = self.__dict__.setdefault("_transfer_engines", {})
        peer = (manifest.backend, manifest.peer)
        if peer not in engines:
            note(f"the introduction to {manifest.peer} by {manifest.backend}")
            config = WeightTransferConfig(backend=manifest.backend)
            engine = WeightTransferEngineFactory.create_engine(
                config, self.vllm_config, self.device, self.model_runner.get_model()
            )
            engine.init_transfer_engine(engine.parse_init_info(manifest.init))
            engines[peer] = engine
        return engines[peer]


class _Build(threading.Thread):
    """Builds the weights of a source in a model's twin."""

    def __init__(self, twin: TwinModel, source: WeightManifest | FolderWeights):
        super().__init__(daemon=True)
        self._twin = twin
        self._source = source
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._twin.build(open_weights(self._source), note)
        except BaseException as error:  # raised by `finish`
            self._error = error
            note(f"{_progress.read()[1] if _progress is not None else ''}{FAILED}")
        else:
            note(BUILT)

    def finish(self) -> None:
        """Wait for the end, and raise the error if there was one."""
        self.join()
        if self._error is not None:
            raise self._error


register_weight_backend("shm", ShmWeightTransferEngine)
contiguous_patches()
if os.environ.get("POSTTRAIN_WITHOUT_RELOAD_REPAIR") != "1":  # set by the regression test only
    repack_experts_on_reload()
