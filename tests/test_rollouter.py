"""Rollouters and their sessions: what a session records and requests, and two turns on a real engine."""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_as_exact, float64_inside
from rollout_records import drawn

from posttrain.config.engines import EngineConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.resources import ActorResources
from posttrain.context import StageContext
from posttrain.episodes.places import Places
from posttrain.errors import StageError
from posttrain.files import read_jsonl
from posttrain.records import FinishReason, Message, Prompt, Rollout, Row, Segment, VersionSpan
from posttrain.rl.records import group_of_flight
from posttrain.rl.training.samples import train_sample
from posttrain.sampling.manifests import FolderWeights
from posttrain.sampling.requests import Completion, SampleRequest
from posttrain.sampling.rollouter import Flight, Session, SingleTurn
from posttrain.sampling.rollouts import UNBEGUN, Reply
from posttrain.sampling.running import RunningRollouters
from posttrain.sampling.turns import Turn

MESSAGES = (Message("user", "a question"),)
SAID = (30, 31, 32)  # what the world answers to the first turn
REQUEST = SampleRequest((5, 6, 7), n=2, max_tokens=8)


class TwoTurns:
    """Samples, is told something, and samples again. between: is called after each rollout's first turn."""

    def __init__(self, between: Any = None):
        self._between = between

    async def run(self, prompt: Prompt, session: Session) -> Rollout:
        await session.sample()
        if self._between is not None:
            await session.outside(self._between())
        session.add(SAID)
        await session.sample(max_tokens=60)
        return session.rollout()


# ---------------------------------------------------------------- what a session keeps, its turns answered by hand


def flight_of(order: int, prompt_ids: tuple[int, ...], request: SampleRequest) -> Flight:
    return Flight(order, 0, drawn(Row(f"r{order}", "math", MESSAGES), MESSAGES, prompt_ids), request)


def completion(*token_ids: int, version: int = 0, text: str = "text") -> Completion:
    spans = (VersionSpan(version, 0, len(token_ids)),)
    return Completion(token_ids, text, (-0.5,) * len(token_ids), FinishReason.STOP, spans)


def played(rollouter: Any, recorded: Reply, *answers: Completion) -> tuple[Rollout, list[Turn]]:
    """The rollout where each turn that is asked for gets the next answer, and those turns."""
    left, asked = iter(answers), []
    flight = flight_of(3, REQUEST.prompt_ids, REQUEST)
    running = rollouter.run(flight.prompt.prompt, Session(flight, 1, recorded))
    try:
        while True:
            turn = running.send(None)
            asked.append(turn)
            turn.worker = "engine1"
            turn.finish(next(left), 7.0)
    except StopIteration as end:
        return end.value, asked


def test_one_turn_is_one_trained_segment():
    rollout, (turn,) = played(SingleTurn(), UNBEGUN, completion(9, 2))
    assert turn.request is REQUEST  # the very one of its group, so that the whole group can be one request
    assert rollout.segments == (Segment((9, 2), True, (-0.5, -0.5), (VersionSpan(0, 0, 2),)),)
    assert (rollout.prompt_id, rollout.group_id, rollout.index, rollout.prompt_ids) == ("r3", "g3", 1, (5, 6, 7))
    assert (rollout.text, rollout.finish_reason, rollout.worker) == ("text", FinishReason.STOP, "engine1")
    assert rollout.finished_s == 7.0


def test_a_second_turn_is_asked_for_with_the_tokens_of_the_first_and_what_was_added():
    rollout, (first, second) = played(TwoTurns(), UNBEGUN, completion(9, 2), completion(8, 4, version=1, text="last"))
    assert (first.number, second.number) == (0, 2)
    assert second.request.prompt_ids == (5, 6, 7, 9, 2, *SAID)
    assert second.request.max_tokens == 60
    assert [segment.trained for segment in rollout.segments] == [True, False, True]
    assert rollout.segments[1].sampler_logprobs is None
    assert rollout.token_ids == (9, 2, *SAID, 8, 4)
    assert list(rollout.versions) == [0, 1]
    assert rollout.text == "last"


