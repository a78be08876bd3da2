"""Sampled rollouts to browse: prompt, reply, reward with its reason, and the policy version of each token.

An episode of several turns is shown as a conversation: of each segment who spoke, whether it was trained on, and what
it was paid.
"""

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from posttrain.data.formats import json_list
from posttrain.data.messages import RowError, to_messages
from posttrain.data.transcript import message_text
from posttrain.metrics.correctness import is_right
from posttrain.records import ContentPart, ImagePart, Message, TextPart, turn_part
from posttrain.report.blocks import Leaf, Section
from posttrain.report.format import count
from posttrain.report.pictures import Thumbnails
from posttrain.report.read import Run, Stage, mapping, number

SAMPLE = 150
MAX_CHARS = 6000  # of a text; of all turns of an episode together, if they have more than MIN_CHARS each
MIN_CHARS = 400
MAX_TURNS = 60
LIGHT = ("step", "capability", "status", "reward", "versions")


def rollouts_section(run: Run, stage: Stage) -> Section | None:
    """The section, or None if the stage kept no rollouts."""
    total, rows, unreadable = sample_rollouts(stage.dir / "rollouts", SAMPLE, stage.setting("reward.correct_threshold"))
    if not rows:
        return None
    thumbnails = Thumbnails(stage.dir)
    leaves = [_leaf(row, stage.setting("reward.correct_threshold"), thumbnails) for row in rows]
    text = f"{count(len(leaves))} of {count(total)} rollouts from all steps, capabilities and outcomes, oldest first."
    lead = [text, *([f"{unreadable} rollout file(s) could not be read."] if unreadable else [])]
    return Section(f"{stage.name}-rollouts", "Rollouts", [Leaf(leaves, thumbnails.urls)], lead)


def sample_rollouts(folder: Path, amount: int, threshold: float | None) -> tuple[int, list[dict[str, Any]], int]:
    """(number of rollouts, `amount` of them in order of training, number of files that could not be read).

    Rollouts are sorted into kinds by status, capability, right or wrong, and one policy version or several. Each kind
    gets its share of the sample, which is spread evenly over the steps. Only the sampled rows are read in full.
    """
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    kinds: dict[tuple, list[tuple[float, Path, int]]] = defaultdict(list)
    total = unreadable = 0
    for path in sorted(folder.glob("*.parquet")):
        try:
            with parquet.ParquetFile(path) as file:
                light = file.read([name for name in LIGHT if name in file.schema_arrow.names]).to_pylist()
        except (OSError, arrow.ArrowException):
            unreadable += 1
            continue
        for i, row in enumerate(light):
            reward = number(row.get("reward"))
            right = _right(reward, threshold)
            several = len(versions_of(row.get("versions"))) > 1
            kind = (str(row.get("status") or ""), str(row.get("capability") or ""), str(right), several)
            kinds[kind].append((number(row.get("step")) or float(i), path, i))
        total += len(light)
    wanted: dict[Path, list[int]] = defaultdict(list)
    for _, path, i in _pick(list(kinds.values()), amount):
        wanted[path].append(i)
    rows = []
    for path, places in wanted.items():
        with parquet.ParquetFile(path) as file:
            rows.extend(file.read().take(sorted(places)).to_pylist())
    return total, sorted(rows, key=_order), unreadable


