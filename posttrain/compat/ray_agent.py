"""Stands in for the dashboard's agent of a local Ray, which has nothing to do. Run by path, with the standard library.

    python ray_agent.py SESSION_FOLDER NODE

The raylet does not start without an agent, waits until three files say at which ports it serves, and ends when it ends.
As Ray's own agent does in an installation without the dashboard's packages, this one writes -1, for "no such service".
It sleeps until the raylet, which holds the other end of its standard input, is gone. Used by `needed_servers_only` of
posttrain/compat/ray.py.
"""

import os
import sys

PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port")


def main(folder: str, node: str) -> None:
    for name in PORTS:
        path = os.path.join(folder, f"{name}_{node}")
        with open(f"{path}.new", "w") as file:
            file.write("-1")
        os.replace(f"{path}.new", path)  # the raylet must not read half of a file
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
