"""A Ray session that leaves no process behind: started on this machine, or joined at RAY_ADDRESS.

A local Ray listens only on the loopback interface, requires a token made for this session, has no dashboard and sends
no usage statistics. Its processes, and all processes that they start, inherit a mark in their environment. This mark
identifies the processes to end: `_close` ends them after a normal end, an exception or a signal, and watchdog.py after
this process was killed with SIGKILL.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from posttrain.compat.ray import loopback_environment, loopback_options, needed_servers_only, reread_environment
from posttrain.errors import PosttrainError, StageError, UserError
from posttrain.hosts.checks import compare_hosts
from posttrain.hosts.directory import forget_directory, start_directory
from posttrain.hosts.placement import CLUSTER_VARIABLE
from posttrain.pipeline import watchdog
from posttrain.pipeline.plan import local_cpus

NAMESPACE = "posttrain"
SHUTDOWN_S = 10.0
REACH_S = 10.0
# Environment variables of every process of the session. A value that the user has set is kept.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "TQDM_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an actor that asks for no GPU sees none; also silences a warning
}


class RaySession:
    """A running session. cpus, gpus: totals of the whole cluster. local: True if Ray was started here, not joined."""

    def __init__(self, session: str, local: bool, temp_dir: Path):
        self.session = session
        self.local = local
        self.temp_dir = temp_dir
        self.cpus = 0.0
        self.gpus = 0.0

    def worker_logs(self, since: float) -> list[Path]:
        """Files with the output of Ray's worker processes since a Unix time, oldest first; none for a cluster that was
        joined.
        """
        files = [path for path in self.temp_dir.glob("session_2*/logs/worker-*") if path.suffix in (".out", ".err")]
        recent = [path for path in files if path.stat().st_size and path.stat().st_mtime >= since]
        return sorted(recent, key=lambda path: path.stat().st_mtime)


@contextmanager
def ray_session() -> Iterator[RaySession]:
    """Start a local Ray, or join the cluster at RAY_ADDRESS, for the time of a `with` block.

    SIGTERM and SIGHUP are turned into KeyboardInterrupt. Raises UserError if Ray is already initialised in this process
    or the cluster cannot be reached, and StageError if a local Ray cannot be started.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    session = RaySession(secrets.token_hex(8), not joins_cluster(), Path(tempfile.mkdtemp(prefix="ptr-", dir="/tmp")))
    joined = "0" if session.local else "1"
    environment = {**QUIET, watchdog.VARIABLE: session.session, CLUSTER_VARIABLE: joined}
    if session.local:
        environment |= loopback_environment()
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    guard = _start_watchdog(session)
    with _signals() as handlers:
        try:
            with _environment(environment):
                _connect(session, address)
                handlers()  # again: ray.init installed handlers of its own
                yield session
        finally:
            with _uninterrupted():
                _close(session)
                guard.kill()
                guard.wait()
                reread_environment()


def _connect(session: RaySession, address: str) -> None:
    """Start a local Ray or join the cluster. Raises UserError or StageError with the reason."""
    import ray
    from ray.exceptions import RayTaskError

    if not session.local:
        _check_reachable(address)
        _check_node_here(address)
    if ray.is_initialized():
        raise UserError("Ray is already initialised in this process; call ray.shutdown() before running a pipeline")
    reread_environment()
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": "ERROR"}
    if session.local:
        options |= {"num_cpus": local_cpus(), "include_dashboard": False}
        options |= {"object_store_memory": _object_store_bytes(), **loopback_options(session.temp_dir)}
    else:
        environment = {name: os.environ[name] for name in (*QUIET, watchdog.VARIABLE, CLUSTER_VARIABLE)}
        options |= {"address": address, "runtime_env": {"env_vars": environment}}
    try:
        with needed_servers_only():
            ray.init(**options)
    # Ray raises bare `Exception` too, for example when a busy machine starts it too slowly.
    except Exception as error:
        raise _not_connected(error, None if session.local else address) from error
    total = ray.cluster_resources()
    session.cpus, session.gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    if not session.local:
        try:
            compare_hosts(*ray.get(start_directory().reports.remote()))
        except RayTaskError as error:
            raise error.cause from None


