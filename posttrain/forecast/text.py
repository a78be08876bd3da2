"""A forecast as text and as JSON, with a drawing of who worked when."""

from dataclasses import asdict
from typing import Any

from posttrain.forecast.config import ClusterConfig, DeviceConfig
from posttrain.forecast.forecast import Forecast, Way
from posttrain.forecast.memory import GIB, DeviceMemory
from posttrain.rl.loop.scaling import Choice

SHADES = " .:*#"  # shares of a stretch of time in which an actor worked: none to all
WIDTH = 72
DRAWN_STEPS = 4


def title_of(file: str, cluster: ClusterConfig, device: DeviceConfig) -> str:
    """The first line of a forecast."""
    return f"{file} on {cluster.hosts} x {cluster.devices_per_host} {device.name}"


def render_forecast(forecast: Forecast, *, title: str) -> str:
    """The forecast as text."""
    ways = (forecast.asynchronous, forecast.in_turns)
    lines = [title, *_choice(forecast.choice), "", f"{'':<26}{'asynchronous':>14}{'in turns':>14}"]
    lines += [f"{name:<26}{a:>14}{b:>14}" for name, a, b in _rows(forecast)]
    lines += ["", f"asynchronous is {forecast.speedup:.2f} times as fast as in turns, on the same devices"]
    found = forecast.bottleneck
    lines.append(
        f"bottleneck: {found.part} (in half the time, steps would be {found.gain:.2f} times as fast)"
        if found.gain >= 1.02
        else "bottleneck: none; no part in half the time would make steps 2% faster"
    )
    lines += ["", "changes that help most:" if forecast.changes else "no change of one key makes steps 2% faster"]
    for change in forecast.changes:
        devices = f"{change.devices:+d} devices" if change.devices else "the same devices"
        lines.append(
            f"  {change.text}: {change.gain:.2f} times as fast, {devices}, a step costs {change.cost:.2f} times as much"
        )
    for way in ways:
        lines += ["", f"memory of a device, GiB, {way.planned.name}:"]
        lines += [f"  {_memory(item)}" for item in way.planned.memory]
        if way.planned.switch_s:
            lines.append(
                f"  weights and optimizer leave the devices while they sample: {way.planned.switch_s:.1f} s a step"
            )
    for way in ways:
        lines += ["", *draw(way)]
    return "\n".join(lines)


def _choice(choice: Choice | None) -> list[str]:
    """What each number of a range of engines would come to."""
    if choice is None:
        return []
    lines = ["", f"{'engines':<10}{'seconds a step':>16}{'trainer waits':>16}"]
    lines += [
        f"{item.workers:<10}{item.step_s:>16.2f}{item.waits:>16.0%}{'  <-' if item.workers == choice.workers else ''}"
        for item in choice.tried
    ]
    return [*lines, f"{choice.reason}. What follows is for {choice.workers}."]


def _rows(forecast: Forecast) -> list[tuple[str, str, str]]:
    a, b = forecast.asynchronous, forecast.in_turns
    pairs: list[tuple[str, str, str]] = [
        ("devices", f"{a.planned.devices}", f"{b.planned.devices}"),
        ("seconds a step", f"{a.outcome.step_s:.2f}", f"{b.outcome.step_s:.2f}"),
    ]
    for kind in a.outcome.tokens_per_s:
        label = {"engines": "sampled", "trainer": "trained on", "judge": "judged"}[kind]
        first, second = (way.outcome.tokens_per_s.get(kind, 0.0) for way in (a, b))
        pairs.append((f"tokens/s {label}", f"{first:,.0f}", f"{second:,.0f}"))
    for kind in a.outcome.idle:
        first, second = (way.outcome.idle.get(kind, 0.0) for way in (a, b))
        pairs.append((f"idle {kind}", f"{first:.0%}", f"{second:.0%}"))
    for label, value in (
        ("staleness, mean", lambda way: f"{way.outcome.staleness:.2f}"),
        ("groups in the queue", lambda way: f"{way.outcome.queue:.0f}"),
        ("sequences of an engine", lambda way: f"{way.planned.setting.max_seqs}"),
        ("weights: on the way, s", lambda way: f"{way.planned.setting.costs.update.pull_s:.3g}"),
        ("weights: pause, s", lambda way: f"{way.planned.setting.costs.update.pause_s:.3g}"),
        ("device hours", lambda way: f"{forecast.hours(way):,.1f}"),
        ("cost", lambda way: f"{forecast.price * forecast.hours(way):,.0f}"),
    ):
        pairs.append((label, value(a), value(b)))
    return pairs


def _memory(item: DeviceMemory) -> str:
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in item.parts.items())
    left = f"{item.room / GIB:.1f} left" if item.fits else f"DOES NOT FIT: {-item.room / GIB:.1f} too much"
    return f"{item.role}: {parts}; {left}"


def draw(way: Way) -> list[str]:
    """A line for each kind of actor, over a few steps: how much of each stretch of time it worked."""
    trace = way.outcome.trace
    last = len(trace.steps) - 1
    start, end = trace.steps[max(0, last - DRAWN_STEPS)].began, trace.steps[last].began
    kinds: dict[str, list[list[tuple[float, float]]]] = {}
    for name, intervals in trace.busy.items():
        kinds.setdefault(name.split("-")[0], []).append(intervals)
    stretch = (end - start) / WIDTH
    head = f"{DRAWN_STEPS} steps, {way.planned.name}, {end - start:.1f} s"
    lines = [f"{head}; worked some to all of the time: {SHADES.strip()}"]
    for kind, actors in kinds.items():
        shares = [0.0] * WIDTH
        for intervals in actors:
            for begin, stop in intervals:
                for place in range(max(0, int((begin - start) / stretch)), WIDTH):
                    left, right = start + place * stretch, start + (place + 1) * stretch
                    if left >= stop:
                        break
                    shares[place] += max(0.0, min(stop, right) - max(begin, left)) / stretch
        marks = (SHADES[min(len(SHADES) - 1, round(share / len(actors) * (len(SHADES) - 1)))] for share in shares)
        lines.append(f"  {kind:<8}|{''.join(marks)}|")
    return lines


def forecast_json(forecast: Forecast) -> dict[str, Any]:
    """The same forecast as a JSON object, with sizes in bytes and times in seconds."""
    return {
        **{
            name: {
                "devices": way.planned.devices,
                "step_s": way.outcome.step_s,
                "tokens_per_s": way.outcome.tokens_per_s,
                "idle": way.outcome.idle,
                "staleness": way.outcome.staleness,
                "queue_groups": way.outcome.queue,
                "wait_s": way.outcome.waited_s,
                "max_seqs": way.planned.setting.max_seqs,
                "weights_pull_s": way.planned.setting.costs.update.pull_s,
                "weights_pause_s": way.planned.setting.costs.update.pause_s,
                "switch_s": way.planned.switch_s,
                "device_hours": forecast.hours(way),
                "cost": forecast.price * forecast.hours(way),
                "memory": [{**asdict(item), "fits": item.fits} for item in way.planned.memory],
            }
            for name, way in (("asynchronous", forecast.asynchronous), ("in_turns", forecast.in_turns))
        },
        "speedup": forecast.speedup,
        "engines": None if forecast.choice is None else asdict(forecast.choice),
        "bottleneck": asdict(forecast.bottleneck),
        "changes": [asdict(change) for change in forecast.changes],
    }
