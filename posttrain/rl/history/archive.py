"""The archive: every rollout that was trained on or dropped, in parquet files, one file for each optimizer step.

A row is a rollout. The rows with status "trained" hold all that the step was trained on, in order, so the step can be
done again from them.

`token_ids` are the tokens after the prompt, those of all branches one after the other. Places in `versions` and
`segments` count these tokens from 0. `sampler_logprobs` has one entry for each of them, null for a token that was not
sampled (the result of a tool, for example). `ref_logprobs` has one entry for each trained token. Example of a reply of
three tokens, the last one sampled by version 5 and the others by version 4:

    versions = [[4, 0, 2], [5, 2, 3]]   segments = [[0, 3, true]]   sampler_logprobs = [-0.1, -2.3, -0.7]

`turn_advantages` has one entry for each turn of the policy if they differ from `advantage` (`advantage_per: turn`).
`parts` holds the parts of an episode's reward (`RewardResult.parts`), such as {"turn 1": 0.25, "turns": 2}. It is null
for a rollout without an environment.

A segment that begins a new branch has a fourth entry: of all tokens before it, with the prompt's, the policy still sees
so many (`Segment.keeps`).
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from posttrain.data.images.render import pictures_of
from posttrain.data.messages import messages_to_json, to_messages
from posttrain.data.tokenizer import Tokenizer
from posttrain.data.turns import tools_of
from posttrain.errors import CheckpointError
from posttrain.files import replacing
from posttrain.records import FinishReason, Media, Prompt, Rollout, Segment, VersionSpan
from posttrain.rl.records import Group, ScoredGroup

# The version of the columns. It is kept in the schema's metadata under FORMAT_KEY.
FORMAT = "2"
FORMAT_KEY = b"posttrain.rollouts"
_json = msgspec.json.Encoder()


class _Decided(Struct, frozen=True):
    """The arguments of one call of `RolloutArchive.add`."""

    scored: ScoredGroup
    step: int | None
    trainer_version: int
    status: str


class RolloutArchive:
    """Collects the groups that were trained on or dropped, and writes them to a file when a step is done.

    A thread writes the files, one after another, so that nobody waits for the disk but `wait` and `written`.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._decided: list[_Decided] = []
        self._pieces = _Pieces(tokenizer)
        self._thread = ThreadPoolExecutor(1, "archive")
        self._writing: Future[None] | None = None

    def add(self, scored: ScoredGroup, *, step: int | None, trainer_version: int, status: str) -> None:
        """Collect a group.

        status: "trained" or "dropped:<reason>". step: the optimizer step that trained on it, or None. trainer_version:
        the trainer's policy version at that time, from which the staleness of a rollout is computed.
        """
        self._decided.append(_Decided(scored, step, trainer_version, status))

    def write(self, step: int) -> None:
        """Begin to write the groups that were collected since the last call to the file of this step.

        Waits for the file of the last call first, and raises what its writing raised.
        """
        self.wait()
        if self._decided:
            decided, self._decided = self._decided, []
            self._writing = self._thread.submit(self._write, step, decided)

    def wait(self) -> None:
        """Wait until the files of all calls of `write` are on the disk. Raises what their writing raised."""
        if self._writing is not None:
            self._writing.result()

    async def written(self) -> None:
        """As `wait`, for an event loop. Cancelling this does not cancel the writing."""
        if self._writing is not None:
            await asyncio.shield(asyncio.wrap_future(self._writing))

    def close(self) -> None:
        """End the thread, once it has written the file that it was given. Groups that `write` did not take are lost."""
        self._thread.shutdown()

    def _write(self, step: int, decided: Sequence[_Decided]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = _schema(pa)

        def arrays(columns: Mapping[str, list[Any]]) -> dict[str, Any]:
            return {name: pa.array(values, schema.field(name).type) for name, values in columns.items()}

        # What the rollouts of a group share is converted once, most of all the token ids of the prompt.
        group_of_each = pa.array([at for at, item in enumerate(decided) for _ in item.scored.group.rollouts])
        shared = {name: array.take(group_of_each) for name, array in arrays(_of_groups(decided)).items()}
        columns = {**shared, **arrays(self._of_rollouts(decided))}
        with replacing(self._folder / f"step_{step:06d}.parquet") as aside:
            pq.write_table(pa.table([columns[name] for name in schema.names], schema=schema), aside)

    def _of_rollouts(self, decided: Sequence[_Decided]) -> dict[str, list[Any]]:
        """The columns that have a value of its own for every rollout."""
        rollouts = [rollout for item in decided for rollout in item.scored.group.rollouts]
        oldest = [rollout.oldest_version for rollout in rollouts]  # an episode may fail before it samples
        ids = [rollout.token_ids for rollout in rollouts]
        trained_at = [_trained_at(item) for item in decided for _ in item.scored.group.rollouts]

        def of_each(values: Callable[[ScoredGroup], Sequence[object]]) -> list[Any]:
            return [value for item in decided for value in values(item.scored)]

        return {
            "index": [rollout.index for rollout in rollouts],
            "reply": [rollout.text for rollout in rollouts],
            "reward": of_each(lambda scored: scored.rewards),
            "reason": of_each(lambda scored: scored.reasons),
            "advantage": of_each(lambda scored: scored.advantages),
            "finish_reason": [rollout.finish_reason for rollout in rollouts],
            "policy_version": oldest,
            "versions": [_versions_json(rollout) for rollout in rollouts],
            "num_tokens": [rollout.num_sampled for rollout in rollouts],
            "staleness": [
                None if at is None or first is None else at - first
                for at, first in zip(trained_at, oldest, strict=True)
            ],
            "tokens": [f"[{', '.join(map(self._pieces.__getitem__, tokens))}]" for tokens in ids],
            "token_ids": ids,
            "segments": [_segments_json(rollout) for rollout in rollouts],
            "sampler_logprobs": [_sampler_logprobs(rollout) for rollout in rollouts],
            "turn_advantages": of_each(_by_turn),
            "parts": [_parts_json(rollout) for rollout in rollouts],
            "ref_logprobs": of_each(lambda scored: scored.ref_logprobs or [()] * len(scored.group.rollouts)),
        }

    def forget_after(self, step: int) -> None:
        """Remove the files of later steps, which a run that resumes after `step` writes again."""
        for path in self._folder.glob("step_*.parquet"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()


def check_archive(path: Path) -> None:
    """Raise CheckpointError for a file of rollouts that another version of this package wrote."""
    import pyarrow.parquet as pq

    found = (pq.read_schema(path).metadata or {}).get(FORMAT_KEY, b"1").decode()
    if found != FORMAT:
        raise CheckpointError(
            f"{path} holds rollouts of format {found}, which another version of posttrain wrote; this version reads "
            f"format {FORMAT}. Use the version that wrote them, or sample them again"
        )


def recorded_rollout(row: Mapping[str, Any]) -> Rollout:
    """The rollout in a row of the archive. Its prompt has token ids and the keys of its pictures; the messages are in
    the row's `prompt`."""
    spans = [VersionSpan(*span) for span in json.loads(row["versions"])]
    segments = []
    for start, end, is_trained, *keeps in json.loads(row["segments"]):
        logprobs = row["sampler_logprobs"][start:end]
        versions = tuple(
            VersionSpan(span.policy_version, span.start - start, span.end - start)
            for span in spans
            if start <= span.start < end
        )
        known = tuple(logprobs) if end > start and None not in logprobs else None
        ids = tuple(row["token_ids"][start:end])
        segments.append(Segment(ids, is_trained, known, versions, keeps[0] if keeps else None))
    return Rollout(
        row["prompt_id"],
        row["group_id"],
        row["index"],
        Prompt((), tuple(row["prompt_ids"]), _media(row.get("prompt") or "")),
        tuple(segments),
        row["reply"],
        FinishReason(row["finish_reason"]),
    )


def _media(prompt: str) -> tuple[Media, ...]:
    """The pictures that the messages of an archived prompt show."""
    if '"image"' not in prompt:  # as for most prompts, which need not be read
        return ()
    return tuple(map(Media, pictures_of(to_messages(json.loads(prompt), "prompt"))))


class _Pieces(dict[int, str]):
    """Token id -> its text as a JSON string. A text is decoded when it is first looked up."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        piece = self[token] = json.dumps(self._tokenizer.decode([token]))
        return piece


def _of_groups(decided: Sequence[_Decided]) -> dict[str, list[Any]]:
    """The columns that all rollouts of a group share, each with one value for every group."""
    groups = [item.scored.group for item in decided]
    return {
        "step": [item.step for item in decided],
        "group_id": [group.rollouts[0].group_id for group in groups],
        "prompt_id": [group.rollouts[0].prompt_id for group in groups],
        "capability": [group.prompt.row.capability for group in groups],
        "prompt": [_prompt_json(group) for group in groups],
        "tools": [_tools_json(group) for group in groups],
        "status": [item.status for item in decided],
        "system": [group.rollouts[0].system for group in groups],
        "prompt_ids": [group.rollouts[0].prompt_ids for group in groups],
    }


def _trained_at(item: _Decided) -> int | None:
    """The version of the trainer that trained on the group, or None."""
    return None if item.step is None else item.trainer_version


def _prompt_json(group: Group) -> str:
    return _json.encode(messages_to_json(group.prompt.prompt.messages)).decode()


def _by_turn(scored: ScoredGroup) -> Sequence[Sequence[float]]:
    return scored.turn_advantages or [()] * len(scored.group.rollouts)


def _parts_json(rollout: Rollout) -> str | None:
    result = rollout.scored.result if rollout.scored is not None else None
    return None if result is None else _json.encode(result.parts).decode()


def _versions_json(rollout: Rollout) -> str:
    """The spans of sampled tokens: [[policy version, start, end], ...]."""
    spans = [
        f"[{span.policy_version},{start + span.start},{start + span.end}]"
        for start, segment in _placed(rollout)
        for span in segment.versions
    ]
    return f"[{','.join(spans)}]"


def _segments_json(rollout: Rollout) -> str:
    """All segments: [[start, end, whether it is trained on], ...], with `keeps` at the end where a branch begins."""
    places = [
        [start, start + len(segment.token_ids), segment.trained, *([] if segment.keeps is None else [segment.keeps])]
        for start, segment in _placed(rollout)
    ]
    return _json.encode(places).decode()


def _placed(rollout: Rollout) -> Iterator[tuple[int, Segment]]:
    """Each segment with the place of its first token, counted from the end of the prompt."""
    start = 0
    for segment in rollout.segments:
        yield start, segment
        start += len(segment.token_ids)


def _tools_json(group: Group) -> str:
    """The tools that the row declares; "" if it declares none."""
    tools = tools_of(group.prompt.row.fields)
    return _json.encode(tools).decode() if tools else ""


def _sampler_logprobs(rollout: Rollout) -> Sequence[float | None]:
    parts = [segment.sampler_logprobs or (None,) * len(segment.token_ids) for segment in rollout.segments]
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))


def _schema(pa: Any) -> Any:
    text, integer, real = pa.string(), pa.int64(), pa.float64()
    types: dict[str, Any] = {
        "step": integer, "group_id": text, "prompt_id": text, "capability": text, "index": integer, "prompt": text,
        "tools": text, "reply": text, "reward": real, "reason": text, "advantage": real, "finish_reason": text,
        "policy_version": integer, "versions": text, "num_tokens": integer, "staleness": integer, "status": text,
        "tokens": text, "system": text, "prompt_ids": pa.list_(pa.int32()), "token_ids": pa.list_(pa.int32()),
        "segments": text, "sampler_logprobs": pa.list_(real), "ref_logprobs": pa.list_(real),
        "parts": text, "turn_advantages": pa.list_(real),
    }  # fmt: skip
    return pa.schema(list(types.items()), metadata={FORMAT_KEY: FORMAT})
