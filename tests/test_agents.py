"""Agents under the gateway: what it answers, which tokens it records, and what an agent's end costs."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from episodes_by_hand import HERMES, play, question
from gone import is_gone
from rollout_records import drawn

from posttrain.config.base import validate_config
from posttrain.config.environments import AGENT, OF_ENVIRONMENT, EnvironmentConfig, with_reward
from posttrain.data.ends import end_token_ids
from posttrain.environments.calculator import calculate
from posttrain.episodes.agents.gateway import MAX_BYTES, Gateway
from posttrain.episodes.agents.process import end_of
from posttrain.episodes.rollouter import EnvironmentRollouter
from posttrain.episodes.session import Session, episode_result
from posttrain.episodes.tools import declared_tools, row_renderer
from posttrain.episodes.wire import Ask, Begin, Ended
from posttrain.errors import ConfigError, PluginError
from posttrain.records import FinishReason, Outcome, Rollout, Row, VersionSpan
from posttrain.sampling.requests import Completion, SampleRequest
from posttrain.sampling.rollouter import Flight
from posttrain.sampling.running import RunningRollouters
from posttrain.sampling.turns import Turn
from posttrain.scoring.plugins import commands
from posttrain.scoring.plugins.lookup import check_environment
from posttrain.scoring.plugins.requirements import environment_sources

Script = Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]
CALCULATOR = "posttrain.environments.calculator:calculator"


# ---------------------------------------------------------------- one episode, whose agent is a script of this process


class Here:
    """A pool of environments whose episodes run in this event loop, so that no process is needed."""

    def __init__(self, script: Script, settings: dict[str, Any]):
        self._script = script
        self._settings = {"model": "policy", "max_calls": 50, "own_temperature": False, "takes_reward": True}
        self._settings.update(settings)

    async def begin(self, **fields: Any) -> "EpisodeHere":
        return EpisodeHere(Begin(1, **fields), self._script, self._settings)


class EpisodeHere:
    key = 1

    def __init__(self, begin: Begin, script: Script, settings: dict[str, Any]):
        self._events: asyncio.Queue[Ask | Ended] = asyncio.Queue()
        self._session = Session(begin, self._events.put_nowait, lambda _: None)
        self._script = script
        self._settings = settings
        self.answer = self._session.take
        self._running = asyncio.create_task(self._run())
        self._running.add_done_callback(self._failed)

    async def next(self) -> Ask | Ended:
        return await self._events.get()

    def end(self) -> None:
        self._running.cancel()

    def _failed(self, running: asyncio.Task[None]) -> None:
        if not running.cancelled() and (error := running.exception()) is not None:
            self._events.put_nowait(Ended(1, outcome=Outcome.ERROR, reason=repr(error)))

    async def _run(self) -> None:
        gateway = Gateway()
        transport = httpx.ASGITransport(gateway.app)
        with gateway.episode(self._session, **self._settings) as episode:
            headers = {"Authorization": f"Bearer {episode.key}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway/v1", headers=headers) as client:
                await self._script(client)
        result = episode_result(None if self._session.rewards else 0.0, self._session)
        self._events.put_nowait(Ended(1, rewards=tuple(self._session.rewards), result=result))


def letters(tokenizer: Any, text: str, limit: int) -> Completion:
    """A turn whose text has a token for each letter, which no tokenizer would make of it again."""
    ids = [token for letter in text for token in tokenizer.encode(letter, add_special_tokens=False)]
    ids = [*ids, end_token_ids(tokenizer)[0]][:limit]
    reason = FinishReason.STOP if ids[-1] in end_token_ids(tokenizer) else FinishReason.LENGTH
    said = tokenizer.decode(ids, skip_special_tokens=True)
    logprobs = tuple(-0.25 * (at % 4) for at in range(len(ids)))
    return Completion(tuple(ids), said, logprobs, reason, (VersionSpan(0, 0, len(ids)),))


def episode(
    tokenizer: Any, script: Script, says: list[str], *, row: Row | None = None, length: int = 2000, **settings: Any
) -> tuple[Rollout, list[Turn]]:
    """The rollout of an episode whose calls are the script's, and the turns that were asked for."""
    config = EnvironmentConfig(name=AGENT, args={"command": ["python"]})
    row = row or question("r")

    async def run() -> tuple[Rollout, list[Turn]]:
        rollouter = EnvironmentRollouter(config, tokenizer, length=length, seed=3)
        rollouter._pool = Here(script, settings)  # type: ignore[assignment]
        turns: list[Turn] = []
        done: asyncio.Future[Flight] = asyncio.get_running_loop().create_future()

        def asked(new: list[Turn]) -> None:
            for turn in new:
                turn.finish(letters(tokenizer, says[len(turns)], turn.request.max_tokens), 7.0)
                turns.append(turn)
                running.can_go_on(turn.session)

        running = RunningRollouters(rollouter, asked=asked, finished=done.set_result)
        failing = asyncio.ensure_future(running.raise_failure())
        ids = tuple(row_renderer(tokenizer, None)(row, row.messages))
        request = SampleRequest(ids, max_tokens=100, stop_token_ids=tuple(end_token_ids(tokenizer)))
        running.start(Flight(0, 0, drawn(row, row.messages, ids), request))
        await asyncio.wait([done, failing], return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            await failing
        failing.cancel()
        rollout = done.result().rollouts[0]
        assert rollout.scored is not None
        assert rollout.scored.result is not None, rollout.scored.reason
        return rollout, turns

    return asyncio.run(run())


async def chat(client: httpx.AsyncClient, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The message of the policy's turn."""
    answer = await client.post("/chat/completions", json={"model": "policy", "messages": messages, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_a_conversation_is_one_branch_with_the_sampled_ids(tiny_tokenizer):
    async def script(client):
        messages = [user("a question")]
        for _ in range(3):
            said = await chat(client, messages)
            messages += [{**said, "refusal": None, "annotations": []}, user("go on")]  # as the client gives it back

    rollout, turns = episode(tiny_tokenizer, script, ["one  ", "two\n", "three"])
    (branch,) = rollout.branches
    sampled = [segment for segment in rollout.segments if segment.trained]
    assert [segment.token_ids for segment in sampled] == [turn.completion.token_ids for turn in turns]
    assert [segment.sampler_logprobs for segment in sampled] == [turn.completion.logprobs for turn in turns]
    assert sampled[0].token_ids != tuple(tiny_tokenizer.encode("one  ", add_special_tokens=False))
    for turn in turns:  # and the policy reads them as it said them
        assert branch.token_ids[: len(turn.request.prompt_ids)] == turn.request.prompt_ids
    assert tiny_tokenizer.decode(branch.token_ids).endswith("two\n<|eot|><|header_start|>user<|header_end|>\n\ngo on"
        "<|eot|><|header_start|>assistant<|header_end|>\n\nthree<|eot|>")  # fmt: skip


def test_edited_histories_and_sub_agents_are_branches(tiny_tokenizer):
    """By hand: main, main, sub-agent, main again, and main with its first turn edited."""

    async def script(client):
        main = [{"role": "system", "content": "Be good."}, user("a question")]
        main += [await chat(client, main), user("go on")]
        main += [await chat(client, main), user("and on")]
        await chat(client, [user("a detail")])
        await chat(client, main)
        await chat(client, [*main[:2], {"role": "assistant", "content": "edited"}, user("go on")])

    rollout, turns = episode(tiny_tokenizer, script, ["one", "two", "detail", "three", "four"])
    branches = rollout.branches
    assert len(branches) == 4
    first, sub, again, edited = (branch.token_ids for branch in branches)
    one, two, detail, three, four = (turn.completion.token_ids for turn in turns)
    assert first.count(one[0]) >= 1
    for ids, turn, said in zip((first, sub, again, edited), turns[1:], (two, detail, three, four), strict=True):
        assert ids == turn.request.prompt_ids + said
    assert again[: len(first)] == first  # the sampled ids of both turns, though the sub-agent spoke between
    assert again[len(first) :][-len(three) :] == three
    assert tiny_tokenizer.decode(edited).endswith("edited<|eot|><|header_start|>user<|header_end|>\n\ngo on"
        "<|eot|><|header_start|>assistant<|header_end|>\n\nfour<|eot|>")  # fmt: skip
    trained = [segment.token_ids for segment in rollout.segments if segment.trained]
    assert trained == [one, two, detail, three, four]  # each once


def test_the_same_call_twice_is_a_branch_of_its_own(tiny_tokenizer):
    async def script(client):
        await chat(client, [user("a question")])
        await chat(client, [user("a question")])

    rollout, turns = episode(tiny_tokenizer, script, ["one", "two"])
    assert [turn.request.prompt_ids for turn in turns] == [rollout.prompt_ids] * 2
    assert [branch.token_ids[len(rollout.prompt_ids) :] for branch in rollout.branches] == [
        turn.completion.token_ids for turn in turns
    ]


def test_a_seed_decides_a_turn_by_its_episode_and_all_that_was_read(tiny_tokenizer):
    """What the engine is asked for; and a turn that only repeats another one is not trained on."""

    async def script(client):
        first = [user("a question")]
        said = await chat(client, first, seed=7)
        await chat(client, first, seed=7)
        await chat(client, first, seed=8)
        await chat(client, first)
        await chat(client, [*first, said, user("go on")], seed=7)
        answer = await client.post("/completions", json={"model": "policy", "prompt": [5, 6], "seed": -(2**63)})
        assert answer.status_code == 200

    def seeds(row: str) -> list[int | None]:
        rollout, turns = episode(tiny_tokenizer, script, [*["one"] * 3, "two", "three", "four"], row=question(row))
        trained = [segment.trained for segment in rollout.segments if segment.sampler_logprobs is not None]
        assert trained == [True, False, True, True, True, True]
        return [turn.request.seed for turn in turns]

    found = seeds("r")
    assert found[0] == found[1]
    assert found[3] is None
    given = [found[0], found[2], found[4], found[5]]
    assert len(set(given)) == 4
    assert all(isinstance(seed, int) and 0 <= seed < 2**63 for seed in given)
    assert seeds("r") == found  # when the episode is made again
    assert not set(seeds("other")) & set(given)  # rows of one prompt


@pytest.mark.slow  # because vLLM starts a process when it is imported
def test_calls_of_tools_are_read_and_their_results_are_a_suffix():
    from posttrain.base.tokenizer import build_tokenizer

    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = HERMES
    tools = declared_tools(CALCULATOR)
    seen: list[Any] = []

    async def script(client):
        messages = [user("6 * 7?")]
        said = await chat(client, messages, tools=tools)
        seen.append(said)
        (call,) = said["tool_calls"]
        result = calculate(**json.loads(call["function"]["arguments"]))
        messages += [said, {"role": "tool", "tool_call_id": call["id"], "name": "calculate", "content": result}]
        seen.append(await chat(client, messages, tools=tools))
        seen.append(await chat(client, messages, tools=tools, tool_choice="none"))

    call = '<tool_call>{"name": "calculate", "arguments": {"expression": "6 * 7"}}</tool_call>'
    rollout, turns = episode(tokenizer, script, [call, '<tool_call>{"name": "calc', "42"])
    assert (seen[0]["content"], len(seen[0]["tool_calls"])) == (None, 1)
    assert seen[1]["content"] == '<tool_call>{"name": "calc'  # as from vLLM's server
    assert (len(rollout.branches), len(turns)) == (2, 3)
    assert "tool<|header_end|>\n\n42<|eot|>" in tokenizer.decode(turns[1].request.prompt_ids)
    assert turns[1].request.prompt_ids[: len(turns[0].request.prompt_ids)] == turns[0].request.prompt_ids
    assert turns[0].completion.token_ids == rollout.segments[0].token_ids or rollout.segments[1].trained
    assert "Tools:" not in tokenizer.decode(turns[2].request.prompt_ids)
    parts = rollout.scored.result.parts
    assert (parts["turns"], parts["tool_calls"], parts["malformed_calls"]) == (3, 1, 1)


def test_completions_go_on_from_the_tokens_that_were_sampled(tiny_tokenizer):
    async def script(client):
        answer = await client.post("/completions", json={"model": "policy", "prompt": "Once", "max_tokens": 4})
        said = answer.json()["choices"][0]
        assert (said["finish_reason"], answer.json()["usage"]["completion_tokens"]) == ("length", 4)
        await client.post("/completions", json={"model": "policy", "prompt": f"Once{said['text']} more"})
        await client.post("/completions", json={"model": "policy", "prompt": [5, 6, 7], "logprobs": 1})
        await client.post("/completions", json={"model": "policy", "prompt": [5]})
        await client.post("/completions", json={"model": "policy", "prompt": [[5, 6]]})

    rollout, turns = episode(tiny_tokenizer, script, ["there was", "x", "y", "z", "w"])
    before = turns[0].request.prompt_ids + turns[0].completion.token_ids
    assert before[-4:] == turns[0].completion.token_ids
    assert turns[1].request.prompt_ids[: len(before)] == before
    assert [turn.request.prompt_ids for turn in turns[2:]] == [(5, 6, 7), (5,), (5, 6)]
    assert sum(segment.trained for segment in rollout.segments) == 5


def test_an_answer_is_in_the_form_that_was_asked_for(tiny_tokenizer):
    async def script(client):
        body = {"model": "policy", "messages": [user("a question")], "logprobs": True, "stop": ["o t"], "seed": 1,
                "temperature": 0.3, "top_p": 0.5, "max_completion_tokens": 9, "user": "me"}  # fmt: skip
        whole = (await client.post("/chat/completions", json=body)).json()
        told = whole["choices"][0]
        assert (told["message"]["content"], told["finish_reason"]) == ("one tw", "length")  # without the stop text
        assert [item["logprob"] for item in told["logprobs"]["content"]] == [-0.25 * (at % 4) for at in range(9)]
        assert "".join(item["token"] for item in told["logprobs"]["content"]) == "one two t"
        assert whole["usage"]["completion_tokens"] == 9
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}, "logprobs": None}
        lines = (await client.post("/chat/completions", json=streamed)).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        assert lines[-2:] == ["data: [DONE]", ""]
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events[:-1]) == "one tw"
        assert events[-2]["choices"][0]["finish_reason"] == "length"
        assert events[-1]["usage"] == whole["usage"]
        models = (await client.get("/models")).json()["data"]
        assert [model["id"] for model in models] == ["policy"]
        await client.post("/reward", json={"reward": 0.5})

    rollout, turns = episode(tiny_tokenizer, script, ["one two three"] * 2)
    assert [(turn.request.temperature, turn.request.max_tokens) for turn in turns] == [(1.0, 9)] * 2
    assert turns[0].request.stop == ("o t",)
    assert rollout.scored.result.value == 0.5
    assert rollout.scored.result.parts["turn 2"] == 0.5


def test_a_call_may_set_its_temperature_if_the_yaml_says_so(tiny_tokenizer):
    async def script(client):
        await chat(client, [user("?")], temperature=0.5)

    rollout, (turn,) = episode(tiny_tokenizer, script, ["one"], own_temperature=True)
    assert turn.request.temperature == 0.5
    assert not any(segment.trained for segment in rollout.segments)


@pytest.mark.parametrize(
    ("path", "fields", "status", "problem"),
    [
        ("chat/completions", {"n": 2}, 400, "n: got 2; one choice is sampled"),
        ("chat/completions", {"model": "gpt-9"}, 404, "model: got 'gpt-9'; there is 'policy'"),
        ("chat/completions", {"messages": []}, 400, "messages: there is none"),
        (
            "chat/completions",
            {"messages": [{"role": "wizard"}]},
            400,
            "Invalid enum value 'wizard' - at `$.messages[0]",
        ),
        ("chat/completions", {"messages": [user("x" * MAX_BYTES)]}, 413, f"has more than {MAX_BYTES} bytes"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "no form can be forced"),
        ("chat/completions", {"tool_choice": "required"}, 400, "no call can be forced"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens is 0"),
        ("chat/completions", {"seed": "7"}, 400, "Expected `int | null`, got `str` - at `$.seed`"),
        ("completions", {"prompt": [5], "seed": 2**64}, 400, "seed is 18446744073709551616; it must be a whole number"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "text only"),
        ("chat/completions", {"tools": [{"type": "function"}]}, 400, "tools: [0] is"),
        ("completions", {"prompt": ["a", "b"]}, 400, "it must be one text"),
        ("completions", {"prompt": [1, 10**9]}, 400, "prompt: got the id 1000000000"),
        ("reward", {"reward": "much"}, 400, "Expected `float`"),
        ("embeddings", {}, 404, "there is no POST /v1/embeddings"),
    ],
)
def test_what_cannot_be_followed_is_refused_in_the_form_of_openai(tiny_tokenizer, path, fields, status, problem):
    async def script(client):
        body = {"model": "policy", "messages": [user("?")], **fields}
        answer = await client.post(path, json=body)
        assert answer.status_code == status, answer.text
        assert problem in answer.json()["error"]["message"]
        assert (await client.post("/models", json={})).status_code == 404
        await chat(client, [user("?")])  # and the episode goes on

    rollout, _ = episode(tiny_tokenizer, script, ["one"])
    assert rollout.scored.result.value == 0.0


def test_a_key_opens_its_own_episode_alone_and_while_it_runs(tiny_tokenizer):
    kept: list[httpx.AsyncClient] = []

    async def script(client):
        refused = await client.get("/models", headers={"Authorization": "Bearer sk-other"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert (await client.post("/chat/completions", content=b"{")).status_code == 400
        await chat(client, [user("?")])
        more = await client.post("/chat/completions", json={"model": "policy", "messages": [user("?")]})
        assert (more.status_code, more.json()["error"]["code"]) == (403, "max_calls")
        kept.append(client)

    rollout, _ = episode(tiny_tokenizer, script, ["one"], max_calls=1)
    assert rollout.scored.result.value == 0.0

    async def late() -> int:
        client = kept[0]
        headers, transport = client.headers, client._transport
        async with httpx.AsyncClient(transport=transport, base_url=client.base_url, headers=headers) as again:
            return (await again.get("/models")).status_code

    assert asyncio.run(late()) == 401


def test_a_full_context_is_told_as_openai_does_and_a_shorter_history_may_follow(tiny_tokenizer):
    async def script(client):
        long = await client.post("/chat/completions", json={"model": "policy", "messages": [user("word " * 200)]})
        assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
        await chat(client, [user("short")])

    rollout, (turn,) = episode(tiny_tokenizer, script, ["one"], length=100)
    assert len(turn.request.prompt_ids) < 50
    assert rollout.finish_reason == FinishReason.STOP


# ---------------------------------------------------------------- its YAML


def test_a_command_is_short_for_the_built_in_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_agent.py").write_text("")
    config = EnvironmentConfig.model_validate({"command": ["python", "my_agent.py"], "args": {"max_calls": 3}})
    assert (config.name, config.args) == (AGENT, {"max_calls": 3, "command": ["python", "my_agent.py"]})
    assert EnvironmentConfig.model_validate(config.model_dump()) == config
    assert (config.limit, EnvironmentConfig(name="calculator").limit) == (16, None)
    assert AGENT == commands.AGENT
    check_environment(AGENT, config.args)
    assert tmp_path / "my_agent.py" in environment_sources(AGENT, config.args)
    with pytest.raises(ConfigError, match="short for the name agent"):
        validate_config(EnvironmentConfig, {"command": ["x"], "name": "calculator"}, "environment")
    assert with_reward({"environment": "calculator"}) == {"environment": "calculator"}  # refused with its key, later
    assert with_reward({"environment": {"command": ["x"]}})["reward"]["name"] == OF_ENVIRONMENT
    assert "reward" not in with_reward({"environment": {"command": ["x"], "args": {"scored_by": "reward"}}})
    by = {"by_capability": {"a": {"command": ["python", "my_agent.py"], "args": {"scored_by": "reward"}}}}
    config = EnvironmentConfig.model_validate(by)
    assert (config.key_of("a"), config.gives_reward("a"), config.gives_reward("b")) == ("a", False, False)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("python my_agent.py", "write a list of words"),
        (["no-such-program"], "there is no program 'no-such-program'"),
        (["python", "no_agent.py"], "there is no file no_agent.py"),
        ([], "write a list of words"),
    ],
)
def test_a_command_is_checked_before_the_run(command, problem):
    with pytest.raises(PluginError, match=problem):
        check_environment(AGENT, {"command": command})


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ({"command": None}, r'args.command: got None; write a list of words, such as \["python", "my_agent.py"\]'),
        ({"max_call": 3}, "unexpected keyword argument 'max_call'"),
        ({"max_calls": 0}, "args.max_calls: got 0"),
        ({"scored_by": "me"}, "args.scored_by: got 'me'; it must be agent or reward"),
        ({"own_temperature": 1}, "args.own_temperature: got 1"),
        ({"model": ""}, "args.model: got ''"),
    ],
)
def test_the_arguments_of_an_agent_are_checked_before_the_run(args, problem):
    with pytest.raises(PluginError, match=problem):
        check_environment(AGENT, {"command": ["python"], **args})