def _not_connected(error: Exception, address: str | None) -> PosttrainError:
    """What to tell about a Ray that could not be joined or, without an address, started."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if address is None:
        return StageError(f"a local Ray could not be started: {reason}")
    if not isinstance(error, ConnectionError):
        return StageError(f"the cluster at RAY_ADDRESS={address} was not reached: {reason}")
    return UserError(
        f"RAY_ADDRESS: got {address!r}: something listens there, but this driver was not let in: {reason}; it needs "
        f"the cluster's RAY_AUTH_MODE ({os.environ.get('RAY_AUTH_MODE', 'not set')} here) and token (RAY_AUTH_TOKEN or "
        "RAY_AUTH_TOKEN_PATH), and its version of Ray"
    )


def _check_reachable(address: str) -> None:
    """Raise UserError at once if nothing listens at host:port; Ray itself would try for minutes.

    An address of any other form is left to Ray.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_S).close()
    except OSError as error:
        rule = "start the cluster, or unset RAY_ADDRESS to run on this machine"
        raise UserError(f"RAY_ADDRESS: got {address!r}: cannot be reached: {error}; {rule}") from None


def _check_node_here(address: str) -> None:
    """Raise UserError if no node of a Ray cluster runs on this host. Ray itself would be silent for a minute first."""
    if address.startswith("ray://") or any(
        process.info["name"] == "raylet" for process in psutil.process_iter(["name"])
    ):
        return
    rule = f"start one that gives no CPUs away: ray start --address={address} --num-cpus=0"
    raise UserError(
        f"RAY_ADDRESS: got {address!r}, but no node of Ray runs on this host ({socket.gethostname()}); {rule}"
    )


def _object_store_bytes() -> int:
    """Size of Ray's object store in bytes: a tenth of the memory, but no more than /dev/shm holds.

    That is enough because large tensors are handed over outside of the object store.
    """
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    return max(min(psutil.virtual_memory().total // 10, int(shared * 0.3), 4 << 30), 96 << 20)


def _close(session: RaySession) -> None:
    """Shut Ray down, then end every process that carries the session's mark, and remove its files."""
    import ray

    spare = frozenset({os.getpid()})
    if not session.local:
        forget_directory()
        with suppress(Exception):
            ray.shutdown()
    else:
        # ray.shutdown may wait for a server that is already gone. The processes are ended below in any case.
        closing = threading.Thread(target=lambda: _quietly(ray.shutdown), daemon=True)
        closing.start()
        closing.join(SHUTDOWN_S)
        _terminate(session, spare)
        closing.join(SHUTDOWN_S)
    left = watchdog.kill_session(session.session, str(session.temp_dir), SHUTDOWN_S, spare=spare)
    if left:
        print(f"posttrain: processes {sorted(left)} could not be ended", file=sys.stderr)
    watchdog.remove_traces(session.session, str(session.temp_dir))


def _quietly(function: Callable[[], Any]) -> None:
    """Call a function and ignore its exceptions."""
    with suppress(Exception):
        function()


def _terminate(session: RaySession, spare: frozenset[int], wait_s: float = 2.0) -> None:
    """Send SIGTERM to the processes that are left and wait up to `wait_s`: an engine frees its shared memory on
    SIGTERM.
    """
    temp_dir = str(session.temp_dir)
    alive = watchdog.descendants(watchdog.session_processes(session.session, temp_dir)) - spare
    for pid in alive:
        with suppress(OSError):
            os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + wait_s
    while time.monotonic() < end and watchdog.session_processes(session.session, temp_dir) - spare:
        time.sleep(0.05)


def _start_watchdog(session: RaySession) -> subprocess.Popen:
    """Start watchdog.py in a process session of its own, so that a signal to our process group does not reach it."""
    command = [sys.executable, "-S", "-E", watchdog.__file__, str(os.getpid()), session.session, str(session.temp_dir)]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set the environment variables that are not set, and restore all of them at the end of the `with` block."""
    before = dict(os.environ)
    for name, value in values.items():
        if name in QUIET:
            os.environ.setdefault(name, value)
        else:
            os.environ[name] = value
    try:
        yield
    finally:
        for name in values:
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)


@contextmanager
def _signals() -> Iterator[Callable[[], None]]:
    """Turn SIGTERM and SIGHUP into KeyboardInterrupt, as SIGINT does.

    Only the main thread can install signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    def install() -> None:
        for number in before:
            signal.signal(number, interrupt)

    install()
    try:
        yield install
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore signals for a while: closing takes seconds, and a second Ctrl-C must not stop it half-way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def joins_cluster() -> bool:
    """True if RAY_ADDRESS names a cluster to join."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")
