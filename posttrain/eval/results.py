"""Computes results.json from scored replies: rates by capability and over all, each with its 95% interval.

Greedy accuracy is a share of yes-or-no outcomes, so its interval is Wilson's. pass@1 and pass@k are means over prompts,
so their interval comes from a bootstrap that draws prompts. The entry "all" is over all prompts of the data together.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.eval.replies import PromptReplies, Reply
from posttrain.metrics.correctness import is_right
from posttrain.metrics.intervals import bootstrap_ci95, wilson_ci95
from posttrain.metrics.pass_at_k import pass_at_k
from posttrain.records import EPISODE_COUNTS


def results(
    prompts: Sequence[PromptReplies], k: int, threshold: float, *, observe: Mapping[str, str], seed: int
) -> dict[str, dict[str, Any]]:
    """The content of results.json: one entry a capability, in order of name, and "all".

    Each holds n (prompts), greedy, greedy_ci95, greedy_n (prompts with a scored greedy reply), reward_mean (of
    those); pass@1, pass@k with *_ci95 and k, pass@k_n (prompts with at least k scored samples); truncated (number)
    and reply_tokens_mean of the greedy replies, or of the samples where there are none; unscored (number of replies);
    observed; and where there are episodes among those replies, episodes: their number n, and means over them of
    EPISODE_COUNTS. A rate over no reply at all is None.
    """
    capabilities = sorted({item.row.capability for item in prompts})
    parts = {name: [item for item in prompts if item.row.capability == name] for name in capabilities}
    # "all" is written last, so that it replaces a capability of the same name.
    parts["all"] = list(prompts)
    patterns = {name: re.compile(pattern) for name, pattern in observe.items()}
    return {name: _entry(part, k, threshold, patterns=patterns, seed=seed) for name, part in parts.items()}


def _entry(
    prompts: Sequence[PromptReplies], k: int, threshold: float, *, patterns: Mapping[str, re.Pattern[str]], seed: int
) -> dict[str, Any]:
    greedy = [item.greedy for item in prompts if item.greedy is not None]
    samples = [reply for item in prompts for reply in item.samples]
    shown = greedy or samples
    return {
        "n": len(prompts),
        **_greedy(greedy, threshold),
        **_sampled(prompts, k, threshold, seed=seed),
        "truncated": sum(reply.truncated for reply in shown),
        "reply_tokens_mean": sum(reply.num_tokens for reply in shown) / len(shown) if shown else None,
        "unscored": sum(reply.reward is None for reply in [*greedy, *samples]),
        "observed": {name: _observed(shown, pattern, threshold) for name, pattern in patterns.items()},
        **_episodes([reply.episode for reply in shown if reply.episode]),
    }


def _greedy(replies: Sequence[Reply], threshold: float) -> dict[str, Any]:
    rewards = [reply.reward for reply in replies if reply.reward is not None]
    right = sum(is_right(reward, threshold) for reward in rewards)
    return {
        **_with_interval("greedy", right, len(rewards)),
        "greedy_n": len(rewards),
        "reward_mean": sum(rewards) / len(rewards) if rewards else None,
    }


def _sampled(prompts: Sequence[PromptReplies], k: int, threshold: float, *, seed: int) -> dict[str, Any]:
    counts = []
    for item in prompts:
        rewards = [reply.reward for reply in item.samples if reply.reward is not None]
        counts.append((len(rewards), sum(is_right(reward, threshold) for reward in rewards)))
    first = [pass_at_k(n, c, 1) for n, c in counts if n]
    best = [pass_at_k(n, c, k) for n, c in counts if n >= k]
    return {
        "pass@1": sum(first) / len(first) if first else None,
        "pass@1_ci95": list(bootstrap_ci95(first, seed)) if first else None,
        "pass@k": sum(best) / len(best) if best else None,
        "pass@k_ci95": list(bootstrap_ci95(best, seed)) if best else None,
        "pass@k_n": len(best),
        "k": k,
    }


def _episodes(episodes: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    if not episodes:
        return {}
    means = {name: sum(counts[name] for counts in episodes) / len(episodes) for name in EPISODE_COUNTS}
    return {"episodes": {"n": len(episodes), **means}}


def _observed(replies: Sequence[Reply], pattern: re.Pattern[str], threshold: float) -> dict[str, Any]:
    """Share of replies (`n` of `of`) in which the pattern is found, and the accuracy with it and without."""
    found = [pattern.search(reply.text) is not None for reply in replies]
    right: dict[bool, list[bool]] = {True: [], False: []}
    for reply, is_found in zip(replies, found, strict=True):
        if reply.reward is not None:
            right[is_found].append(is_right(reply.reward, threshold))
    return {
        **_with_interval("share", sum(found), len(found)),
        "of": len(found),
        "n": sum(found),
        **_with_interval("accuracy", sum(right[True]), len(right[True])),
        **_with_interval("accuracy_otherwise", sum(right[False]), len(right[False])),
    }


def _with_interval(name: str, count: int, total: int) -> dict[str, Any]:
    """A share of yes-or-no outcomes and its Wilson interval; None where there were none."""
    return {
        name: count / total if total else None,
        f"{name}_ci95": list(wilson_ci95(count, total)) if total else None,
    }
