"""Return an interrupted run to its last commit, with all its parts."""

import json
from typing import Any

from posttrain.context import StageContext
from posttrain.files import keep_lines
from posttrain.rl.history.recovery import (
    Survivor,
    group_of,
    last_checkpoint,
    scored_from_json,
    survivors,
    version_of,
)
from posttrain.rl.loop.parts import Parts
from posttrain.rl.prompts.config import PromptsConfig
from posttrain.rl.records import GroupState


def resume(config: PromptsConfig, context: StageContext, parts: Parts) -> tuple[int, list[Survivor]]:
    """Return to the last commit. Returns its version, 0 for a new run, and the groups that can continue.

    Ledger, archive and metrics lose what came after the commit. The prompt source gets the place and the beliefs that
    it had when the run ended.
    """
    ledger, source, archive = parts.ledger, parts.source, parts.archive
    if not ledger.next_order:
        return 0, []
    checkpoint = last_checkpoint(context.dir, ledger)
    state: dict[str, Any] = {"seq": 0, "next_order": 0}
    first_step = 0
    if checkpoint is not None:
        state = parts.trainer.load_checkpoint(checkpoint)
        first_step = version_of(checkpoint)
        source.restore(state["source"])
    undone = ledger.roll_back(first_step)
    if config.deterministic:
        ledger.forget_from(state["next_order"])
    archive.forget_after(first_step - 1)
    keep_lines(context.dir / "metrics.jsonl", lambda line: line["step"] < first_step)
    for entry in ledger.entries():
        source.was_drawn(entry.capability, entry.prompt_id, entry.prompts_seen)
    for entry in ledger.entries((GroupState.SCORED, GroupState.DROPPED), with_data=True):
        if entry.scores is None or entry.data is None:
            continue
        scored = scored_from_json(group_of(entry, source), json.loads(entry.scores))
        if entry.scored_seq is not None and entry.scored_seq > state["seq"]:
            source.observe(scored, config.reward.correct_threshold, config.first_replies)
        if entry.state == GroupState.DROPPED:
            archive.add(scored, step=None, trainer_version=first_step, status=f"dropped:{entry.reason}")
    left = survivors(ledger, source, first_step)
    context.event("resumed", step=first_step, groups=len(left))
    if undone.steps:
        context.event("rolled_back", steps=undone.steps, groups=undone.groups)
    return first_step, left
