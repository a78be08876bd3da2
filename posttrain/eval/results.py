"""Computes results.json from scored replies: rates by capability, by modality and over all, with 95% intervals.

Greedy accuracy is a share of yes-or-no outcomes, so its interval is Wilson's. pass@1 and pass@k are means over prompts,
so their interval comes from a bootstrap that draws prompts. The entry "all" is over all prompts of the data together.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.data.images.modality import modality_of
from posttrain.eval.replies import GREEDY, SAMPLE, PromptReplies, Reply
from posttrain.metrics.correctness import is_right
from posttrain.metrics.intervals import bootstrap_ci95, wilson_ci95
from posttrain.metrics.pass_at_k import pass_at_k
from posttrain.records import EPISODE_COUNTS


def results(
    prompts: Iterable[PromptReplies], k: int, threshold: float, *, observe: Mapping[str, str], seed: int
) -> dict[str, dict[str, Any]]:
    """The content of results.json: one entry a capability, in order of name, "modality: NAME" for each modality if the
    rows have several, and "all".

    Each holds n (prompts), greedy, greedy_ci95, greedy_n (prompts with a scored greedy reply), reward_mean (of
    those); pass@1, pass@k with *_ci95 and k, pass@k_n (prompts with at least k scored samples); truncated (number)
    and reply_tokens_mean of the greedy replies, or of the samples where there are none; unscored (number of replies);
    observed; and where there are episodes among those replies, episodes: their number n, and means over them of
    EPISODE_COUNTS. A rate over no reply at all is None.
    """
    patterns = {name: re.compile(pattern) for name, pattern in observe.items()}
    capabilities: dict[str, _Part] = {}
    modalities: dict[str, _Part] = {}
    whole = _Part(threshold, patterns)
    for item in prompts:
        whole.add(item)
        for parts, name in (
            (capabilities, item.row.capability),
            (modalities, f"modality: {modality_of(item.row)}"),
        ):
            if name not in parts:
                parts[name] = _Part(threshold, patterns)
            parts[name].add(item)
    shown = sorted(modalities.items()) if len(modalities) > 1 else []
    # "all" is written last, so that it replaces a capability of the same name.
    return {name: part.entry(k, seed) for name, part in [*sorted(capabilities.items()), *shown, ("all", whole)]}


class _Part:
    """The counts of the prompts of one capability, or of all. A few numbers a prompt are in memory, and no text."""

    def __init__(self, threshold: float, patterns: Mapping[str, re.Pattern[str]]):
        self._threshold, self._patterns = threshold, patterns
        self._rewards = array("d")  # of the scored greedy replies
        self._scored_N, self._right_N = array("q"), array("q")  # of the samples of each prompt
        self._shown = {GREEDY: _Shown(patterns), SAMPLE: _Shown(patterns)}
        self._unscored = 0

    def add(self, item: PromptReplies) -> None:
        """Count a prompt."""
        rewards = [reply.reward for reply in item.samples if reply.reward is not None]
        self._scored_N.append(len(rewards))
        self._right_N.append(sum(is_right(reward, self._threshold) for reward in rewards))
        self._unscored += sum(reply.reward is None for reply in item.replies)
        if item.greedy is not None and item.greedy.reward is not None:
            self._rewards.append(item.greedy.reward)
        for kind, replies in ((GREEDY, (item.greedy,) if item.greedy else ()), (SAMPLE, item.samples)):
            for reply in replies:
                self._shown[kind].add(reply, self._threshold)

    def entry(self, k: int, seed: int) -> dict[str, Any]:
        """The entry of results.json."""
        shown = self._shown[GREEDY if self._shown[GREEDY].number else SAMPLE]
        return {
            "n": len(self._scored_N),
            **self._greedy(),
            **self._sampled(k, seed),
            "truncated": shown.truncated,
            "reply_tokens_mean": shown.tokens / shown.number if shown.number else None,
            "unscored": self._unscored,
            "observed": {name: shown.observed(name) for name in self._patterns},
            **shown.episodes(),
        }

    def _greedy(self) -> dict[str, Any]:
        rewards = self._rewards
        right = sum(is_right(reward, self._threshold) for reward in rewards)
        return {
            **_with_interval("greedy", right, len(rewards)),
            "greedy_n": len(rewards),
            "reward_mean": sum(rewards) / len(rewards) if rewards else None,
        }

    def _sampled(self, k: int, seed: int) -> dict[str, Any]:
        first, best = (
            array("d", (pass_at_k(n, c, size) for n, c in zip(self._scored_N, self._right_N, strict=True) if n >= size))
            for size in (1, k)
        )
        return {
            "pass@1": sum(first) / len(first) if first else None,
            "pass@1_ci95": list(bootstrap_ci95(first, seed)) if first else None,
            "pass@k": sum(best) / len(best) if best else None,
            "pass@k_ci95": list(bootstrap_ci95(best, seed)) if best else None,
            "pass@k_n": len(best),
            "k": k,
        }


class _Shown:
    """Counts of greedy replies, or of samples: tokens, truncated ones, and those in which each pattern is found."""

    def __init__(self, patterns: Mapping[str, re.Pattern[str]]):
        self._patterns = patterns
        self.number = self.tokens = self.truncated = 0
        self._num_episodes = 0
        self._episodes: dict[str, float] = dict.fromkeys(EPISODE_COUNTS, 0.0)
        self._found: Counter[str] = Counter()
        self._scored: Counter[tuple[str, bool]] = Counter()  # (pattern, whether it is found)
        self._right: Counter[tuple[str, bool]] = Counter()

    def add(self, reply: Reply, threshold: float) -> None:
        """Count a reply."""
        self.number += 1
        self.tokens += reply.num_tokens
        self.truncated += reply.truncated
        self._num_episodes += bool(reply.episode)
        for name, count in reply.episode.items():
            self._episodes[name] += count
        for name, pattern in self._patterns.items():
            key = name, pattern.search(reply.text) is not None
            self._found[name] += key[1]
            if reply.reward is not None:
                self._scored[key] += 1
                self._right[key] += is_right(reply.reward, threshold)

    def episodes(self) -> dict[str, Any]:
        """The number of episodes and the means of their counts; empty if there are none."""
        if not self._num_episodes:
            return {}
        means = {name: total / self._num_episodes for name, total in self._episodes.items()}
        return {"episodes": {"n": self._num_episodes, **means}}

    def observed(self, name: str) -> dict[str, Any]:
        """Share of replies (`n` of `of`) in which the pattern is found, and the accuracy with it and without."""
        return {
            **_with_interval("share", self._found[name], self.number),
            "of": self.number,
            "n": self._found[name],
            **_with_interval("accuracy", self._right[name, True], self._scored[name, True]),
            **_with_interval("accuracy_otherwise", self._right[name, False], self._scored[name, False]),
        }


def _with_interval(name: str, count: int, total: int) -> dict[str, Any]:
    """A share of yes-or-no outcomes and its Wilson interval; None where there were none."""
    return {
        name: count / total if total else None,
        f"{name}_ci95": list(wilson_ci95(count, total)) if total else None,
    }
