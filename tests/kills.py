"""Kills of the processes of a run, one after the other, each with the outcome that it must have."""

from collections.abc import Iterable

from chaos_run import ChaosRun, Strike


def kill_each(run: ChaosRun, victims: Iterable[tuple[str, str]], outcome: str, *, within_s: float) -> None:
    """Kill each (victim, state of a group at which it is struck); every kill ends as `outcome` and leaves no orphan."""
    for name, state in victims:
        strike = run.strike(Strike(name, "kill", state), within_s)
        assert strike.outcome == outcome, strike
        assert strike.orphans == [], strike
