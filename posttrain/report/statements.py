"""The sentences of the report about what a stage changed. They claim only what the numbers support.

A stage is compared with the model from which it started, and with no other (lineage.py).

If the 95% intervals of two accuracies overlap, the sentence says "no measurable change". This is stricter than a
statistical test of the difference, and a reader can check it by eye.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from posttrain.metrics.intervals import wilson_ci95
from posttrain.report.lineage import before, chain, measured
from posttrain.report.read import Run, mapping, number

LABELS = {"base": "base", "filter": "filter", "sft": "SFT", "rl": "RL", "dpo": "DPO", "eval": "evaluation"}
MODALITY = "modality: "  # begins the name of an entry of results.json
PROMPTS = {
    "text": "prompts of text",
    "image": "prompts with one picture",
    "multi-image": "prompts with several pictures",
}
SHOWN = {"worked": "show their work"}  # a property that an evaluation may count -> the words after "replies that"


@dataclass(frozen=True)
class Share:
    """A measured share in [0, 1] with its 95% interval. n: the number of problems it was measured on."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]"


@dataclass(frozen=True)
class Change:
    """An accuracy before and after a stage."""

    before: Share
    after: Share

    @property
    def verdict(self) -> str:
        """`raised`, `lowered`, or `none` if the intervals overlap."""
        if self.after.low > self.before.high:
            return "raised"
        return "lowered" if self.after.high < self.before.low else "none"

    @property
    def points(self) -> float:
        """The difference in percentage points."""
        return 100 * (self.after.value - self.before.value)


@dataclass(frozen=True)
class Observed:
    """How often replies had a property, such as showing their work, and their accuracy with and without it."""

    share: Share
    accuracy: Share | None
    otherwise: Share | None


def share_of(value: object, interval: object, n: object) -> Share | None:
    """A share in an entry of a results file, with the interval given there, or else the Wilson interval."""
    point, count = number(value), number(n) or 0.0
    if point is None or not -1e-9 <= point <= 1 + 1e-9:
        return None
    point = min(max(point, 0.0), 1.0)
    low = high = None
    if isinstance(interval, list | tuple) and len(interval) == 2:
        low, high = number(interval[0]), number(interval[1])
    if low is None or high is None:
        low, high = wilson_ci95(point * count, round(count)) if count >= 1 else (0.0, 1.0)
    return Share(point, low, high, round(count))


def greedy(results: Mapping[str, object], capability: str = "all") -> Share | None:
    """Greedy held-out accuracy in one capability, or over all of them ("all")."""
    cell = mapping(results.get(capability))
    return share_of(cell.get("greedy"), cell.get("greedy_ci95"), cell.get("greedy_n", cell.get("n")))


def observed(results: Mapping[str, object], name: str, capability: str = "all") -> Observed | None:
    """A property that the evaluation counted in the greedy replies; None if it did not."""
    cell = mapping(results.get(capability))
    found = mapping(mapping(cell.get("observed")).get(name))
    n = number(found.get("of")) or number(cell.get("n")) or 0.0
    share = share_of(found.get("share"), found.get("share_ci95"), n)
    if share is None:
        return None
    having = number(found.get("n"))
    having = share.value * n if having is None else having
    return Observed(
        share,
        share_of(found.get("accuracy"), found.get("accuracy_ci95"), having),
        share_of(found.get("accuracy_otherwise"), found.get("accuracy_otherwise_ci95"), n - having),
    )


def properties(run: Run) -> dict[str, str]:
    """Name of each property that an evaluation counted, to the words that follow "replies that" in a sentence."""
    cells = [mapping(cell) for results in run.evals.values() for cell in results.values()]
    names = dict.fromkeys(name for cell in cells for name in mapping(cell.get("observed")))
    return {name: SHOWN.get(name, f"match “{name}”") for name in names}


def label(run: Run, name: str) -> str:
    """The name of a stage in sentences: its kind, such as SFT, if only one stage has it or is named so, else its
    name.
    """
    stage = next((stage for stage in run.stages if stage.name == name), None)
    if stage is None or stage.kind not in LABELS:
        return name
    alone = len(run.of_kind(stage.kind)) == 1
    return LABELS[stage.kind] if alone and stage.kind != "eval" else name


def changes(run: Run) -> list[tuple[str, str, Change]]:
    """(evaluation before, evaluation after, change of greedy accuracy over all) for each stage that has both.

    The evaluation before measured the model from which the stage started (lineage.py). Pairs with different numbers of
    problems are left out, because the problems may differ.
    """
    found = []
    for name in run.evals:
        earlier = before(run, name)
        change = _change(run, earlier, name) if earlier is not None else None
        if earlier is not None and change is not None:
            found.append((earlier, name, change))
    return found


def _change(run: Run, earlier: str, later: str, *, part: str = "all") -> Change | None:
    shares = greedy(run.evals[earlier], part), greedy(run.evals[later], part)
    if shares[0] is None or shares[1] is None or shares[0].n != shares[1].n:
        return None
    return Change(shares[0], shares[1])


