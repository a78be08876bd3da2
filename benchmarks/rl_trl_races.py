"""The races of rl_trl.py: what both sides train, with which settings, and the settings of TRL that are tried."""

from dataclasses import dataclass, field
from typing import Any

from rl_trl_puzzles import WALKS

from posttrain.base.config import SetSizes, StageConfig
from posttrain.base.tasks import ANSWERS, Puzzles

RATE = 4e-4
# Of GRPOConfig. The optimizer is set as ours; its warm-up is one step shorter, because TRL's begins with a rate of 0.
# Everything that costs time and is not needed is off.
_PEER: dict[str, Any] = {
    "learning_rate": RATE, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, "adam_beta2": 0.95,
    "num_generations": 8, "temperature": 1.0, "beta": 0.0, "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip
# configs/quickstart/rl.yaml without its system instructions.
_OURS: dict[str, Any] = {
    "reward": {"name": "puzzles"}, "steps": 36, "groups_per_step": 32, "group_size": 8, "max_staleness": 3,
    "sampling": {"temperature": 1.0, "max_tokens": 64}, "micro_batch_tokens": 2048,
    "engine": {"max_model_len": 192, "max_num_seqs": 512, "kv_cache_gib": 0.1},
    "optimizer": {"learning_rate": RATE, "schedule": "constant", "warmup_steps": 4}, "checkpoint_every": 1000,
    "resources": {"rollout": {"workers": 1, "cpus": 1.0}, "trainer": {"cpus": 1.0}},
}  # fmt: skip


@dataclass(frozen=True)
class PeerSetting:
    """How TRL runs: `processes` with `threads` threads each. settings: of GRPOConfig, in addition to the race's."""

    processes: int
    threads: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Race:
    """course: of rl_trl_base.py. ours: config of our stage. peer: of GRPOConfig. goal: of the ratio, in words.

    peer_s: seconds of TRL's training. trial_s: of each setting that is tried. every: steps between two saved policies
    of TRL.
    """

    base: StageConfig
    course: str
    puzzles: Puzzles
    ours: dict[str, Any]
    peer: dict[str, Any]
    goal: str
    peer_s: float
    trial_s: float
    every: int

    @property
    def replies(self) -> int:
        """Replies of a step, of both sides."""
        return self.ours["groups_per_step"] * self.ours["group_size"]

    def peer_settings(self) -> dict[str, PeerSetting]:
        """Settings on which TRL's speed may depend, each with as many replies a step as ours."""
        whole = {"per_device_train_batch_size": self.replies}
        return {
            "two_processes": PeerSetting(2, 1, {"per_device_train_batch_size": self.replies // 2}),
            "one_process": PeerSetting(1, 2, whole),
            "static_cache": PeerSetting(1, 2, {**whole, "cache_implementation": "static"}),
            # At most as stale as ours: four steps on the replies of one policy.
            "four_steps": PeerSetting(1, 2, {**whole, "steps_per_generation": 4}),
        }


RACES = {
    "short": Race(
        base=StageConfig(steps=1300),
        course="answers",
        puzzles=ANSWERS,
        ours=_OURS,
        peer={**_PEER, "max_completion_length": 64},
        goal=">= 1.5",
        peer_s=150.0,
        trial_s=25.0,
        every=2,
    ),
    "long": Race(
        base=StageConfig(steps=900, sets=SetSizes(sft=1, tune=1, heldout=200)),
        course="walk",
        puzzles=WALKS,
        ours={
            **_OURS,
            "steps": 24,
            "groups_per_step": 16,
            "sampling": {"temperature": 1.0, "max_tokens": 520},
            "micro_batch_tokens": 4096,
            "engine": {"max_model_len": 640, "max_num_seqs": 256, "kv_cache_gib": 0.25},
        },
        peer={**_PEER, "max_completion_length": 520},
        goal=">= 3",
        peer_s=220.0,
        trial_s=45.0,
        every=1,
    ),
}
# Changes of our config. TRL is the arm `trl`.
OUR_ARMS: dict[str, dict[str, Any]] = {"ours": {}, "in_turns": {"max_staleness": 0}}
