"""Games of TextArena for one player, such as GuessTheNumber-v0: each turn of the policy is a move.

It runs in an interpreter that has the package: `posttrain environments install textarena`. Left out: games of several
players, and wrappers, which show the whole game again in each observation.
"""

import importlib
import json
import random
import sys
from typing import Any

from posttrain.episodes.session import Session
from posttrain.errors import PluginError
from posttrain.records import RewardResult, Row

REQUIRES = {"textarena": ["textarena"]}
PACKAGES = ["textarena==0.7.4"]


async def textarena(session: Session, row: Row, *, max_turns: int = 100) -> RewardResult:
    """Play the game of the row; the reward is the game's, 0 if it has not ended after `max_turns` turns."""
    game = _Game(row.fields["textarena"])
    for left in range(max_turns - 1, -1, -1):
        turn = await session.sample()
        if game.move(turn.text):
            return game.result()
        if left:
            await session.add("user", game.observation)
    return RewardResult(0.0, reason=f"the game has not ended in {max_turns} turns")


class _Game:
    """One game. made: its name, its seed and its settings. observation: what the policy reads next.

    The games draw from Python's own generator, which all games of a process share. So each game has a state of it.
    """

    def __init__(self, made: dict[str, Any]):
        package: Any = importlib.import_module("textarena")
        self._kinds = package.ObservationType
        self._world: Any = package.make(f"{made['game']}-raw", **made["settings"])
        random.seed(made["seed"])
        try:
            self._world.reset(num_players=1, seed=made["seed"])
        except AssertionError as error:
            raise PluginError(f"{made['game']} is no game for one player: {error}") from None
        self._drawn = random.getstate()
        self.observation = self._observed()

    def move(self, text: str) -> bool:
        """Make a move. Returns whether the game has ended."""
        random.setstate(self._drawn)
        is_done, _ = self._world.step(text)
        self._drawn = random.getstate()
        self.observation = self._observed()
        return is_done

    def result(self) -> RewardResult:
        """What the game gave, and why it ended."""
        rewards, told = self._world.close()
        return RewardResult(float((rewards or {}).get(0, 0.0)), reason=str(told[0].get("reason") or ""))

    def _observed(self) -> str:
        """What the game said since the last look; the move itself, the policy has said."""
        _, said = self._world.get_observation()
        return "\n\n".join(text for _, text, kind in said if kind is not self._kinds.PLAYER_ACTION)


def warm_up() -> None:
    """Import the package, which takes seconds, before the first episode has a deadline."""
    importlib.import_module("textarena")


def write_rows() -> None:
    """Print rows as JSON lines. The job is read from stdin: dataset (which game), size, seed, settings of the game."""
    job = json.load(sys.stdin)
    lines, sys.stdout = sys.stdout, sys.stderr  # packages print too
    for at in range(job["size"]):
        seed = job["seed"] * 1_000_003 + at  # so that two seeds have no game in common
        made = {"game": job["dataset"], "seed": seed, "settings": job["settings"]}
        said = [{"role": "user", "content": _Game(made).observation}]
        line = {"id": f"{job['dataset']}-{job['seed']}-{at}", "capability": job["dataset"], "messages": said}
        print(json.dumps({**line, "textarena": made}), file=lines)