def test_what_was_recorded_is_not_sampled_again():
    """After a crash: the first turn is handed to the engine with all its tokens, the second with those that it has."""
    whole, _ = played(TwoTurns(), UNBEGUN, completion(9, 2), completion(8, 4, version=1))
    cut = Segment((8,), True, (-0.5,), (VersionSpan(1, 0, 1),))
    recorded = Reply((*whole.segments[:2], cut), "", FinishReason.RUNNING)
    rollout, turns = played(TwoTurns(), recorded, completion(9, 2), completion(8, 4, version=1))
    assert rollout.segments == whole.segments
    assert begun_turns(recorded) == [(9, 2), (8,)]
    assert len(turns) == 2
    # Of one that was finished the last turn is not asked for.
    finished = Reply(whole.segments, "text", FinishReason.STOP)
    again, turns = played(TwoTurns(), finished, completion(9, 2))
    assert (len(turns), again.segments) == (1, whole.segments)


def begun_turns(recorded: Reply) -> list[tuple[int, ...]]:
    """The tokens with which each turn that is asked for begins."""
    found = []
    flight = flight_of(3, REQUEST.prompt_ids, REQUEST)
    running = TwoTurns().run(flight.prompt.prompt, Session(flight, 0, recorded))
    with contextlib.suppress(StopIteration):
        while True:
            turn: Any = running.send(None)
            found.append(turn.completion.token_ids)
            turn.finish(completion(*turn.completion.token_ids), 7.0)
    return found


def test_what_followed_other_context_is_forgotten():
    other = Segment((40, 41), False)
    first = Segment((9, 2), True, (-0.5, -0.5), (VersionSpan(0, 0, 2),))
    last = Segment((8, 4), True, (-0.5, -0.5), (VersionSpan(1, 0, 2),))
    recorded = Reply((first, other, last), "text", FinishReason.STOP)
    assert begun_turns(recorded) == [(9, 2), ()]


def test_a_rollouter_that_does_not_sample_is_told_so():
    class Silent:
        async def run(self, prompt: Prompt, session: Session) -> Rollout:
            session.add(SAID)
            return session.rollout()

    with pytest.raises(StageError, match="row r3, rollout 1 of group 3: a rollout was made of which nothing was samp"):
        played(Silent(), UNBEGUN)


def test_a_session_samples_one_turn_at_a_time():
    session = Session(flight_of(3, REQUEST.prompt_ids, REQUEST), 1, UNBEGUN)
    session.sample().send(None)
    with pytest.raises(StageError, match="a turn was asked for while another one is sampled"):
        session.sample().send(None)
    with pytest.raises(StageError, match="context was added while a turn is sampled"):
        session.add(SAID)


def test_a_rollouter_that_awaits_something_else_is_told_what_to_do(tmp_path):
    from types import SimpleNamespace

    from posttrain.sampling.workers import RolloutWorkers

    class Sleepy:
        async def run(self, prompt: Prompt, session: Session) -> Rollout:
            await asyncio.sleep(0)
            return session.rollout()

    async def run() -> None:
        context = StageContext("rl", tmp_path, tmp_path / "events.jsonl")
        none: Any = SimpleNamespace(seats=[])
        workers = RolloutWorkers(context, none, deadline_s=1.0, finished=lambda flight: None, rollouter=Sleepy())
        workers.send(flight_of(3, REQUEST.prompt_ids, REQUEST))
        await workers.run()

    with pytest.raises(StageError, match=r"rollout 0 of group 3: the rollouter awaited None; .* by session.outside"):
        asyncio.run(run())