def test_of_a_long_error_the_beginning_is_told():
    trace = "Traceback (most recent call last):\n" + '  File "my_agent.py", line 1\n' * 30
    assert end_of(f"{trace}ValueError: short\n").endswith("line 1\nValueError: short")
    told = end_of(f"{trace}openai.BadRequestError: tool_parser is not known; name one: {'hermes, ' * 200}")
    assert told.startswith("openai.BadRequestError: tool_parser is not known; name one: hermes, ")
    assert (len(told), end_of("")) == (403, "")


def test_a_row_reaches_an_agent_as_json():
    from posttrain.episodes.agents.environment import _given, _reward

    row = question("r", answer=42, level=3)
    begin = Begin(1, "", None, row.messages, [], 7, 100)
    given = msgspec.json.decode(_given(Session(begin, lambda _: None, lambda _: None), row))
    assert given == {
        "id": "r",
        "capability": "tools",
        "messages": [user("a question")],
        "answer": 42,
        "level": 3,
        "seed": 7,
        "tools": [],
    }
    assert (_reward("0.5").value, _reward("1").value, _reward('{"reward": 2, "parts": {"a": 1}}').parts) == (
        0.5,
        1.0,
        {"a": 1.0},
    )
    for line in ("", "done", "nan", '{"score": 1}', "true"):
        with pytest.raises(PluginError, match="the agent gave no reward"):
            _reward(line)


