"""`posttrain environments`: list environments, begin a new one, watch an episode."""

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.rewards import show_plugins
from posttrain.errors import EXIT_FAILED

if TYPE_CHECKING:
    from posttrain.records import Message, Rollout

environments_app = typer.Typer(no_args_is_help=True, help="Environment plug-ins: list, begin a new one, watch one.")


@environments_app.command("list")
def environments_list() -> None:
    """List the registered environments: name, what it does, and where the function is."""
    from posttrain.scoring.plugins.lookup import ENVIRONMENT, list_plugins

    show_plugins("environments", list_plugins(ENVIRONMENT))


@environments_app.command("new")
def environments_new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the function and its file.", show_default=False)],
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where the two files are written.")] = Path(),
) -> None:
    """Write an environment plug-in NAME.py and its test, test_NAME.py, to begin with.

    Example: posttrain environments new second_try
    """
    from posttrain.reward_tools.template import write_plugin

    plugin, test = write_plugin(name, folder, "environment")
    where = shlex.quote(f"{plugin}:{name}")
    typer.echo(f"{plugin}\n{test}\nthen: python -m pytest {shlex.quote(str(test))}")
    typer.echo(f"      posttrain environments try {where} --model MODEL --row prompts.jsonl")


@environments_app.command("install")
def environments_install(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A file with PACKAGES, or reasoning_gym or another adapter.", show_default=False
        ),
    ],
    folder: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="The new interpreter's folder. Default: .venv-NAME.")
    ] = None,
) -> None:
    """Make an interpreter of its own for an environment or a reward: a venv with the packages that its file names.

    Example: posttrain environments install reasoning_gym
    """
    from posttrain.reward_tools.install import install

    python = install(name, folder)
    typer.echo(f"installed; beside its name in the YAML: python: {shlex.quote(str(python))}")


@environments_app.command("try")
def environments_try(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name, module:function or file.py:function.", show_default=False)
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Keys of an eval stage, such as environment.args.max_turns=2."),
    ] = None,
    *,
    model: Annotated[str, typer.Option("--model", metavar="DIR", help="The policy: a model folder.")],
    row: Annotated[str, typer.Option("--row", metavar="FILE[:ID]", help="A row of a file; without an id, the first.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the episode.")] = 0,
) -> None:
    """Watch one episode in the terminal, turn by turn, with a real engine. Exits with 3 if it has no reward.

    Examples:

      posttrain environments try calculator --model runs/quickstart/rl/model --row prompts.jsonl

      posttrain environments try my_world.py:higher_or_lower environment.args.max_turns=3 sampling.max_tokens=100
      --model MODEL --row prompts.jsonl:p7
    """
    from posttrain.context import StageContext
    from posttrain.pipeline.ray_session import ray_session
    from posttrain.reward_tools.episode import checked_episode, episode_config, file_and_id, row_of, try_episode

    file, identity = file_and_id(row)
    config = episode_config(name, model, file, settings=settings or [])
    found = row_of(config, identity)
    flight = checked_episode(config, found)
    typer.echo(f"row {found.id}; the engine starts", err=True)
    with tempfile.TemporaryDirectory() as folder, ray_session():
        context = StageContext("try", Path(folder), Path(folder) / "events.jsonl", seed=seed)
        rollout = try_episode(config, flight, context, heard=_Printer(len(found.messages)))
    typer.echo("\n".join(episode_lines(rollout)))
    if rollout.scored is None or rollout.scored.result is None:
        raise typer.Exit(EXIT_FAILED)


class _Printer:
    """Prints each turn when it is heard. num_prompt: how many turns the prompt has."""

    def __init__(self, num_prompt: int):
        self._num_prompt = num_prompt
        self._num_turns = 0

    def __call__(self, place: int, message: "Message") -> None:
        from posttrain.data.transcript import message_text

        if place == 0:
            if self._num_turns:
                typer.echo(
                    "\n--- another conversation: a second agent's, or after a loss the episode begins again ---\n"
                )
            self._num_turns = 0
        who = message.role
        if place >= self._num_prompt and message.role == "assistant":
            self._num_turns += 1
            who = f"policy, turn {self._num_turns}"
        typer.echo(f"[{who}]\n{printable(message_text(message))}\n")


def printable(text: str) -> str:
    """The text with every sign that could steer a terminal replaced."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in text)


def episode_lines(rollout: "Rollout") -> list[str]:
    """How an episode ended: its reward with the reason, or why it has none, and what its parts are."""
    scored, branches = rollout.scored, len(rollout.branches)
    sampled = f"{rollout.num_sampled} tokens sampled" + (f" in {branches} branches" if branches > 1 else "")
    if scored is None or scored.result is None:
        why = "" if scored is None else f"{scored.outcome}: {printable(scored.reason)}"
        return [f"no reward: {why}", sampled]
    result = scored.result
    reason = f" ({printable(result.reason)})" if result.reason else ""
    parts = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in result.parts.items())
    return [f"reward {result.value:g}{reason}", parts, f"{sampled}; ended by {rollout.finish_reason}"]
