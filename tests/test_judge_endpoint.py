"""The judge at an OpenAI-compatible endpoint, against real servers that answer well, badly, late or not at all."""

import asyncio
import json
import logging
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from judge_server import MODEL, Server, chat, error, serving, unused_url
from rollout_records import one_turn
from starlette.responses import PlainTextResponse

from posttrain.config.base import validate_config
from posttrain.context import StageContext
from posttrain.data.rows import load_rows
from posttrain.errors import ConfigError, DataError, StageError, UserError
from posttrain.files import read_jsonl
from posttrain.filtering.config import FilterConfig
from posttrain.filtering.stage import run
from posttrain.judging.backend import open_judge, prepare_judge, rate_all
from posttrain.judging.config import EndpointConfig
from posttrain.judging.forms import FORMS, label_logprobs, read_answer
from posttrain.judging.preflight import check_server
from posttrain.judging.prompts import JudgePrompts, Question
from posttrain.judging.verdicts import Undecided, Verdict
from posttrain.pipeline.inputs import input_problems
from posttrain.pipeline.kinds import KINDS
from posttrain.pipeline.packages import package_problems
from posttrain.records import Message, Outcome, Row, Scored
from posttrain.rl.config import RlConfig

LABELS = ["easy", "medium", "hard"]
GOOD = {"easy": math.log(0.2), "medium": math.log(0.3), "hard": math.log(0.4), "Well": math.log(0.0001)}


def config_of(url: str, folder: Path | None = None, **endpoint: Any) -> FilterConfig:
    quick = {"retries": 2, "timeout_s": 5.0, "max_wait_s": 2.0, "concurrency": 4}
    data = {
        "judge": {"endpoint": {"base_url": url, "model": MODEL, **quick, **endpoint}},
        "data": {"path": str((folder or Path()) / "rows.jsonl")},
        "template": "Rate: {prompt}",
    }
    return validate_config(FilterConfig, data, "test")