# ---------------------------------------------------------------- agents in processes

AGENT_FILE = """
import json, os, pathlib, signal, subprocess, sys, time, urllib.request

row = json.loads(sys.stdin.readline())
here = pathlib.Path(__file__).parent

def ask(path="/chat/completions", key=os.environ["OPENAI_API_KEY"], **fields):
    body = {"model": os.environ["OPENAI_MODEL"], "messages": row["messages"], **fields}
    request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + path, json.dumps(body).encode(),
                                     {"Authorization": f"Bearer {key}", "Content-Type": "application/json"})
    try:
        return json.load(urllib.request.urlopen(request))
    except urllib.error.HTTPError as error:
        sys.exit(json.load(error)["error"]["message"])

what = row["id"]
if what == "silent": sys.exit()
if what == "ignores the key": ask(key="sk-mine")
if what == "unknown model": ask(model="gpt-9")
if what == "40 MB": ask(messages=[{"role": "user", "content": "x" * 40_000_000}])
if what == "two choices": ask(n=2)
if what == "full": ask(messages=[{"role": "user", "content": "word " * 5000}])
if what == "openai":
    import openai
    client = openai.OpenAI()
    said = client.chat.completions.create(model="policy", messages=row["messages"]).choices[0].message
    more = [*row["messages"], said, {"role": "user", "content": "go on"}]
    for event in client.chat.completions.create(model="policy", messages=more, stream=True): pass
    print(json.dumps({"reward": 0.5, "parts": {"style": 1}}))
    sys.exit()
ask()
match what:
    case "exits": sys.exit(1)
    case "dies": os.kill(os.getpid(), signal.SIGKILL)
    case "sleeps": time.sleep(1000)
    case "children":
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        (here / "child.pid").write_text(str(child.pid))
    case "memory": kept = bytearray(20 << 30)
    case "calls for ever":
        while True: ask()
    case "posts": ask("/reward", reward=0.25), ask("/reward", reward=0.5), print("the answer is 4")
    case "words":
        print("the answer is 4")
        sys.exit()
    case "waits":
        with open(here / "started", "a") as file: file.write(f"{os.getpid()}\\n")
        while not (here / "go").exists(): time.sleep(0.02)
        ask(messages=[*row["messages"], {"role": "user", "content": "more"}])
    case "prints":
        for _ in range(1000): print("x" * 1000, file=sys.stderr)
print(0.75)
"""