def test_episodes_wait_for_a_place_and_get_it_in_their_order():
    """A rollout that is given up leaves its place, or the line."""
    ended: list[int] = []

    class OneTurn:
        places = Places(2)

        async def run(self, prompt: Prompt, session: Session) -> Rollout:
            try:
                await self.places.take(session)
                await session.sample()
                return session.rollout()
            finally:
                self.places.leave(session)

    async def settled() -> None:
        for _ in range(100):  # rounds of the event loop, in which everything happens: nothing here waits for a time
            await asyncio.sleep(0)

    async def run() -> list[list[int]]:
        asked: list[Turn] = []
        rounds: list[list[int]] = []
        running = RunningRollouters(OneTurn(), asked=asked.extend, finished=lambda flight: ended.append(flight.order))
        for order in range(7):
            running.start(flight_of(order, (1,), SampleRequest((1,))))
        sessions = [flight.sessions[0] for flight in running.flights.values()]
        for given_up in (3, 2, None, None):
            await settled()
            rounds.append([turn.flight.order for turn in asked])
            waiting = [session.is_waiting for session in sessions if session.running is not None]
            assert waiting == sorted(waiting)  # those that have begun came first
            if given_up is not None:
                running.forget(given_up)
                asked[:] = [turn for turn in asked if turn.flight.order != given_up]
            for turn in asked:
                turn.finish(completion(9), 7.0)
                running.can_go_on(turn.session)
            asked.clear()
        await settled()
        return rounds

    assert asyncio.run(run()) == [[0, 1], [2, 4], [5, 6], []]
    assert ended == [0, 1, 4, 5, 6]


# ---------------------------------------------------------------- two turns over a real engine

slow = pytest.mark.slow
ENGINE = EngineConfig(max_model_len=512, kv_cache_gib=0.1, stream_interval=4, deadline_s=8)
PROMPTS = [tuple(range(5 + i, 25 + i)) for i in range(4)]
GROUP, FIRST, SECOND = 3, 24, 60