def write_rows(folder: Path, count: int) -> None:
    rows = [{"id": f"r{i}", "prompt": f"Sum: {i} + {i}", "completion": str(2 * i)} for i in range(count)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def context_of(folder: Path) -> StageContext:
    (folder / "stage").mkdir(exist_ok=True)
    return StageContext("filter", folder / "stage", folder / "events.jsonl")


def rate(server: Server, folder: Path, count: int, **endpoint: Any) -> list[Verdict | Undecided]:
    """The answers to `count` questions."""
    prepared = prepare_judge(config_of(server.url, **endpoint))
    with open_judge(prepared, context_of(folder), None) as judge:
        return rate_all(judge, [Question(f"r{i}", f"Rate: {i}") for i in range(count)])


def rate_broken(server: Server, answer: Any, folder: Path, count: int = 1, **endpoint: Any) -> list[Any]:
    """The answers of a server that was well when the stage began, and then answers like this."""
    prepared = prepare_judge(config_of(server.url, **endpoint))
    server.answer = answer
    with open_judge(prepared, context_of(folder), None) as judge:
        return rate_all(judge, [Question(f"r{i}", f"Rate: {i}") for i in range(count)])


# --- answers ---


def test_log_probabilities_give_the_distribution(tmp_path):
    with serving(lambda body: chat("hard", GOOD)) as server:
        [answer] = rate(server, tmp_path, 1)
        [asked] = server.questions()
    assert isinstance(answer, Verdict)
    assert answer.probabilities == pytest.approx({"easy": 2 / 9, "medium": 3 / 9, "hard": 4 / 9})
    assert answer.tag == "hard"
    assert asked["messages"] == [{"role": "user", "content": "Rate: 0"}]
    assert (asked["model"], asked["temperature"], asked["logprobs"], asked["top_logprobs"]) == (MODEL, 0, True, 20)
    assert asked["structured_outputs"] == {"choice": LABELS}


def test_without_log_probabilities_the_answer_itself_counts(tmp_path):
    with serving(lambda body: chat(" medium\n")) as server:
        [answer] = rate(server, tmp_path, 1)
    assert isinstance(answer, Verdict)
    assert (answer.tag, answer.score, answer.probabilities["medium"]) == ("medium", 0.5, 1.0)


def only(*names: str):
    """A server that refuses every parameter of a request but these."""

    def answer(body: dict[str, Any]) -> Any:
        unknown = set(body) - {"model", "messages", "temperature", "max_tokens", *names}
        if unknown:
            return error(400, f"Unknown parameter: {min(unknown)}")
        label = chat('{"label": "hard"}') if "response_format" in body else chat("hard", GOOD)
        return label if "logprobs" in body or "response_format" in body else chat("hard")

    return answer


@pytest.mark.parametrize(
    ("names", "form", "score"),
    [
        (("structured_outputs", "logprobs", "top_logprobs"), "choice with log-probabilities", 11 / 18),
        (("logprobs", "top_logprobs"), "log-probabilities", 11 / 18),
        (("response_format",), "json", 1.0),
        ((), "text", 1.0),
    ],
)
def test_the_best_form_that_the_server_takes_is_used(tmp_path, names, form, score):
    with serving(only(*names)) as server:
        [answer] = rate(server, tmp_path, 1)
    assert isinstance(answer, Verdict)
    assert answer.score == pytest.approx(score)
    [event] = [line for line in read_jsonl(tmp_path / "events.jsonl") if line["event"] == "judge_endpoint"]
    assert event["form"] == form


def test_a_server_that_ignores_a_constraint_and_writes_prose_is_asked_for_json(tmp_path):
    def answer(body: dict[str, Any]) -> Any:
        return chat('{"label": "easy"}') if "response_format" in body else chat("I would say that it is easy.")

    with serving(answer) as server:
        [found] = rate(server, tmp_path, 1)
    assert isinstance(found, Verdict)
    assert found.tag == "easy"


def test_a_server_that_takes_no_form_is_refused():
    with serving(lambda body: error(400, "Unsupported parameter: 'max_tokens'")) as server:  # noqa: SIM117
        with pytest.raises(UserError, match=r"takes no request for a label; .*Unsupported parameter: 'max_tokens'"):
            prepare_judge(config_of(server.url))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (chat("It is hard."), "'It is hard.', which is none of the labels"),
        (chat("hard easy"), "none of the labels"),
        (chat("Hard"), "none of the labels"),
        (chat(""), "an empty answer"),
        (chat("tough", {"tough": -0.1, "easy": -3.0, "medium": -3.0, "hard": -3.0}), "none of the labels"),
        ({"choices": []}, "`choices` is empty"),
        ({"error": "no"}, "missing required field `choices`"),
        ({"choices": [{"message": {"content": 7}}]}, r"Expected `str | null`, got `int` - at `$.choices[0].message"),
    ],
)
def test_what_is_not_exactly_one_label_is_undecided(tmp_path, answer, reason):
    with serving(lambda body: chat("hard", GOOD)) as server:
        [found] = rate_broken(server, lambda body: answer, tmp_path)
    assert isinstance(found, Undecided)
    assert found.outcome == "error"
    assert reason in found.reason


@pytest.mark.parametrize("text", ["[1]", '{"label": "easy", "why": "short"}', '{"label": 1}', "easy", "{"])
def test_json_that_is_not_exactly_one_label_is_undecided(text):
    assert isinstance(read_answer(chat(text), FORMS[2], LABELS), Undecided)
    assert isinstance(read_answer(chat('{"label": "easy"}'), FORMS[2], LABELS), Verdict)


# --- log-probabilities of labels ---


def test_a_label_begins_with_the_longest_token_that_begins_no_other():
    tokens = {"med": -0.5, "m": -3.0, "hard": -1.5, " easy": -2.0, "easy": -2.5, "x": -12.0}
    assert label_logprobs(tokens, LABELS) == [-2.5, -0.5, -1.5]
    assert label_logprobs({"easy": -0.1, "\u0120hard": -3.0, "\u2581medium": -4.0}, LABELS) == [-0.1, -4.0, -3.0]


