"""Sends one request to an endpoint: the client, the key, retries, and errors in plain words.

The client of `openai` sends each request once, and tenacity decides about retries. A request is sent again after a lost
connection, a timeout, and the status 408, 425, 429 or any 5xx. The waits grow and are spread at random, or are as long
as the server asks for (Retry-After). The key is read from the environment when it is needed. No message contains it.
"""

import asyncio
import os
import random
import time
from email.utils import parsedate_to_datetime
from typing import Any

import openai
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from posttrain.errors import UserError
from posttrain.judging.config import EndpointConfig

FIRST_WAIT_S = 0.5
NO_KEY = "no key"  # the client wants one; it is never sent
_PASSING = (408, 425, 429)
_REFUSED_KEY = (401, 403)
_SHOWN_CHARACTERS = 200


def key_of(endpoint: EndpointConfig) -> str | None:
    """The key, if the endpoint has one. Raises UserError, which names the variable, if the variable is not set."""
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env)
    if not key:
        raise UserError(f"judge.endpoint.api_key_env: the environment variable {endpoint.api_key_env} is not set")
    return key


def make_client(endpoint: EndpointConfig) -> openai.AsyncOpenAI:
    """A client for one event loop. If the endpoint has no key, none is sent, even if OPENAI_API_KEY is set."""
    return openai.AsyncOpenAI(
        base_url=endpoint.base_url, api_key=key_of(endpoint) or NO_KEY, timeout=endpoint.timeout_s, max_retries=0
    )


def _options(client: openai.AsyncOpenAI) -> Any:
    """Options that remove the headers which the client would add from the environment, or for a key that is not set."""
    left_out = ["OpenAI-Organization", "OpenAI-Project", *(["Authorization"] if client.api_key == NO_KEY else [])]
    return {"headers": {name: openai.Omit() for name in left_out}}


async def complete(client: openai.AsyncOpenAI, endpoint: EndpointConfig, body: dict[str, Any]) -> Any:
    """The decoded answer to a chat completion; sent again as the endpoint's config says.

    Raises openai.OpenAIError, TimeoutError or ValueError (an answer that is no JSON) of the last try.
    """

    async def send() -> Any:
        async with asyncio.timeout(endpoint.timeout_s):
            return await client.post("/chat/completions", cast_to=object, body=body, options=_options(client))

    return await retrying(endpoint, endpoint.retries)(send)


async def list_models(client: openai.AsyncOpenAI, timeout_s: float) -> Any:
    """The decoded list of models that the server offers; sent once."""
    async with asyncio.timeout(timeout_s):
        return await client.get("/models", cast_to=object, options=_options(client))


def retrying(endpoint: EndpointConfig, retries: int) -> AsyncRetrying:
    """Runs a coroutine function until it succeeds, fails with a lasting error, or was repeated `retries` times."""
    backoff = wait_exponential_jitter(initial=FIRST_WAIT_S, max=endpoint.max_wait_s, jitter=FIRST_WAIT_S)

    def wait(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        asked = None if error is None else retry_after(error)
        return backoff(state) if asked is None else asked + random.uniform(0, FIRST_WAIT_S)

    def again(error: BaseException) -> bool:
        return is_passing(error) and (retry_after(error) or 0.0) <= endpoint.max_wait_s

    return AsyncRetrying(stop=stop_after_attempt(retries + 1), wait=wait, retry=retry_if_exception(again), reraise=True)


def is_passing(error: BaseException) -> bool:
    """True if the same request may succeed later."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in _PASSING or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | TimeoutError)


def is_outage(error: BaseException) -> bool:
    """True if the server or the key is at fault, and not this request."""
    refused = isinstance(error, openai.APIStatusError) and error.status_code in (*_REFUSED_KEY, 404)
    return refused or is_passing(error)


def is_refused_form(error: BaseException) -> bool:
    """True if the server refuses requests of this form."""
    return isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError)


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait (Retry-After, in seconds or as a date), with 429 and 503."""
    if not isinstance(error, openai.APIStatusError) or error.status_code not in (429, 503):
        return None
    value = error.response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def why(error: BaseException, endpoint: EndpointConfig) -> str:
    """The cause of an error, on one line, without the key."""
    if isinstance(error, openai.APIStatusError):
        if error.status_code in _REFUSED_KEY:
            return f"{endpoint.base_url}: {_about_the_key(endpoint)} ({error.status_code})"
        found = error.body if isinstance(error.body, dict) else {}
        text = f"status {error.status_code}: {found.get('message') or error.response.text or 'no message'}"
        asked = retry_after(error)
        if asked is not None and asked > endpoint.max_wait_s:
            text += f" (asks to wait {asked:g} s; max_wait_s is {endpoint.max_wait_s:g})"
    elif isinstance(error, openai.APITimeoutError | TimeoutError):
        text = f"no answer within {endpoint.timeout_s:g} s"
    elif isinstance(error, openai.APIConnectionError):
        text = f"no connection ({error.__cause__ or error})"
    else:
        text = str(error) or type(error).__name__
    key = os.environ.get(endpoint.api_key_env or "")
    text = " ".join(text.replace(key, "[key]").split() if key else text.split())
    return f"{endpoint.base_url}: {text[:_SHOWN_CHARACTERS]}"


def _about_the_key(endpoint: EndpointConfig) -> str:
    if endpoint.api_key_env is None:
        return "wants a key; name the environment variable that holds it in judge.endpoint.api_key_env"
    return f"refuses the key in the environment variable {endpoint.api_key_env}"
