"""`posttrain rewards`: list rewards, try one without an engine, audit it for ways to be fooled, begin a new one."""

import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.errors import EXIT_FAILED, ConfigError

if TYPE_CHECKING:
    from posttrain.config.rewards import RewardConfig
    from posttrain.reward_tools.audit import Audit, Finding
    from posttrain.reward_tools.trial import Tried
    from posttrain.scoring.plugins.lookup import PluginInfo
    from posttrain.scoring.pool.stats import PoolStats

rewards_app = typer.Typer(no_args_is_help=True, help="Reward plug-ins: list, test, audit, begin a new one.")

Reward = Annotated[
    str, typer.Argument(metavar="REWARD", help="A name, module:function or file.py:function.", show_default=False)
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Keys of a reward section, such as args.partial=true workers=2."),
]
On = Annotated[str, typer.Option("--on", metavar="FILE", help="Prompts with their answers: a file or folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SHOWN = 60


@rewards_app.command("list")
def rewards_list() -> None:
    """List the registered rewards: name, what it does, and where the function is."""
    from posttrain.scoring.plugins.lookup import REWARD, list_plugins

    show_plugins("rewards", list_plugins(REWARD))


def show_plugins(what: str, found: "Sequence[PluginInfo]") -> None:
    """Print one line for each registered plug-in. what: the plug-ins in a word, such as "rewards"."""
    width = max((len(info.name) for info in found), default=0)
    for info in found:
        typer.echo(f"{info.name:<{width}}  {info.summary}  ({info.where})")
    if not found:
        typer.echo(f"no {what} are registered; is the package installed? (pip install -e .)", err=True)


@rewards_app.command("test")
def rewards_test(
    reward: Reward,
    on: On,
    settings: Settings = None,
    *,
    replies: Annotated[
        str | None,
        typer.Option("--replies", metavar="FILE", help='Lines {"id": row, "reply": text}; or rollouts of a run.'),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Score replies with a reward, in its killable processes and with its limits, but without any engine.

    Without --replies, the replies are each row's own answer, stated in several ways, and an empty reply. Exits with 3
    if a reply could not be scored.

    Examples:

      posttrain rewards test math --on prompts.jsonl

      posttrain rewards test my_rewards.py:polite args.weight=0.2 --on prompts.jsonl --replies replies.jsonl
    """
    from posttrain.reward_tools.audit import own_answers
    from posttrain.reward_tools.controls import forms_with
    from posttrain.reward_tools.trial import replies_of, reply_to, rows_of, score

    config = _config(reward, settings)
    rows = rows_of(on, config)
    if replies is not None:
        asked = replies_of(replies, rows)
    else:
        own = own_answers(rows, forms_with(config.args))
        asked = [(f"own answer as {form}", row, rollout) for form, row, rollout in own]
        asked += [("an empty reply", row, reply_to(row, "")) for row in rows]
    if not asked:
        raise ConfigError("--replies", [f"{replies} holds no replies"])
    tried = score(asked, config, _tell)
    found = _counts(tried, config.correct_threshold, by_source=replies is None)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo("\n".join(_test_lines(reward, len(rows), found, tried=tried)))
    if found["unscored"]:
        raise typer.Exit(EXIT_FAILED)


def _counts(tried: "Sequence[Tried]", threshold: float, *, by_source: bool) -> dict[str, Any]:
    from posttrain.reward_tools.trial import unscored_kinds

    values = [item.value for item in tried if item.value is not None]
    found: dict[str, Any] = {
        "replies": len(tried),
        "scored": len(values),
        "unscored": len(tried) - len(values),
        "kinds": unscored_kinds(tried),
        "right": sum(item.is_right(threshold) for item in tried),
        "threshold": threshold,
        "mean": sum(values) / len(values) if values else None,
        "values": {f"{value:g}": count for value, count in Counter(values).most_common(5)},
        "slowest_s": round(max((item.scored.wall_s for item in tried), default=0.0), 3),
    }
    if by_source:
        of = Counter(item.what for item in tried)
        right = Counter(item.what for item in tried if item.is_right(threshold))
        found["sources"] = {name: {"right": right[name], "of": count} for name, count in of.items()}
    return found


def _test_lines(reward: str, rows: int, found: dict[str, Any], *, tried: "Sequence[Tried]") -> list[str]:
    from posttrain.metrics.unscored import kinds_text

    kinds = f" ({kinds_text(found['kinds'])})" if found["unscored"] else ""
    lines = [
        f"reward {reward} on {rows} rows: {found['replies']} replies, {found['scored']} scored, "
        f"{found['unscored']} could not be scored{kinds}"
    ]
    if found["scored"]:
        often = ", ".join(f"{value} ({count})" for value, count in found["values"].items())
        lines.append(f"right (at least {found['threshold']:g}): {found['right']} of {found['scored']}")
        lines.append(f"mean reward {found['mean']:.3f}; most frequent {often}")
    lines += [f"  {name}: {n['right']} of {n['of']} right" for name, n in found.get("sources", {}).items()]
    lines.append("examples")
    return [*lines, *(f"  {_shown(item)}" for item in _examples(tried))]


def _examples(tried: "Sequence[Tried]") -> "list[Tried]":
    """At most ten replies: two for each score and for each reason that there is none. Unscored replies come first."""
    by_kind: dict[tuple[Any, ...], list[Tried]] = {}
    for item in tried:
        by_kind.setdefault((item.value is not None, item.why if item.value is None else item.value), []).append(item)
    ordered = sorted(by_kind.items(), key=lambda entry: entry[0][0])
    return [item for _, items in ordered for item in items[:2]][:10]


def _shown(item: "Tried") -> str:
    text = item.text if len(item.text) <= SHOWN else item.text[: SHOWN - 1] + "…"
    value = "no score" if item.value is None else f"{item.value:g}"
    return f"row {item.row.id}: {value} for {text!r}" + (f" ({item.why})" if item.why else "")


@rewards_app.command("audit")
def rewards_audit(
    reward: Reward,
    on: On,
    settings: Settings = None,
    *,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to try, spread over the file.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Find out whether a reward can be fooled, without any engine. Exits with 3 if it can.

    Each row's own answer, stated plainly, must be right. These must be wrong: an empty reply, ":", the prompt, every
    candidate listed, another row's answer, hedges, look-alikes, forged verdicts and tags, programs that exit, wrong
    types.

    Examples:

      posttrain rewards audit math --on prompts.jsonl

      posttrain rewards audit my_rewards.py:polite args.weight=0.2 --on prompts.jsonl --rows 50
    """
    from posttrain.reward_tools.audit import audit
    from posttrain.reward_tools.trial import rows_of

    config = _config(reward, settings)
    everything = rows_of(on, config)
    step = max(1, len(everything) // rows)
    found = audit(config, everything[::step][:rows], everything, tell=_tell)
    typer.echo(json.dumps(found.to_json(), indent=2) if as_json else "\n".join(_audit_lines(reward, found)))
    if not found.is_sound:
        raise typer.Exit(EXIT_FAILED)


def _audit_lines(reward: str, found: "Audit") -> list[str]:
    lines = [f"reward {reward}: {found.replies} replies to {found.rows} rows"]
    if found.with_answer:
        forms = ", ".join(f"{name} ({count})" for name, count in found.accepted.items())
        right = found.with_answer - len(found.refused)
        lines.append(f"the row's own answer is right in {right} of {found.with_answer} rows; stated as: {forms or '-'}")
    lines += [f"  refused: {_shown(item)}" for item in found.refused[:3]]
    lines += [_finding("fooled by", finding) for finding in found.fooled]
    lines += [_finding("no score for", finding) for finding in found.unscored]
    if found.passed:
        lines.append(f"called wrong, as they must be: {', '.join(found.passed)}")
    return [*lines, f"verdict: {found.verdict}"]


def _finding(what: str, finding: "Finding") -> str:
    return f"  {what} {finding.control}, {finding.count} of {finding.of}: {_shown(finding.example)}"


@rewards_app.command("new")
def rewards_new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the function and its file.", show_default=False)],
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where the two files are written.")] = Path(),
) -> None:
    """Write a reward plug-in NAME.py and its test, test_NAME.py, to begin with.

    Example: posttrain rewards new right_and_brief
    """
    from posttrain.reward_tools.template import write_plugin

    plugin, test = write_plugin(name, folder)
    where = shlex.quote(f"{plugin}:{name}")
    typer.echo(f"{plugin}\n{test}\nthen: python -m pytest {shlex.quote(str(test))}")
    typer.echo(f"      posttrain rewards audit {where} --on prompts.jsonl")


def _config(reward: str, settings: list[str] | None) -> "RewardConfig":
    from posttrain.config.base import apply_overrides, validate_config
    from posttrain.config.rewards import RewardConfig

    return validate_config(RewardConfig, apply_overrides({"name": reward}, settings or []), "reward")


def _tell(done: int, total: int, stats: "PoolStats") -> None:
    """Print progress on standard error, so that the user notices a reward that hangs."""
    late = f" · reward: {stats.lateness}" if stats.lateness else ""
    print(f"scored {done}/{total}{late}", file=sys.stderr, flush=True)