def test_a_label_that_is_not_among_the_tokens_counts_only_where_it_cannot_matter():
    rare = {"easy": -0.1, "medium": -3.0, "x": -9.0}
    assert label_logprobs(rare, LABELS) == [-0.1, -3.0, -math.inf]
    assert label_logprobs({"easy": -0.7, "x": -0.8, "y": -3.0}, LABELS) is None
    assert label_logprobs({}, LABELS) is None
    assert label_logprobs({"easy": float("nan"), "hard": -1.0}, LABELS) is None


def test_a_token_that_begins_two_labels_tells_neither():
    assert label_logprobs({"right": -0.1, "wrong": -2.5}, ["wrong", "right", "rightish"]) is None
    assert isinstance(read_answer(chat("right", {"right": -0.1}), FORMS[0], ["wrong", "right", "rightish"]), Verdict)


@given(st.dictionaries(st.sampled_from([*LABELS, "e", "ha", " medium", "x", ""]), st.floats(-60, 0), max_size=8))
def test_a_distribution_never_hides_more_than_the_open_mass(tokens):
    found = label_logprobs(tokens, LABELS)
    if found is not None:
        known = sum(math.exp(value) for value in found)
        assert found.count(-math.inf) * math.exp(min(tokens.values())) <= 0.005 * known * (1 + 1e-9)


# --- faults that pass, and faults that do not ---


def test_a_busy_server_is_asked_again_when_it_says(tmp_path):
    calls: list[int] = []

    def answer(body: dict[str, Any]) -> Any:
        calls.append(1)
        return error(429, "slow down", {"Retry-After": "1"}) if len(calls) == 1 else chat("easy", GOOD)

    with serving(lambda body: chat("easy", GOOD)) as server:
        [found] = rate_broken(server, answer, tmp_path)
        waited = server.times[-1] - server.times[-2]
    assert isinstance(found, Verdict)
    assert len(calls) == 2
    assert waited >= 1.0


def test_errors_of_the_server_pass(tmp_path):
    statuses = [500, 502]

    def answer(body: dict[str, Any]) -> Any:
        return error(statuses.pop()) if statuses else chat("easy", GOOD)

    with serving(lambda body: chat("easy", GOOD)) as server:
        [found] = rate_broken(server, answer, tmp_path)
    assert isinstance(found, Verdict)


@pytest.mark.parametrize(
    ("answer", "reason", "tries"),
    [
        (error(500, "broken"), "status 500: broken", 3),
        (error(503, "busy", {"Retry-After": "3600"}), "asks to wait 3600 s; max_wait_s is 2", 1),
        (error(401), "wants a key", 1),
        (error(404, "no such model"), "status 404: no such model", 1),
    ],
)
def test_an_outage_is_told_and_never_a_verdict(tmp_path, answer, reason, tries):
    with serving(lambda body: chat("easy", GOOD)) as server:
        [found] = rate_broken(server, lambda body: answer, tmp_path)
        assert len(server.questions()) == tries
    assert isinstance(found, Undecided)
    assert found.outcome == "infrastructure"
    assert reason in found.reason


def test_a_request_that_the_server_refuses_is_no_outage(tmp_path):
    with serving(lambda body: chat("easy", GOOD)) as server:
        found = rate_broken(
            server,
            lambda body: error(400, "too long") if body["messages"][0]["content"] == "Rate: 3" else chat("easy", GOOD),
            tmp_path,
            10,
        )
    assert [type(item) for item in found].count(Undecided) == 1
    assert found[3] == Undecided(Outcome.ERROR, f"{server.url}: status 400: too long")


def test_a_slow_server_is_not_waited_for(tmp_path):
    async def late() -> Any:
        await asyncio.sleep(30)

    with serving(lambda body: chat("easy", GOOD)) as server:
        [found] = rate_broken(server, lambda body: late(), tmp_path, timeout_s=1.0, retries=1)
        assert len(server.questions()) == 2
    assert found == Undecided(Outcome.INFRASTRUCTURE, f"{server.url}: no answer within 1 s")


