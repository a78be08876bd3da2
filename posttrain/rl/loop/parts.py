"""The actors and stores that the controller of an RL stage works with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from posttrain.episodes.rollouter import EnvironmentRollouter
from posttrain.records import DrawnPrompt
from posttrain.rl.grading.judge import Judge
from posttrain.rl.history.archive import RolloutArchive
from posttrain.rl.history.ledger import Ledger
from posttrain.rl.loop.scaling import Choice
from posttrain.rl.prompts.difficulty import Difficulty
from posttrain.rl.prompts.source import PromptSource
from posttrain.rl.training.client import TrainerClient
from posttrain.rl.training.reference import AdaptersOff, Reference
from posttrain.sampling.client import Engines


@dataclass(frozen=True, slots=True)
class Parts:
    """The actors and stores that the controller works with.

    shares: the share of each capability in a batch. stop_ids: token ids that end a reply. heldout: the prompts of
    `evaluation`. profile: the pass rates that were measured before the training, if they were.
    num_set_aside: how many prompts the profile could not score.
    forecast: chooses the number of engines, at most so many, from the first steps; None if the config asks for none.
    rollouter: makes the rollouts of rows with an environment; None if no row has one.
    """

    engines: Engines
    trainer: TrainerClient
    reference: Reference | AdaptersOff | None
    source: PromptSource
    shares: Mapping[str, float]
    archive: RolloutArchive
    ledger: Ledger
    stop_ids: tuple[int, ...]
    heldout: Sequence[DrawnPrompt] = ()
    judge: Judge | None = None
    profile: Sequence[Difficulty] = ()
    num_set_aside: int = 0
    rollouter: EnvironmentRollouter | None = None
    forecast: Callable[[int], Choice] | None = None
