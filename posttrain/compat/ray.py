"""Ray: a local session that only this host can reach, and environment variables that change after Ray was imported.

Importing this module does not import Ray.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.compat import ray_agent
from posttrain.compat.patches import patch

_patch = partial(patch, "ray")
CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
AGENT = "dashboard_agent_command"  # the argument of the raylet


@_patch(
    "2.60.0",
    "gap",
    reason="A local Ray listens on the host's network address. Every server of it binds to 127.0.0.1 only if the "
    "variable for hosts that are never part of a cluster is set",
    reference="ray-project/ray#31166 (the variable); `ENABLE_RAY_CLUSTER` of ray/_private/ray_constants.py",
    test="tests/test_pipeline_run.py::test_a_local_ray_is_closed_to_others",
)
def loopback_environment() -> dict[str, str]:
    """The variables with which a local Ray binds to 127.0.0.1 only. Set them before calling `reread_environment`."""
    return {CLUSTER_VARIABLE: "0"}


@_patch(
    "2.60.0",
    "gap",
    reason="`ray.init` has no public argument for the address that a local node binds to, nor for its folder of files",
    reference="`_node_ip_address` and `_temp_dir` of `ray.init`, ray/_private/worker.py",
    test="tests/test_pipeline_run.py::test_a_local_ray_is_closed_to_others",
)
def loopback_options(temp_dir: Path) -> dict[str, Any]:
    """Arguments of `ray.init` for a local node on 127.0.0.1 whose files are all in `temp_dir`."""
    return {"_node_ip_address": "127.0.0.1", "_temp_dir": str(temp_dir)}


@_patch(
    "2.60.0",
    "gap",
    reason="`ray.init` has no argument that leaves out the autoscaler's monitor, the log monitor, the dashboard's "
    "process and its agent, which start with `include_dashboard=False` too. They take more than half of the time of a "
    "start. The agent listens at a fixed port: beside another Ray on the host it tries for 3 s, and the start waits",
    reference="`start_head_processes` and `start_ray_processes` of ray/_private/node.py; `start_raylet` of "
    "ray/_private/services.py; `_start_site_with_retry` of ray/dashboard/http_server_agent.py",
    test="tests/test_compat.py::test_a_local_ray_has_no_server_without_work",
)
@contextmanager
def needed_servers_only() -> Iterator[None]:
    """Within the block, `ray.init` does not start four processes that have nothing to do in a local session.

    The session has one node, so there is nothing to scale; `log_to_driver=False` says that logs are not forwarded; and
    without a dashboard the dashboard's process sends usage statistics only, which are turned off. The dashboard's agent
    serves metrics and the submission of jobs, which nobody asks for. A raylet needs one: ray_agent.py takes its place.
    """
    from ray._private import services, utils
    from ray._private.node import Node

    def nothing(node: Any) -> None:
        pass

    def no_dashboard(node: Any, **_: Any) -> None:
        node._webui_url = ""  # as Ray itself leaves it without a dashboard

    servers = {"start_monitor": nothing, "start_log_monitor": nothing, "start_api_server": no_dashboard}
    changes: list[tuple[Any, str, Any]] = [(Node, name, start) for name, start in servers.items()]
    changes.append((services, "start_ray_process", partial(_start_process, services.start_ray_process)))
    # Asks which agent to start, by importing the packages that the agent would need.
    changes.append((utils, "get_dashboard_dependency_error", lambda: None))
    own = [(place, name, getattr(place, name)) for place, name, _ in changes]
    try:
        for place, name, changed in changes:
            setattr(place, name, changed)
        yield
    finally:
        for place, name, before in own:
            setattr(place, name, before)


def _start_process(start: Any, command: list[str], *arguments: Any, **options: Any) -> Any:
    """Ray's `start_ray_process`, with our agent in the command of a raylet."""
    given = dict(part.removeprefix("--").split("=", 1) for part in command if part.startswith("--") and "=" in part)
    if AGENT in given:
        program = [sys.executable, "-S", "-E", ray_agent.__file__, given["session_dir"], given["node_id"]]
        idle = f"--{AGENT}={subprocess.list2cmdline(program)}"
        command = [idle if part.startswith(f"--{AGENT}=") else part for part in command]
    return start(command, *arguments, **options)


@_patch(
    "2.60.0",
    "gap",
    reason="Ray reads its configuration, its token and `ENABLE_RAY_CLUSTER` from the environment once, at import or "
    "first use. A process that starts a second session would use the token of the first",
    reference="ray/_private/ray_constants.py; `AuthenticationTokenLoader` and `Config` of ray/_raylet.pyx",
    test="tests/test_compat.py::test_ray_still_keeps_the_environment_of_its_import",
)
def reread_environment() -> None:
    """Let Ray read the environment variables as they are now."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(CLUSTER_VARIABLE) != "0"


@_patch(
    "2.60.0",
    "gap",
    reason="`ray.available_resources` gives the sum over all hosts, and an actor needs a host that has all it asks for",
    reference="`available_resources_per_node` of ray/_private/state.py",
    test="tests/test_compat.py::test_ray_tells_what_each_node_has_free",
)
def free_resources() -> dict[str, dict[str, float]]:
    """What each node of the cluster has free, by its id. Example: `{"9f…": {"CPU": 2.0}}`."""
    from ray._private.state import available_resources_per_node

    return {node: dict(free) for node, free in available_resources_per_node().items()}