@pytest.fixture
def agent_file(tmp_path):
    (tmp_path / "my_agent.py").write_text(AGENT_FILE)
    return tmp_path / "my_agent.py"


def agents(path: Any, **given: Any) -> dict[str, Any]:
    return {"command": ["python", str(path)], "timeout_s": 6.0, **given}


@pytest.mark.slow
def test_what_an_agent_does_costs_its_own_episode(agent_file, tiny_tokenizer):
    """All under one gateway. What has no score says why."""
    failures = {
        "exits": (Outcome.ERROR, "the agent exited with code 1"),
        "dies": (Outcome.INFRASTRUCTURE, "the agent was killed by signal 9, in 2 tries"),
        "sleeps": (Outcome.TIMEOUT, "the environment did nothing for 6 s"),
        "memory": (Outcome.ERROR, "MemoryError"),
        "silent": (Outcome.ERROR, "the agent ended before the policy had a turn"),
        "ignores the key": (Outcome.ERROR, "the key is that of no running episode"),
        "unknown model": (Outcome.ERROR, "model: got 'gpt-9'; there is 'policy'"),
        "40 MB": (Outcome.ERROR, f"the call has more than {MAX_BYTES} bytes"),
        "two choices": (Outcome.ERROR, "n: got 2; one choice is sampled for a call"),
        "calls for ever": (Outcome.ERROR, "this episode has had its 20 calls (max_calls)"),
        "words": (Outcome.ERROR, "the last line of its output is 'the answer is 4'"),
    }
    rewards = {"posts": 0.75, "prints": 0.75, "children": 0.75}
    rows = [question(name) for name in [*failures, *rewards, "full"]]
    found = play(tiny_tokenizer, agents(agent_file, args={"max_calls": 20}, at_once=4), rows, lambda _: "4 4")
    for name, (outcome, reason) in failures.items():
        scored = found[name][0].scored
        assert (scored.outcome, scored.result) == (outcome, None), (name, scored)
        assert reason in scored.reason, (name, scored)
    for name, reward in rewards.items():
        scored = found[name][0].scored
        assert (scored.outcome, scored.result and scored.result.value) == (Outcome.SCORED, reward), (name, scored)
    full = found["full"][0]
    assert (full.scored.result.value, full.finish_reason) == (0.0, FinishReason.LENGTH)
    assert is_gone(int((agent_file.parent / "child.pid").read_text()))