def test_a_server_that_is_gone_is_not_asked_about_every_row(tmp_path):
    with serving(lambda body: chat("easy", GOOD)) as server:
        found = rate_broken(server, lambda body: error(500), tmp_path, 200, retries=0)
        assert len(server.questions()) < 20
    assert all(isinstance(item, Undecided) and item.outcome == "infrastructure" for item in found)


def test_no_more_requests_are_in_flight_than_allowed(tmp_path):
    flying, most = 0, 0

    async def answer() -> Any:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.02)
        flying -= 1
        return chat("easy", GOOD)

    with serving(lambda body: answer()) as server:
        prepared = prepare_judge(config_of(server.url, concurrency=3))
        questions = [Question(f"r{i}", f"Rate: {i}") for i in range(12)]

        async def two_groups() -> Any:
            await judge.start()
            try:
                return await asyncio.gather(judge.rate(questions), judge.rate(questions))
            finally:
                await judge.close()

        with open_judge(prepared, context_of(tmp_path), None) as judge:
            found = asyncio.run(two_groups())
            found += asyncio.run(two_groups())  # RL has one event loop for the profile and one for training
    assert most == 3
    assert all(isinstance(item, Verdict) for answers in found for item in answers)


# --- before anything starts ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"models": ["a", "b"]}, r"judge\.endpoint\.model: got 'judge-1', which .* does not serve; it serves: a, b"),
        ({"models": PlainTextResponse("<html>")}, r"judge\.endpoint\.base_url: .*/models does not answer with a list"),
        ({"models": error(503, "starting")}, r"status 503: starting"),
        (
            {"key": "secret"},
            r"wants a key; name the environment variable that holds it in judge\.endpoint\.api_key_env",
        ),
    ],
)
def test_a_server_that_cannot_be_used_is_refused(given, message):
    with serving(lambda body: chat("easy", GOOD), **given) as server:
        with pytest.raises(UserError, match=message):
            prepare_judge(config_of(server.url))
        with pytest.raises(UserError, match=message):
            check_server(_endpoint(config_of(server.url)))
        assert server.bodies == []


def _endpoint(config: FilterConfig) -> EndpointConfig:
    assert isinstance(config.source, EndpointConfig)
    return config.source


def test_a_server_that_is_down_is_refused():
    with pytest.raises(UserError, match=r"judge\.endpoint: http://127\.0\.0\.1:\d+/v1: no connection"):
        prepare_judge(config_of(unused_url()))


def test_a_server_without_a_list_of_models_is_asked_at_once(tmp_path):
    with serving(lambda body: chat("easy", GOOD), models=error(404)) as server:
        assert all(isinstance(item, Verdict) for item in rate(server, tmp_path, 2))