def _pick(kinds: list[list[tuple[float, Path, int]]], amount: int) -> list[tuple[float, Path, int]]:
    """Sample `amount` rollouts, evenly from all kinds. If a kind has fewer, the others get more."""
    picked = []
    for done, kind in enumerate(sorted(kinds, key=len)):
        share = min(len(kind), round((amount - len(picked)) / (len(kinds) - done)))
        ordered = sorted(kind, key=lambda place: (place[0], str(place[1]), place[2]))
        picked.extend(ordered[i * len(ordered) // share] for i in range(share))
    return picked


def _order(row: Mapping[str, object]) -> tuple[float, float, str, float]:
    """Sort key. It begins with the policy version that sampled the rollout, because a dropped rollout has no step."""
    version = number(row.get("policy_version"))
    step = number(row.get("step"))
    return (
        version if version is not None else -1.0,
        step if step is not None else -1.0,
        str(row.get("group_id") or ""),
        number(row.get("index")) or 0.0,
    )


def versions_of(text: object) -> list[tuple[int, int, int]]:
    """[(policy version, start, end), ...] from a versions column; [] if the column does not hold that."""
    spans = _json(text)
    if not isinstance(spans, list):
        return []
    whole = [s for s in spans if isinstance(s, list | tuple) and len(s) == 3 and all(number(v) is not None for v in s)]
    return [(int(version), int(start), int(end)) for version, start, end in whole]


def _right(reward: float | None, threshold: float | None) -> bool | None:
    """Whether the reply is right; None without a reward, or without a threshold for it in the config of the stage."""
    return None if reward is None or threshold is None else is_right(reward, threshold)


def _leaf(row: Mapping[str, object], threshold: float | None, thumbnails: Thumbnails) -> dict[str, Any]:
    """One rollout in the form that page.js shows. All values are plain text, and page.js inserts them as text."""
    reward = number(row.get("reward"))
    return {
        "prompt": _shown_prompt(_prompt(row.get("prompt")), thumbnails),
        **_conversation(row),
        "reward": reward,
        "right": _right(reward, threshold),
        "reason": _short(row.get("reason")),
        "capability": str(row.get("capability") or ""),
        "status": str(row.get("status") or ""),
        "step": number(row.get("step")),
        "version": number(row.get("policy_version")),
        "staleness": number(row.get("staleness")),
        "advantage": number(row.get("advantage")),
        "finish": str(row.get("finish_reason") or ""),
        "tokens": number(row.get("num_tokens")),
        "prompt_id": str(row.get("prompt_id") or ""),
    }


def _prompt(column: object) -> tuple[Message, ...]:
    """The messages of a prompt column; text that holds no messages becomes one message."""
    try:
        return to_messages(json_list(column) if isinstance(column, str) else column, "prompt")
    except RowError:
        return (Message("user", str(column or "")),)


def _shown_prompt(turns: Sequence[Message], thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """The turns as {"role", "content"}, and "pictures" for a turn that shows some: their keys in order, or None for one
    without an image. In the content the numbers of pictures stand in their places."""
    shown, numbers = [], itertools.count(1)
    for turn in turns:
        keys: list[str | None] = []
        if not isinstance(turn.content, str):
            parts: list[ContentPart] = []
            for part in turn.content:
                if isinstance(part, ImagePart):
                    key = part.image or ""
                    keys.append(key if thumbnails.add(key) else None)
                    part = TextPart(f"[picture {next(numbers)}]")
                parts.append(part)
            turn = replace(turn, content=tuple(parts))
        item: dict[str, Any] = {"role": turn.role, "content": _short(message_text(turn))}
        shown.append({**item, "pictures": keys} if keys else item)
    return shown


def _conversation(row: Mapping[str, object]) -> dict[str, Any]:
    """{"turns": what followed the prompt, "hidden": how many turns more there were}. A turn is {"number", "pieces",
    "trained", "reward", "advantage", "keeps"}.

    number: of a turn of the policy, from 1; None for what the world said. pieces: see `_pieces`. trained: whether the
    policy was trained on it. advantage: its own, if turns have one. keeps: where a new branch begins, the number of
    earlier tokens that it keeps.
    """
    places, texts = _segments(row), _json(row.get("tokens"))
    if len(places) < 2 or not isinstance(texts, list):
        unknown = dict.fromkeys(("reward", "advantage", "keeps"))
        turn = {"number": 1, "pieces": _pieces(row), "trained": _is_trained(row), **unknown}
        return {"turns": [turn], "hidden": 0}
    texts = _readable([str(text) for text in texts], str(row.get("reply") or ""))
    spans = versions_of(row.get("versions"))
    limit = max(MIN_CHARS, MAX_CHARS // len(places))
    paid, advantages = mapping(_json(row.get("parts"))), row.get("turn_advantages")
    advantages = advantages if isinstance(advantages, list) else []
    turns, number_of_turn = [], 0
    for start, end, trained, *keeps in places:
        own = [span for span in spans if start <= span[1] < end]
        number_of_turn += bool(own)
        pieces = [(version, max(a, start), min(b, end)) for version, a, b in own] or [(None, start, end)]
        turns.append({
            "number": number_of_turn if own else None,
            "pieces": [{"v": v, "text": _short("".join(texts[a:b]), limit), "n": b - a} for v, a, b in pieces],
            "trained": trained and _is_trained(row),
            "reward": number(paid.get(turn_part(number_of_turn))) if own else None,
            "advantage": number(advantages[number_of_turn - 1]) if own and number_of_turn <= len(advantages) else None,
            "keeps": keeps[0] if keeps else None,
        })  # fmt: skip
    return {"turns": turns[:MAX_TURNS], "hidden": len(turns[MAX_TURNS:])}


def _is_trained(row: Mapping[str, object]) -> bool:
    return row.get("status") == "trained" and row.get("advantage") is not None


def _segments(row: Mapping[str, object]) -> list[list[Any]]:
    """[[start, end, whether it may be trained on, perhaps `Segment.keeps`], ...]; [] if the column holds no such."""
    places = _json(row.get("segments"))
    if not isinstance(places, list):
        return []
    whole = [place for place in places if isinstance(place, list) and len(place) in (3, 4)]
    if any(number(value) is None for place in whole for value in (*place[:2], *place[3:])):
        return []
    return [[int(start), int(end), bool(trained), *map(int, keeps)] for start, end, trained, *keeps in whole]


def _pieces(row: Mapping[str, object]) -> list[dict[str, Any]]:
    """The parts of a reply by policy version: {"v": version or None, "text": ..., "n": number of tokens}.

    Without the texts of the tokens, a reply of several versions cannot be divided: it is one part with version None.
    """
    spans = versions_of(row.get("versions"))
    reply = str(row.get("reply") or "")
    if len(spans) == 1:
        return [{"v": spans[0][0], "text": _short(reply), "n": spans[0][2] - spans[0][1]}]
    tokens = _json(row.get("tokens"))
    if isinstance(tokens, list) and tokens and spans:
        texts = _readable([str(token) for token in tokens], reply)
        return [{"v": v, "text": _short("".join(texts[a:b])), "n": b - a} for v, a, b in spans]
    pieces = [{"v": None, "text": _short(reply), "n": None}]
    return pieces + [{"v": v, "text": "", "n": end - start} for v, start, end in spans]


def _readable(tokens: Sequence[str], reply: str) -> list[str]:
    """Token texts with the marks of byte-level tokenizers replaced by the space or new line that they stand for."""
    if "".join(tokens).startswith(reply[:40]):
        return list(tokens)
    return [token.replace("Ġ", " ").replace("Ċ", "\n") for token in tokens]


def _json(text: object) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return None


def _short(text: object, limit: int = MAX_CHARS) -> str:
    whole = str(text or "")
    return whole if len(whole) <= limit else whole[:limit] + f" … ({len(whole) - limit} more characters)"