def main_change(run: Run) -> tuple[str, str, Change] | None:
    """The change for the headline: that of the first RL stage, or else that of the whole chain of stages.

    The chain is the longest one in which each stage started from the model of the stage before. If two branches are
    equally long, there is no such chain and no headline about a change.
    """
    pairs = changes(run)
    kinds = {stage.name: stage.kind for stage in run.stages}
    for pair in pairs:
        if kinds.get(measured(run, pair[1])) == "rl":
            return pair
    chains = sorted((chain(run, after) for _, after, _ in pairs), key=len, reverse=True)
    if not chains or (len(chains) > 1 and len(chains[0]) == len(chains[1])):
        return None
    first, last = chains[0][0], chains[0][-1]
    whole = _change(run, first, last)
    return (first, last, whole) if whole is not None else pairs[-1]


def _trained(run: Run, name: str) -> str:
    """The stage that made the measured model; for an evaluation that is a stage of its own, also the evaluation."""
    stage = measured(run, name)
    return label(run, stage) if stage == name else f"{label(run, stage)} (by {name})"


def change_sentence(run: Run, before: str, after: str, *, change: Change) -> str:
    """One sentence about one change, with both intervals.

    A change over several stages is not attributed to the last one.
    """
    alone = (before, after) in [pair[:2] for pair in changes(run)]
    who = _trained(run, after) if alone else f"from {label(run, before)} to {label(run, after)}"
    who = who[0].upper() + who[1:]
    if change.verdict == "none":
        return f"{who}: no measurable change in held-out accuracy, {change.before} before and {change.after} after."
    if alone:
        return f"{who} {change.verdict} held-out accuracy from {change.before} to {change.after}."
    verb = "rose" if change.verdict == "raised" else "fell"
    return f"{who}, held-out accuracy {verb} from {change.before} to {change.after}."


def headline(run: Run) -> str:
    """The measured result of the run in one sentence."""
    main = main_change(run)
    if main is not None:
        before, after, change = main
        return change_sentence(run, before, after, change=change)
    measured = [(label(run, name), share) for name, results in run.evals.items() if (share := greedy(results))]
    if not measured:
        return "This run has no held-out evaluation."
    if len(measured) == 1:
        return f"Held-out accuracy is {measured[0][1]}."
    return "Held-out accuracy: " + ", ".join(f"{name} {share}" for name, share in measured) + "."


def gain_sentences(run: Run) -> list[str]:
    """Sentences that split the change of the headline, if the evaluation counted a property of the replies."""
    main = main_change(run)
    if main is None:
        return []
    sentences = []
    for name, words in properties(run).items():
        before, after = (observed(run.evals[stage], name) for stage in main[:2])
        if before and after:
            sentences.append(_observed_sentence(words, before, after))
            sentences.extend(_parts_sentence(words, main[2], before, after=after))
    return sentences


def modality_sentences(run: Run) -> list[str]:
    """One sentence for each modality about the change of the headline, if the problems have several modalities."""
    main = main_change(run)
    if main is None:
        return []
    sentences = []
    for name in (entry for entry in run.evals[main[1]] if entry.startswith(MODALITY)):
        change = _change(run, main[0], main[1], part=name)
        if change is not None:
            verb = {"raised": "rose", "lowered": "fell", "none": "did not measurably change:"}[change.verdict]
            where = PROMPTS.get(name.removeprefix(MODALITY), name)
            sentences.append(f"On {where}, accuracy {verb} {change.before} → {change.after}.")
    return sentences


def _observed_sentence(words: str, before: Observed, after: Observed) -> str:
    """How the share of replies with a property changed, and the accuracy among these replies.

    If the share changed, the accuracy after is measured on other problems than before, and the sentence says so.
    """
    share = Change(before.share, after.share)
    verbs = {"raised": "rose", "lowered": "fell", "none": "did not measurably change:"}
    text = f"The share of replies that {words} {verbs[share.verdict]} {share.before} → {share.after}."
    if not (before.accuracy and after.accuracy):
        return text
    accuracy = Change(before.accuracy, after.accuracy)
    now = {"raised": ", now on more of the problems,", "lowered": ", now on fewer of the problems,", "none": ""}
    ending = ", no measurable change" if accuracy.verdict == "none" else ""
    among = f"Accuracy among replies that {words}{now[share.verdict]} {accuracy.before} → {accuracy.after}{ending}."
    return f"{text} {among}"


def _parts_sentence(words: str, change: Change, before: Observed, *, after: Observed) -> list[str]:
    """Split the gained points into two parts: more replies with the property, and higher accuracy with or without it.

    accuracy = share × accuracy with + (1 − share) × accuracy without. So the difference is the change of the share at
    mean accuracies, plus the changes of the accuracies at mean shares. Source: Kitagawa (1955), the two-part split.
    """
    known = (before.accuracy, after.accuracy, before.otherwise, after.otherwise)
    if change.verdict == "none" or any(share is None for share in known):
        return []
    with_before, with_after, without_before, without_after = (share.value for share in known if share is not None)
    gap = (with_before + with_after - without_before - without_after) / 2
    from_share = 100 * (after.share.value - before.share.value) * gap
    return [
        f"Of the {change.points:+.1f} points, {from_share:+.1f} come from a changed share of replies that {words}, and "
        f"{change.points - from_share:+.1f} from changed accuracies with and without it."
    ]
