"""Mine preference pairs from the rollouts of an RL stage: mistakes that the policy itself made.

Both replies of a pair answer the same prompt: the same messages, with the same system instruction. The chosen reply is
complete and has a high reward. The rejected reply is complete with a lower reward (`wrong`), or it ran out of tokens
(`truncated`). Replies of newer policy versions are preferred, so that the pairs are close to the policy that is
trained. Pairs are taken from each capability in turn.

Left out: any judgement of quality besides the reward, pairs from different prompts, and episodes, whose replies follow
on different turns of the world.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.messages import RowError, to_messages
from posttrain.data.pairs import Pair
from posttrain.data.turns import check_turns
from posttrain.dpo.config import MiningConfig
from posttrain.errors import DataError, StageError

LATER = ("tools", "parts")  # files of older versions lack them
COLUMNS = ("step", "prompt_id", "capability", "prompt", "reply", "reward", "finish_reason", "policy_version")


@dataclass(frozen=True, slots=True)
class Reply:
    """The columns of one rollout that mining reads. prompt: its messages as JSON. reward: None if it was not scored.
    tools: the schemas that the row declares, as JSON; "" if it declares none."""

    prompt_id: str
    capability: str
    prompt: str
    text: str
    reward: float | None
    complete: bool
    policy_version: int
    tools: str = ""


def read_replies(folder: str | Path) -> list[Reply]:
    """Read the rollouts/*.parquet of an RL stage, without its episodes.

    Raises `DataError` if there are none or a column is missing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder).expanduser()
    files = sorted(folder.glob("*.parquet")) or sorted((folder / "rollouts").glob("*.parquet"))
    if not files:
        raise DataError(f"{folder}: no rollouts (*.parquet); set `rollouts` to the rollouts folder of an RL stage")
    replies: list[Reply] = []
    for file in files:
        try:
            names = pq.read_schema(file).names
            missing = [name for name in COLUMNS if name not in names]
            if missing:
                raise DataError(
                    f"{file}: no column {', '.join(missing)}; the file does not hold rollouts of an RL stage"
                )
            columns = [*COLUMNS, *(name for name in LATER if name in names)]
            records = pq.read_table(file, columns=columns).to_pylist()
        except pa.ArrowException as error:
            raise DataError(f"{file}: not a whole parquet file: {error}") from None
        replies += [_to_reply(record) for record in records if not _is_episode(record)]
    if not replies:
        raise DataError(
            f"{folder}: all rollouts are episodes, and a pair compares single replies; set `pairs` to pairs of your own"
        )
    return replies


def _is_episode(record: dict[str, Any]) -> bool:
    return "turns" in json.loads(record.get("parts") or "{}")


def _to_reply(record: dict[str, Any]) -> Reply:
    return Reply(
        prompt_id=record["prompt_id"],
        capability=record["capability"],
        prompt=record["prompt"],
        text=record["reply"].strip(),
        reward=record["reward"],
        complete=record["finish_reason"] == "stop",
        policy_version=record["policy_version"],
        tools=record.get("tools") or "",
    )


def mine(replies: Sequence[Reply], config: MiningConfig, max_pairs: int | None, *, seed: int) -> list[Pair]:
    """Make preference pairs. Raises `StageError`, with counts, if no pair can be made.

    The fields of each pair are `reason` (wrong or truncated), `chosen_reward`, `rejected_reward`, and `policy_version`,
    the older one of its two replies.
    """
    rng = random.Random(seed)
    by_prompt: dict[tuple[str, str], list[Reply]] = defaultdict(list)
    for reply in replies:
        by_prompt[reply.prompt, reply.tools].append(reply)
    by_capability: dict[str, list[Pair]] = defaultdict(list)
    # How many pairs there are of each prompt id and version so far. Prompts of one id can differ in the system
    # instruction that was drawn for their group.
    ids: Counter[str] = Counter()
    for (prompt, _), group in by_prompt.items():
        for pair in _pairs_of_prompt(prompt, group, config, rng=rng, ids=ids):
            by_capability[pair.capability].append(pair)
    if not by_capability:
        raise StageError(_nothing_to_mine(by_prompt, config))
    for pairs in by_capability.values():
        rng.shuffle(pairs)
        pairs.sort(key=lambda pair: -pair.fields["policy_version"])
    return list(_take_turns(by_capability, max_pairs))


def _pairs_of_prompt(
    prompt: str, group: Sequence[Reply], config: MiningConfig, *, rng: random.Random, ids: Counter[str]
) -> Iterator[Pair]:
    chosen_pool = _newest_first((r for r in group if r.complete and r.reward is not None and r.text), rng)
    chosen_pool.sort(key=lambda reply: -(reply.reward or 0.0))  # the highest reward first; of equal ones the newest
    rejected_pool = _newest_first((r for r in group if _reason(r) in config.reasons and r.text), rng)
    used: set[str] = set()  # texts, so that equal replies count as one
    count = 0
    for chosen in chosen_pool:
        if count == config.max_per_prompt:
            return
        if chosen.text in used:
            continue
        rivals = (r for r in rejected_pool if r.text not in used and _beats(chosen, r, config.min_margin))
        rejected = next(rivals, None)
        if rejected is None:
            return
        used |= {chosen.text, rejected.text}
        yield _to_pair(prompt, chosen, rejected, ids=ids)
        count += 1


def _newest_first(replies: Iterable[Reply], rng: random.Random) -> list[Reply]:
    """Replies with distinct texts, the newest policy version first, in random order within a version."""
    shuffled = list(replies)
    rng.shuffle(shuffled)
    shuffled.sort(key=lambda reply: -reply.policy_version)
    distinct: dict[tuple[str, bool], Reply] = {}
    for reply in shuffled:
        distinct.setdefault((reply.text, reply.complete), reply)
    return list(distinct.values())


def _reason(reply: Reply) -> str | None:
    """The reason for which a reply may be rejected; None if it cannot be: a complete reply without a reward."""
    if not reply.complete:
        return "truncated"
    return None if reply.reward is None else "wrong"


def _beats(chosen: Reply, rejected: Reply, margin: float) -> bool:
    """True if the rewards differ by `margin` or more. A truncated reply without a reward counts as 0."""
    return chosen.text != rejected.text and (chosen.reward or 0.0) - (rejected.reward or 0.0) >= margin


def _to_pair(prompt: str, chosen: Reply, rejected: Reply, *, ids: Counter[str]) -> Pair:
    try:
        messages = to_messages(json.loads(prompt), "prompt")
        check_turns(messages, "prompt", "prompt")
    except (RowError, ValueError) as error:
        raise DataError(f"rollouts of prompt {chosen.prompt_id!r}: {error}") from None
    version = min(chosen.policy_version, rejected.policy_version)
    stem = f"{chosen.prompt_id}:{version}"
    ids[stem] += 1
    return Pair(
        id=f"{stem}:{ids[stem] - 1}",
        capability=chosen.capability,
        prompt=messages,
        chosen=chosen.text,
        rejected=rejected.text,
        fields={
            "reason": _reason(rejected),
            "chosen_reward": chosen.reward,
            "rejected_reward": rejected.reward,
            "policy_version": version,
            **({"tools": json.loads(chosen.tools)} if chosen.tools else {}),
        },
    )


def _take_turns(by_capability: dict[str, list[Pair]], max_pairs: int | None) -> Iterator[Pair]:
    """One pair of each capability in turn, up to `max_pairs`."""
    queues = [iter(by_capability[name]) for name in sorted(by_capability)]
    taken = 0
    while queues:
        for queue in list(queues):
            if max_pairs is not None and taken == max_pairs:
                return
            pair = next(queue, None)
            if pair is None:
                queues.remove(queue)
            else:
                taken += 1
                yield pair


def _nothing_to_mine(by_prompt: Mapping[Any, list[Reply]], config: MiningConfig) -> str:
    replies = [reply for group in by_prompt.values() for reply in group]
    scored = [reply for reply in replies if reply.reward is not None]
    complete = [reply for reply in scored if reply.complete]
    with_spread = sum(_has_spread(group, config.min_margin) for group in by_prompt.values())
    return (
        f"dpo: no preference pair can be mined from {len(replies)} rollouts of {len(by_prompt)} prompts: "
        f"{len(scored)} are scored, {len(complete)} of them complete; prompts whose rewards differ by "
        f"mining.min_margin ({config.min_margin}) or more: {with_spread}; reasons allowed: {', '.join(config.reasons)}"
    )


def _has_spread(group: Sequence[Reply], margin: float) -> bool:
    rewards = [reply.reward or 0.0 for reply in group if _reason(reply) is not None]
    return bool(rewards) and max(rewards) - min(rewards) >= margin