def test_the_key_comes_from_the_environment_and_is_never_told(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", "top-secret-7")
    monkeypatch.setenv("OPENAI_API_KEY", "another-secret")
    with serving(lambda body: chat("easy", GOOD), key="top-secret-7") as server:
        [found] = rate(server, tmp_path, 1, api_key_env="JUDGE_KEY")
        assert isinstance(found, Verdict)
        server.key = None
        [broken] = rate_broken(
            server, lambda body: error(400, "bad key top-secret-7"), tmp_path, api_key_env="JUDGE_KEY"
        )
        assert "bad key [key]" in broken.reason
        server.key = "other"
        with pytest.raises(UserError, match=r"refuses the key in the environment variable JUDGE_KEY \(401\)") as told:
            prepare_judge(config_of(server.url, api_key_env="JUDGE_KEY"))
    assert "secret" not in str(told.value) + caplog.text + (tmp_path / "events.jsonl").read_text()


def test_without_a_key_none_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "another-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "an-organization")
    with serving(lambda body: chat("easy", GOOD)) as server:
        rate(server, tmp_path, 1)
        assert not any("authorization" in sent or "openai-organization" in sent for sent in server.headers)


# --- configs ---

URL = "http://127.0.0.1:8000/v1"


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        ({}, "judge: has neither path nor endpoint"),
        ({"path": "m", "endpoint": {"base_url": URL, "model": "m"}}, "judge: has both path and endpoint"),
        ({"dtype": "float32", "endpoint": {"base_url": URL, "model": "m"}}, "judge: has both dtype and endpoint"),
        ({"endpoint": {"base_url": "ftp://x/v1", "model": "m"}}, "got 'ftp://x/v1': must begin with http:// or https"),
        ({"endpoint": {"base_url": "localhost:8000", "model": "m"}}, "must begin with http:// or https://"),
        ({"endpoint": {"base_url": URL, "model": "m", "api_key_env": "sk-123"}}, "must be the name of an environment"),
        ({"endpoint": {"base_url": "https://me:sk-123@x/v1", "model": "m"}}, "without user, password"),
        ({"endpoint": {"base_url": URL, "modl": "m"}}, "judge.endpoint.modl: unknown key; did you mean 'model'"),
        ({"pth": "m"}, "judge.pth: unknown key; did you mean 'path'"),
    ],
)
def test_a_judge_has_exactly_one_form(judge, problem):
    with pytest.raises(ConfigError) as told:
        validate_config(FilterConfig, {"judge": judge, "data": {"path": "rows.jsonl"}}, "test")
    assert problem in str(told.value)
    assert "sk-123" not in str(told.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"engine": {}}, "an endpoint needs no engine"),
        ({"resources": {"judge": {"workers": 2}}}, "an endpoint needs no engines"),
        ({"max_prompt_tokens": 100}, "set endpoint.max_prompt_chars instead"),
    ],
)
def test_what_only_engines_need_is_refused_with_an_endpoint(changes, problem):
    data = {"judge": {"endpoint": {"base_url": URL, "model": "m"}}, "data": {"path": "rows.jsonl"}}
    config = validate_config(FilterConfig, data, "test")
    assert validate_config(FilterConfig, config.model_dump(), "resolved") == config
    with pytest.raises(ConfigError, match=problem):
        validate_config(FilterConfig, {**data, **changes}, "test")


def rl_config(judge: dict[str, Any], **changes: Any) -> RlConfig:
    data = {"model": {"path": "m"}, "prompts": {"path": "rows.jsonl"}, "reward": {"name": "judged"}, "judge": judge}
    return validate_config(RlConfig, {**data, **changes}, "test")


def test_the_judge_of_rl_has_exactly_one_form():
    endpoint = {"base_url": URL, "model": "m"}
    assert rl_config({"endpoint": endpoint}).judge.source == EndpointConfig(**endpoint)
    for judge, problem in (
        ({}, "judge: has neither model nor endpoint"),
        ({"model": {"path": "m"}, "endpoint": endpoint}, "judge: has both model and endpoint"),
        ({"endpoint": endpoint, "engine": {}}, "an endpoint needs no engine"),
    ):
        with pytest.raises(ConfigError, match=problem):
            rl_config(judge)
    with pytest.raises(ConfigError, match=r"an endpoint needs no engines; remove resources\.judge"):
        rl_config({"endpoint": endpoint}, resources={"judge": {}})


def test_validate_names_a_variable_that_is_not_set(tmp_path, monkeypatch):
    write_rows(tmp_path, 3)
    config = config_of(URL, tmp_path, api_key_env="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    [problem] = input_problems(config, KINDS["filter"])
    assert problem.startswith("judge.endpoint.api_key_env: got 'JUDGE_KEY': this environment variable is not set")
    monkeypatch.setenv("JUDGE_KEY", "k")
    assert input_problems(config, KINDS["filter"]) == []


def test_vllm_is_not_needed_for_an_endpoint(monkeypatch):
    from posttrain.pipeline import packages

    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "vllm" else name)
    with_path = validate_config(FilterConfig, {"judge": {"path": "m"}, "data": {"path": "r"}}, "test")
    assert [line.split(",")[0] for line in package_problems(with_path, KINDS["filter"])] == ["needs vllm"]
    assert package_problems(config_of(URL), KINDS["filter"]) == []