@pytest.mark.slow
def test_the_agent_of_nodes_and_edges_in_the_docs_calls_its_tools(tmp_path):
    """Two calls in one turn, of which one fails; what the policy said is trained on, in one branch."""
    from posttrain.base.tokenizer import build_tokenizer

    page = (Path(__file__).parent.parent / "docs" / "environments.md").read_text()
    (block,) = (part for part in page.split("```python\n") if part.startswith("# graph_agent.py"))
    (tmp_path / "graph_agent.py").write_text(block.partition("```")[0])
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = HERMES
    calls = "".join(
        f'<tool_call>{{"name": "multiply", "arguments": {{"a": 6, "{name}": 7}}}}</tool_call>' for name in "bc"
    )
    found = play(
        tokenizer,
        agents(tmp_path / "graph_agent.py", timeout_s=60.0),
        [question("r", answer=42)],
        lambda turn: "42" if turn.number > 1 else calls,
        length=2000,
        max_tokens=300,
    )
    (rollout,) = found["r"]
    assert rollout.scored.result.value == 1.0, rollout.scored
    assert (rollout.scored.result.parts["turns"], rollout.scored.result.parts["tool_calls"]) == (2, 2)
    assert len(rollout.branches) == 1
    shown, _, results, answer = rollout.segments  # the agent shows its tools, which the prompt of the row does not
    assert [segment.trained for segment in rollout.segments] == [False, True, False, True]
    told = tokenizer.decode(results.token_ids)
    assert told.index("tool<|header_end|>\n\n42<|eot|>") < told.index("tool<|header_end|>\n\nError: ")
    assert "multiply" in tokenizer.decode(shown.token_ids)
    assert tokenizer.decode(answer.token_ids) == "42<|eot|>"