@pytest.fixture(scope="module")
def policies(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of policy versions 0 and 1."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("policies") / "1"
    shutil.copytree(tiny_model, folder)
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    changed = {
        name: (tensor + 0.3 * torch.randn(tensor.shape, generator=generator) * tensor.std()).contiguous()
        for name, tensor in weights.items()
    }
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return [str(tiny_model), str(folder)]


@pytest.fixture(scope="module", autouse=True)
def engines_end(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "ray_session" in request.fixturenames:
        from posttrain.sampling.registry import stop_registry

        stop_registry()


def sent(order: int, prompt_ids: tuple[int, ...]) -> Flight:
    return flight_of(order, prompt_ids, SampleRequest(prompt_ids, n=GROUP, max_tokens=FIRST))


def weights(folder: str) -> Any:
    """In the place of a trainer's manifest: the engine loads the folder itself."""
    return FolderWeights(folder)


class Run:
    """Workers of RL over a leased engine, which make groups with a rollouter until all are finished."""

    def __init__(
        self,
        context: StageContext,
        engines: Any,
        policies: list[str],
        rollouter: Any,
        kv: str = "recompute",
        **settings: Any,
    ):
        from posttrain.sampling.workers import RolloutWorkers

        self.num_finished, self.flights = 0, [sent(order, ids) for order, ids in enumerate(PROMPTS)]
        self.finished = asyncio.Event()
        self.workers = RolloutWorkers(
            context,
            engines,
            deadline_s=ENGINE.deadline_s,
            finished=self._finish,
            rollouter=rollouter,
            calls=lambda folder, version, seats: [[(0, {"source": folder, "policy_version": version, "kv": kv})]],
            manifest=weights(policies[0]),
            **settings,
        )

    def _finish(self, flight: Flight) -> None:
        self.num_finished += 1
        if self.num_finished == len(self.flights):
            self.finished.set()

    async def groups(self, *beside: Coroutine[Any, Any, None]) -> list[tuple[Rollout, ...]]:
        serving = asyncio.ensure_future(self.workers.run())
        for flight in self.flights:
            self.workers.send(flight)
        others = [asyncio.ensure_future(one) for one in beside]
        try:
            waiting = asyncio.ensure_future(self.finished.wait())
            await asyncio.wait({waiting, serving}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            await asyncio.gather(*others)
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
        return [group_of_flight(flight).rollouts for flight in self.flights]


def leased(tmp_path: Path, policies: list[str]) -> Any:
    from posttrain.sampling.client import Engines

    context = StageContext("rl", tmp_path, tmp_path / "events.jsonl", seed=3, warm_engines=True)
    served = ServedModelConfig(path=policies[0], dtype="float32")
    return context, Engines(context, served, ENGINE, resources=ActorResources(cpus=0.5))


def check_form(rollout: Rollout) -> None:
    first, said, second = rollout.segments
    assert said == Segment(SAID, False)
    assert 0 < len(first.token_ids) <= FIRST
    assert 0 < len(second.token_ids) <= SECOND
    for segment in (first, second):
        assert segment.trained
        assert segment.sampler_logprobs is not None
        assert len(segment.sampler_logprobs) == len(segment.token_ids)
        covered = [place for span in segment.versions for place in range(span.start, span.end)]
        assert covered == list(range(len(segment.token_ids)))
    sample = train_sample(rollout, 1, 1.0)
    begins = len(rollout.prompt_ids)
    between = begins + len(first.token_ids) + len(SAID)
    assert sample.trained == ((begins, begins + len(first.token_ids)), (between, between + len(second.token_ids)))
    assert sample.token_ids == rollout.prompt_ids + first.token_ids + SAID + second.token_ids


def logprobs(policy: Any, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities of tokens 1.. of a sequence in one forward pass. Shape [T - 1]."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        found = policy(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    return found.gather(1, ids[0, 1:, None])[:, 0]


class Pause:
    """Holds every rollout between its turns, until `is_over`. all_wait: all of them are there."""

    def __init__(self) -> None:
        self.all_wait, self.is_over = asyncio.Event(), asyncio.Event()
        self._num_waiting = 0

    async def between(self) -> None:
        self._num_waiting += 1
        if self._num_waiting == GROUP * len(PROMPTS):
            self.all_wait.set()
        await self.is_over.wait()


@slow
@pytest.mark.timeout(300)
def test_both_turns_have_the_trainers_log_probabilities(ray_session, policies, tmp_path):
    """New weights come between the turns: the second is of them, over every token before it."""
    from posttrain.model.load import load_model

    context, engines = leased(tmp_path, policies)

    async def run() -> list[tuple[Rollout, ...]]:
        pause = Pause()
        made = Run(context, engines, policies, TwoTurns(pause.between))

        async def update() -> None:
            await pause.all_wait.wait()
            await made.workers.weights.update(weights(policies[1]), 1)
            pause.is_over.set()

        return await made.groups(update())

    with engines:
        rollouts = [rollout for group in asyncio.run(run()) for rollout in group]
    assert len({rollout.token_ids for rollout in rollouts}) == len(rollouts) == GROUP * len(PROMPTS)
    models = [load_model(folder) for folder in policies]
    exact = [load_model(folder, "transformers").double() for folder in policies]
    for rollout in rollouts:
        check_form(rollout)
        sample = train_sample(rollout, 1, 1.0)
        assert [segment.versions[0].policy_version for segment in (rollout.segments[0], rollout.segments[2])] == [0, 1]
        assert set(sample.staleness[: len(rollout.segments[0].token_ids)]) == {1}
        assert set(sample.staleness[len(rollout.segments[0].token_ids) :]) == {0}
        for version, (start, end) in enumerate(sample.trained):
            segment = rollout.segments[2 * version]
            places = slice(start - 1, end - 1)
            with float64_inside():
                reference = logprobs(exact[version], sample.token_ids)[places]
            assert_as_exact(
                torch.tensor(segment.sampler_logprobs),
                logprobs(models[version], sample.token_ids)[places],
                reference,
                scale=float(models[version](input_ids=torch.tensor([sample.token_ids])).logits.detach().abs().max()),
            )


@slow
@pytest.mark.timeout(300)
def test_a_second_turn_goes_on_where_a_lost_engine_left_it(ray_session, policies, tmp_path):
    """Not a token that was there is lost, and no rollouter hears of it."""
    context, engines = leased(tmp_path, policies)
    kept: dict[tuple[int, int], tuple[int, ...]] = {}

    async def run() -> list[tuple[Rollout, ...]]:
        pids = await engines.actors[0].pids.remote()

        def kill_once(flight: Flight) -> None:
            replies = [reply for other in made.flights for reply in other.replies]
            if kept or not any(len(reply.segments) == 3 and not reply.finish_reason for reply in replies):
                return
            for other in made.flights:
                for index, reply in enumerate(other.replies):
                    kept[other.order, index] = tuple(t for segment in reply.segments for t in segment.token_ids)
            os.kill(pids["core"], signal.SIGKILL)

        made = Run(context, engines, policies, TwoTurns(), begun=kill_once)
        return await made.groups()

    with engines:
        groups = asyncio.run(run())
    assert kept
    for order, group in enumerate(groups):
        for rollout in group:
            check_form(rollout)
            there = kept[order, rollout.index]
            assert rollout.token_ids[: len(there)] == there
    assert [line for line in read_jsonl(context.events) if line["event"] == "engine_replaced"]


@slow
@pytest.mark.timeout(300)
def test_two_turns_in_waves_are_the_same_bits_again_and_without_waves_the_first_is_cached(
    ray_session, policies, tmp_path
):
    context, engines = leased(tmp_path, policies)

    def made() -> Run:
        return Run(context, engines, policies, TwoTurns(), wave_seed=lambda flight: 17 + flight.order)

    async def run() -> list[tuple[Rollout, ...]]:
        return await made().groups()

    async def without_waves() -> tuple[int, int]:
        plain = Run(context, engines, policies, TwoTurns())
        await plain.groups()
        return plain.workers.num_read, plain.workers.num_cached

    with engines:
        once, again = asyncio.run(run()), asyncio.run(run())
        num_read, num_cached = asyncio.run(without_waves())
    # A second turn reads prompt, first turn and what was said; the engine still has all but the last, begun block.
    assert num_read == GROUP * len(PROMPTS) * (len(PROMPTS[0]) + FIRST + len(SAID))
    assert num_read / 2 < num_cached < num_read
    for group, other in zip(once, again, strict=True):
        for rollout, same in zip(group, other, strict=True):
            check_form(rollout)
            assert rollout.segments == same.segments
    assert len({rollout.token_ids for group in once for rollout in group}) == GROUP * len(PROMPTS)


@slow
@pytest.mark.timeout(300)
def test_a_turn_after_new_weights_reads_what_its_rollout_has_in_the_engine_if_that_is_kept(
    ray_session, policies, tmp_path
):
    """kv: keep. Weights come while all rollouts wait between their turns, as for a tool."""
    context, engines = leased(tmp_path, policies)

    async def run(kv: str) -> float:
        pause = Pause()

        async def update() -> None:
            await pause.all_wait.wait()
            await made.workers.weights.update(weights(policies[0]), 2)
            pause.is_over.set()

        made = Run(context, engines, policies, TwoTurns(pause.between), kv)
        await engines.actors[0].pids.remote()
        await made.workers.weights.update(weights(policies[1]), 1)  # from the first on, the engine keeps what it has
        groups = await made.groups(update())
        assert all(set(rollout.versions) == {1, 2} for group in groups for rollout in group)
        return made.workers.num_cached / made.workers.num_read

    with engines:
        kept, computed = asyncio.run(run("keep")), asyncio.run(run("recompute"))
    # A second turn reads prompt, first turn and what was said. Computed again, the prompt alone is shared, by a group.
    assert kept >= (len(PROMPTS[0]) + FIRST - 4) / (len(PROMPTS[0]) + FIRST + len(SAID)) > 0.8
    assert computed < len(PROMPTS[0]) / (len(PROMPTS[0]) + FIRST + len(SAID)) < 0.5
