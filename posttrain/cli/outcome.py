"""The lines that the terminal shows at the end of a stage: its most important figures, and the path of its output.

They are read from the stage's DONE file and, for an evaluation, from its results.json. Also the texts of events about
an earlier result that a stage replaces. All other figures are in the report.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.files import read_object
from posttrain.report.format import percent, plain, plural

COLUMNS = ("greedy", "pass@1", "pass@k")


def outcome_lines(run_dir: Path, name: str, kind: str) -> list[str]:
    """The outcome of a stage or evaluation; no lines if it is not finished. name: such as `sft`, or `sft.eval`."""
    folder = run_dir.joinpath(*name.split("."))  # the evaluation `sft.eval` lies in sft/eval
    record = read_object(folder / "DONE") or {}
    outputs, stats = record.get("outputs"), record.get("stats") or {}
    if not outputs:
        return []
    if kind == "eval":
        results = folder / "results.json"
        return [f"results: {results}", *_table(read_object(results) or {})]
    path = run_dir / next(iter(outputs.values()))
    figures = ", ".join(filter(None, [*_figures(kind, stats)]))
    return [f"{figures}: {path}" if figures else str(path)]


def notice_text(stage: str, event: dict[str, Any]) -> str:
    """What a user is told besides progress, such as where an earlier result is; "" for any other event."""
    if event.get("event") == "earlier_kept":
        return f"{stage}  its earlier result is kept until the new one is complete: {event.get('path')}"
    if event.get("event") == "earlier_deleted":
        return f"{stage}  its new result is complete; the earlier one is deleted: {event.get('path')}"
    if event.get("event") == "end_token_added":
        tokens = " ".join(map(str, event.get("tokens") or ()))
        rule = "which neither the tokenizer nor generation_config.json names as an end token; sampling stops there too"
        return f"{stage}  the chat template ends replies with {tokens}, {rule}"
    if event.get("event") == "prefixes_unshared":
        return f"{stage}  every reply is trained on with a copy of its prompt of its own: {event.get('reason')}"
    if event.get("event") == "duplicates_unsettled":
        return f"{stage}  {event.get('text')}"
    if event.get("event") in ("ended_early", "not_continued"):
        return f"{stage}  {_early_end(event)}"
    return ""


def _early_end(event: Mapping[str, Any]) -> str:
    """Why a training ended early, or trained nothing when it was continued."""
    best = f"step {event.get('best_step')}" if event.get("best_step") else "the start"
    count = plural(event.get("misses") or 0, "evaluation")
    why = f"{count} in a row did not lower the held-out loss of {best} (held_out.patience: {event.get('patience')})"
    if event.get("event") == "ended_early":
        return f"the training ended early after step {event.get('step')}: {why}"
    way = "to train on, raise held_out.patience or set it to null"
    return f"nothing more is trained: the training ended early after step {event.get('step')}, because {why}; {way}"


def _figures(kind: str, stats: Mapping[str, Any]) -> list[str]:
    if kind == "filter":
        removed = (stats.get("num_duplicates") or 0) + (stats.get("num_contaminated") or 0)
        before = f"{removed} removed before the judge, as duplicates or contaminated" if removed else ""
        return [f"kept {stats.get('num_kept')} of {plural(stats.get('num_rows') or 0, 'row')}", before]
    steps = plural(stats["steps"], "step") if stats.get("steps") else ""
    first, last = stats.get("loss_first"), stats.get("loss_last")
    loss = f"loss {plain(first)} → {plain(last)}" if first is not None and last is not None else ""
    prompts = stats.get("selected_prompts")
    on = f"on {plural(prompts, 'prompt')}" if prompts else ""
    profile = stats.get("profile") or {}
    lost = profile.get("prompts_unscored")
    unscored = f"{lost} of {plural(profile.get('prompts') or 0, 'prompt')} could not be scored" if lost else ""
    return [" ".join(filter(None, [steps, on])), loss, _held_out(stats), unscored]


def _held_out(stats: Mapping[str, Any]) -> str:
    """The loss on held-out rows, and the step whose model is the result if that is not the last step."""
    first, last = stats.get("held_out_loss_first"), stats.get("held_out_loss_last")
    if first is None or last is None:
        return ""
    text = "held-out loss " + (plain(last) if first == last else f"{plain(first)} → {plain(last)}")
    if stats.get("result_step") != stats.get("steps"):
        result = f"step {stats.get('result_step')}" if stats.get("result_step") else "the start model"
        text += f"; the result is {result} with {plain(stats.get('held_out_loss_best'))}"
    return text + (" (ended early)" if stats.get("stopped_early") else "")


def _table(results: Mapping[str, Any]) -> list[str]:
    """One line for each capability, each share followed by its 95% interval."""
    entries = {name: entry for name, entry in results.items() if isinstance(entry, Mapping)}
    names = [column for column in COLUMNS if any(entry.get(column) is not None for entry in entries.values())]
    k = next((entry.get("k") for entry in entries.values()), None)
    head = ["", "n", *(f"pass@{k}" if column == "pass@k" else column for column in names)]
    rows = [
        [name, str(entry.get("n")), *(_share(entry, column) for column in names)] for name, entry in entries.items()
    ]
    if any(entry.get("unscored") for entry in entries.values()):
        head.append("unscored")
        for row, entry in zip(rows, entries.values(), strict=True):
            row.append(str(entry.get("unscored")))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]


def _share(entry: Mapping[str, Any], column: str) -> str:
    interval = entry.get(f"{column}_ci95")
    around = f" ({percent(interval[0])} to {percent(interval[1])})" if interval else ""
    return f"{percent(entry.get(column), 1)}{around}"