def test_a_profile_rests_on_the_endpoints_address_model_and_question():
    from posttrain.rl.prompts.fingerprints import scoring_fingerprint

    def found(**changes: Any) -> str:
        judge = {"endpoint": {"base_url": URL, "model": "m", **changes.pop("endpoint", {})}, **changes}
        return scoring_fingerprint(rl_config(judge))

    same = [found(), found(endpoint={"concurrency": 3, "retries": 1, "timeout_s": 1.0, "api_key_env": "KEY"})]
    others = [found(endpoint={"model": "n"}), found(endpoint={"base_url": f"{URL}x"}), found(template="{prompt}")]
    assert len(set(same)) == 1
    assert len({*same, *others}) == 4


# --- prompts without a tokenizer ---


@pytest.mark.parametrize(
    "token",
    ["<|eot|>", "<|im_start|>", "<turn|>", "<\uff5cUser\uff5c>", "</s>", "<start_of_turn>", "[/INST]", "<<SYS>>"],
)
def test_what_looks_like_a_special_token_is_escaped(token):
    row = Row("a", "math", (Message("user", f"x {token} a<b [1] <div>"), Message("assistant", "3")))
    text = JudgePrompts(config_of(URL)).render(row).text
    assert token not in text
    assert "a<b [1] <div>" in text, "text that harms nothing was changed"


def test_a_long_row_is_shown_by_its_ends_or_refused_in_characters():
    row = Row("long", "math", (Message("user", "begin " + "x" * 300 + " end"), Message("assistant", "3")))
    prompts = JudgePrompts(config_of(URL, max_prompt_chars=100))
    text = prompts.render(row).text
    assert 95 <= len(text) <= 100
    assert "begin xx" in text
    assert text.endswith("xx end")
    assert prompts.num_shortened == 1
    refusing = config_of(URL, max_prompt_chars=100).model_copy(update={"long_rows": "error"})
    with pytest.raises(
        DataError, match=r"row long: .* 316 characters, but at most 100 fit \(endpoint\.max_prompt_chars"
    ):
        JudgePrompts(refusing).render(row)


# --- the stages ---


def test_the_filter_keeps_the_rows_that_the_endpoint_finds_hardest(tmp_path):
    def answer(body: dict[str, Any]) -> Any:
        text = body["messages"][0]["content"]
        hard = 0.05 + 0.9 * int(text.rpartition("+")[2].rstrip("?")) / 20 if "Sum" in text else 0.5
        tokens = {"hard": math.log(hard), "easy": math.log(1 - hard), "medium": -20.0}
        return chat(max(tokens, key=tokens.__getitem__), tokens)

    write_rows(tmp_path, 20)
    with serving(answer) as server:
        outputs = run(config_of(server.url, tmp_path), context_of(tmp_path))
    kept = load_rows(outputs["kept"], kind="supervised")
    assert [row.id for row in kept] == [f"r{i}" for i in range(10, 20)]
    assert all(row.fields["difficulty"]["judge"] == MODEL for row in kept)
    events = list(read_jsonl(tmp_path / "events.jsonl"))
    assert any(line["event"] == "busy" and line["actor"] == "judge endpoint" for line in events)


def test_after_an_outage_the_filter_asks_about_the_rows_that_are_left(tmp_path):
    asked: list[int] = []

    def answer(body: dict[str, Any]) -> Any:
        asked.append(1)
        return chat("easy", GOOD) if len(asked) < 8 else error(500, "broken")

    write_rows(tmp_path, 20)
    with serving(answer) as server:
        config = config_of(server.url, tmp_path, retries=0, concurrency=1)
        with pytest.raises(StageError, match=r"no verdict on 14 of 20 rows, and nothing was filtered: .*status 500"):
            run(config, context_of(tmp_path))
        assert not (tmp_path / "stage" / "kept.jsonl").exists()
        server.bodies.clear()
        server.answer = lambda body: chat("easy", GOOD)
        stats = run(config, context_of(tmp_path))["stats"]
        assert len({body["messages"][0]["content"] for body in server.questions()}) == len(server.questions()) == 14
    assert (stats["num_known"], stats["num_kept"]) == (6, 10)
    assert stats["rows_per_s"] == 14 / stats["judging_s"]


