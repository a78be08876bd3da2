"""A real HTTP server on loopback that answers like an OpenAI-compatible one, or fails as a test tells it to."""

import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

MODEL = "judge-1"

# The client of openai looks the processor up once, for which Python starts `uname`; it remembers what it found.
platform.processor()


def chat(text: str, tokens: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The body of a chat completion. tokens: log-probabilities of the likeliest first tokens, the likeliest first."""
    logprobs = None
    if tokens is not None:
        first, value = next(iter(tokens.items()))
        top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in tokens.items()]
        logprobs = {"content": [{"token": first, "logprob": value, "bytes": None, "top_logprobs": top}]}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}
    return {"id": "c", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}


def error(status: int, message: str = "no", headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x"}}, status, headers=dict(headers or {}))


Answer = Callable[[dict[str, Any]], Response | dict[str, Any]]


@dataclass
class Server:
    """The behaviour of the server, which a test may change while it runs, and the requests that it received.

    answer: makes the response to the body of a chat completion. models: the models that it lists, or a response to send
    instead of the list. key: the API key that it requires.
    """

    answer: Answer
    models: list[str] | Response = field(default_factory=lambda: [MODEL])
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    url: str = ""

    def questions(self) -> list[dict[str, Any]]:
        """The bodies that ask about a row, those of the preflight left out."""
        return [body for body in self.bodies if "What is 1 + 1?" not in body["messages"][0]["content"]]

    def _refusal(self, request: Request) -> Response | None:
        self.headers.append(request.headers)
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, f"wrong key {request.headers.get('authorization')}")
        return None

    async def list(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        if isinstance(self.models, Response):
            return self.models
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def complete(self, request: Request) -> Response:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        body = await request.json()
        self.bodies.append(body)
        self.times.append(time.monotonic())
        answer = self.answer(body)
        while callable(getattr(answer, "__await__", None)):
            answer = await answer  # type: ignore[misc]
        return JSONResponse(answer) if isinstance(answer, dict) else answer


@contextmanager
def serving(answer: Answer, **given: Any) -> Iterator[Server]:
    """The server, up; it ends with the block."""
    server = Server(answer, **given)
    app = Starlette(
        routes=[
            Route("/v1/models", server.list),
            Route("/v1/chat/completions", server.complete, methods=["POST"]),
        ]
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    running = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield server
    finally:
        running.should_exit = True
        thread.join()
        listener.close()


def unused_url() -> str:
    """An address at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
