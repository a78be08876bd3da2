"""vLLM's own OpenAI server for one model folder, as a process that ends with this one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
from pydantic import Field

from posttrain.actors.shared_memory import shared_memory
from posttrain.config.base import Config
from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.episodes.calls import FORMS
from posttrain.errors import ConfigError, StageError
from posttrain.files import read_object
from posttrain.model.adapter import base_folder
from posttrain.sampling.arguments import (
    ENGINE_ENV,
    cpu_cache_arguments,
    cpu_environment,
    engine_arguments,
    read_model_config,
)

START_S = 900.0
LOOK_S = 0.2
STOP_S = 10.0
STOP_LOOK_S = 0.05
# What the engines of a stage need and a server does not: weights in flight, the very distribution of a token. The
# extension of the worker stays, because it mends faults of vLLM: without it a CPU engine dies at the first picture.
_OF_STAGES = ("model", "weight_transfer_config", "logprobs_mode", "generation_config")


class ServeConfig(Config):
    """How a model is served. Example: `{dtype: float32, engine: {max_model_len: 8192}}`."""

    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="Data type of the weights and activations; null: that of the folder."
    )
    engine: EngineConfig = Field(default_factory=lambda: EngineConfig(stream_interval=1), description="The engine.")


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers. url: up to /v1. name: of its model."""

    url: str
    name: str
    process: subprocess.Popen[bytes]


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises ConfigError if it cannot be used."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigError("--port", [f"got {port}: {error.strerror}; name another, or 0 for a free one"]) from None
        return int(listener.getsockname()[1])


def server_arguments(folder: Path, config: ServeConfig, *, host: str, port: int, name: str) -> list[str]:
    """The arguments of `vllm serve`."""
    model = ServedModelConfig(path=str(folder), dtype=served_dtype(folder, config))
    given = engine_arguments(model, config.engine)
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        given |= cpu_cache_arguments(model, config.engine)
    words = ["--model", str(folder), "--host", host, "--port", str(port), "--served-model-name", name]
    for key, value in given.items():
        if key not in _OF_STAGES:
            words += _option(key.replace("_", "-"), value)
    if (parser := _tool_parser(folder)) is not None:
        words += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    return [*words, "--uvicorn-log-level", "warning"]


def served_dtype(folder: Path, config: ServeConfig) -> Literal["float32", "bfloat16"]:
    """The data type that the config asks for, or that of the folder; of adapters, that of their base."""
    found = read_model_config(str(base_folder(folder)))
    is_wide = "float32" in (found.get("dtype"), found.get("torch_dtype"))
    return config.dtype or ("float32" if is_wide else "bfloat16")


@contextlib.contextmanager
def serving(folder: Path, config: ServeConfig, *, host: str, port: int, name: str) -> Iterator[Server]:
    """The server of a model folder, which ends with the block. Raises StageError if it does not start."""
    environment = {**os.environ, **{key: value for key, value in ENGINE_ENV.items() if "MULTIPROCESSING" not in key}}
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        environment |= cpu_environment(config.engine)
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    port = free_port(host, port)
    command = [sys.executable, "-m", "posttrain.serving.process", str(os.getpid())]
    command += server_arguments(folder, config, host=host, port=port, name=name)
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            root = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
            _await(root, process, log)
            yield Server(f"{root}/v1", name, process)
        finally:
            _stop(process)


def _await(root: str, process: "subprocess.Popen[bytes]", log: Any) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            log.seek(0)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if "Error" in line]
            why = lines[-1] if lines else f"it exited with code {process.returncode}"
            raise StageError(f"the server did not start: {why}")
        with contextlib.suppress(OSError):  # urllib's errors are of this kind
            opener.open(f"{root}/health", timeout=5)
            return
        time.sleep(LOOK_S)
    raise StageError(f"the server did not start within {START_S:g} s")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server with all its processes, and remove the shared memory that they leave.

    vLLM kills its engine core at once, together with Python's resource tracker, which would have removed it.
    """
    segments = shared_memory(member.pid for member in members(process.pid))
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        end = time.monotonic() + STOP_S
        while (process.poll() is None or members(process.pid)) and time.monotonic() < end:
            time.sleep(STOP_LOOK_S)
    process.wait()
    for path in segments:
        path.unlink(missing_ok=True)


def members(group: int) -> list[psutil.Process]:
    """The live processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _option(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _tool_parser(folder: Path) -> str | None:
    """vLLM's parser of calls that goes with the folder's chat template; None if the template tells none."""
    path = folder / "chat_template.jinja"
    own = (read_object(folder / "tokenizer_config.json") or {}).get("chat_template")
    template = path.read_text() if path.is_file() else own if isinstance(own, str) else ""
    return next((parser for mark, parser in FORMS if mark in template), None)