def test_another_selection_of_rated_rows_asks_nothing(tmp_path):
    write_rows(tmp_path, 20)
    with serving(lambda body: chat("easy", GOOD)) as server:
        first = run(config_of(server.url, tmp_path), context_of(tmp_path))["stats"]
        changes = [{"keep_fraction": 0.25}, {"stratify": False}]
        for change in changes:
            server.bodies.clear()
            config = config_of(server.url, tmp_path).model_copy(update=change)
            again = run(config, context_of(tmp_path))["stats"]
            assert server.questions() == []
            assert (again["num_known"], again["rows_per_s"], again["judging_s"]) == (20, None, 0.0)
            assert again["num_kept"] == round(20 * config.keep_fraction)
            assert again["tags"] == first["tags"]
    told = [line for line in read_jsonl(tmp_path / "events.jsonl") if line["event"] == "progress"]
    assert told[-1]["done"] == told[-1]["total"] == 20
    assert told[-1]["values"] == {"rated before": 20}


@pytest.mark.parametrize(
    "change",
    [
        {"template": "How hard: {prompt}"},
        {"labels": ["easy", "hard"]},
        {"labels": ["hard", "medium", "easy"]},
        {"model": "judge-2"},
    ],
)
def test_another_question_or_another_judge_is_asked(tmp_path, change):
    write_rows(tmp_path, 4)
    with serving(lambda body: chat("easy", GOOD)) as server:
        server.models = [MODEL, "judge-2"]
        run(config_of(server.url, tmp_path), context_of(tmp_path))
        server.bodies.clear()
        config = config_of(server.url, tmp_path, **{key: value for key, value in change.items() if key == "model"})
        config = config.model_copy(update={key: value for key, value in change.items() if key != "model"})
        assert run(config, context_of(tmp_path))["stats"]["num_known"] == 0
        assert len(server.questions()) == 4


def test_a_reply_that_the_endpoint_could_not_rate_is_unscored(tmp_path):
    from posttrain.rl.grading.judge import Judge

    seen: list[Row] = []

    async def score(pairs: Any) -> list[Scored]:
        seen.extend(row for _, row in pairs)
        return [Scored(None, Outcome.SCORED, row.fields["judge"]["tag"]) for _, row in pairs]

    def answer(body: dict[str, Any]) -> Any:
        text = body["messages"][0]["content"]
        return {"b": error(500, "broken"), "c": chat("I like it")}.get(text[-1], chat("easy", GOOD))

    row = Row("p", "math", (Message("user", "?"),))
    rollouts = [one_turn("p", "g", i, (1,), (2,), text, (-1.0,), (), "stop") for i, text in enumerate("abcd")]
    with serving(lambda body: chat("easy", GOOD)) as server:
        config = config_of(server.url, retries=0).model_copy(update={"template": "{prompt}{response}"})
        prepared = prepare_judge(config)
        server.answer = answer
        with open_judge(prepared, context_of(tmp_path), None) as backend:
            judge = Judge(prepared, backend)

            async def scored() -> list[Scored]:
                await judge.start()
                try:
                    return await judge.score(score, [(rollout, row) for rollout in rollouts])
                finally:
                    await judge.close()

            scores = asyncio.run(scored())
    assert [item.outcome for item in scores] == ["scored", "infrastructure", "error", "scored"]
    assert scores[1].reason == f"the judge: {server.url}: status 500: broken"
    assert all(item.result is None for item in scores)
    assert len(seen) == 2
    assert msgspec.to_builtins(seen[0])["fields"]["judge"]["judge"] == MODEL
