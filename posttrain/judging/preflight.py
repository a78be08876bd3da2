"""Checks an endpoint before anything heavy starts: that it is up and serves the model, and which form of request works.

Every fault is a UserError: one message that says what to correct. No request waits longer than PATIENCE_S.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import openai

from posttrain.errors import UserError
from posttrain.judging.config import EndpointConfig
from posttrain.judging.forms import FORMS, Form, read_answer, request_body
from posttrain.judging.requests import complete, is_refused_form, list_models, make_client, why
from posttrain.judging.verdicts import Verdict

PATIENCE_S = 30.0
SHOWN_MODELS = 10
_NO_SUCH_PAGE = (404, 405, 501)
PROBE = "A capable language model is asked: What is 1 + 1?\nRate the task. Answer with exactly one of these words and "
PROBE += "nothing else: {labels}."


def check_server(endpoint: EndpointConfig) -> None:
    """Raise UserError unless the server is up, accepts the key and serves the model."""

    async def check() -> None:
        async with make_client(endpoint) as client:
            await _check_models(client, endpoint)

    asyncio.run(check())


async def choose_form(endpoint: EndpointConfig, labels: Sequence[str]) -> Form:
    """The first form of request whose answer is a verdict; if there is none, the first that the server accepts.

    Raises UserError as `check_server` does, and if the server accepts no form.
    """
    async with make_client(endpoint) as client:
        await _check_models(client, endpoint)
        taken: list[Form] = []
        refusal = ""
        for form in FORMS:
            try:
                answer = await _ask(client, endpoint, form, labels=labels)
            except (openai.OpenAIError, TimeoutError, ValueError) as error:
                if not is_refused_form(error):
                    raise UserError(f"judge.endpoint: {why(error, endpoint)}") from None
                refusal = why(error, endpoint)
                continue
            if isinstance(read_answer(answer, form, labels), Verdict):
                return form
            taken.append(form)
        if not taken:
            raise UserError(f"judge.endpoint: the server takes no request for a label; {refusal}")
        return taken[0]


async def _ask(client: openai.AsyncOpenAI, endpoint: EndpointConfig, form: Form, *, labels: Sequence[str]) -> Any:
    text = PROBE.format(labels=", ".join(labels))
    body = request_body(form, endpoint.model, text, labels=labels, top_logprobs=endpoint.top_logprobs)
    return await complete(client, _patient(endpoint), body)


def _patient(endpoint: EndpointConfig) -> EndpointConfig:
    """The endpoint with short limits, so that a fault is found soon."""
    limits = {
        "timeout_s": min(endpoint.timeout_s, PATIENCE_S),
        "retries": min(endpoint.retries, 2),
        "max_wait_s": min(endpoint.max_wait_s, PATIENCE_S),
    }
    return endpoint.model_copy(update=limits)


async def _check_models(client: openai.AsyncOpenAI, endpoint: EndpointConfig) -> None:
    """Raise UserError if the server has a list of models without this one. Without a list, `choose_form` finds out."""
    patient = _patient(endpoint)
    try:
        answer = await list_models(client, patient.timeout_s)
    except (openai.OpenAIError, TimeoutError, ValueError) as error:
        if isinstance(error, openai.APIStatusError) and error.status_code in _NO_SUCH_PAGE:
            return
        raise UserError(f"judge.endpoint: {why(error, patient)}") from None
    items = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(items, list):
        raise UserError(
            f"judge.endpoint.base_url: {endpoint.base_url}/models does not answer with a list of models; base_url must "
            "be that of an OpenAI-compatible server, which mostly ends with /v1"
        )
    served = [str(item["id"]) for item in items if isinstance(item, dict) and "id" in item]
    if endpoint.model not in served:
        shown = ", ".join(served[:SHOWN_MODELS]) + (", ..." if len(served) > SHOWN_MODELS else "")
        raise UserError(
            f"judge.endpoint.model: got {endpoint.model!r}, which {endpoint.base_url} does not serve; it serves: "
            f"{shown or 'nothing'}"
        )
