"""The program of a server process: vLLM's own OpenAI server, which ends with the process that started it.

Run as `python -m posttrain.serving.process PARENT_PID ARGUMENTS`, with the arguments of `vllm serve`.
"""

import contextlib
import os
import sys
from functools import partial

from posttrain.actors.parent import die_with_parent
from posttrain.compat import vllm as compat


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    sys.argv = ["vllm", *sys.argv[2:]]
    from vllm.entrypoints.launchers.api_server.entry import main as serve
    from vllm.platforms import current_platform

    die = partial(die_with_parent, os.getpid())
    with compat.forked_core(die) if current_platform.is_cpu() else contextlib.nullcontext():
        serve()


if __name__ == "__main__":
    main()