@pytest.mark.slow
def test_episodes_of_agents_begin_again_when_the_gateway_is_killed(agent_file, tiny_tokenizer):
    """With the turns that they had. One agent has the client of OpenAI; the stage's own reward is to score both."""
    started, asked = agent_file.parent / "started", []

    async def kill(rollouter: Any) -> None:
        while not started.exists() or not started.read_text().endswith("\n"):
            await asyncio.sleep(0.05)
        (pid,) = rollouter.pool.pids
        os.kill(pid, signal.SIGKILL)
        while not rollouter.pool.num_restarts:
            await asyncio.sleep(0.02)
        (agent_file.parent / "go").touch()

    def says(turn: Any) -> str:
        asked.append((turn.session.row.id, turn.number))
        return "4"

    given = agents(agent_file, args={"scored_by": "reward"}, timeout_s=60.0)
    found = play(tiny_tokenizer, given, [question("waits"), question("openai")], says, beside=kill)
    for name, branches in (("waits", 2), ("openai", 1)):
        ((rollout),) = found[name]
        assert (rollout.scored, len(rollout.branches)) == (None, branches)
        assert sum(segment.trained for segment in rollout.segments) == 2
    assert len([name for name, _ in asked if name == "waits"]) == 2  # no turn was sampled twice
    assert is_gone(int(started.read_text().split()[0]))
