"""The server on loopback that agents call as if it were OpenAI's, and the episodes behind it.

    call ── key ──► episode ── one call at a time ──► Session.sample(after=...) ──► answer, whole or as events

What waits for what: a call waits for the calls of its episode that came before, and for the policy. Nothing that an
agent sends ends the server: a call that cannot be followed is answered with an error in OpenAI's form.

Source: the public reference of OpenAI's API (chat completions, completions, models).
"""

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from posttrain.episodes.agents import protocol
from posttrain.episodes.agents.protocol import ChatCall, RefusedError, TextCall
from posttrain.episodes.session import ContextFullError, Session

MAX_BYTES = 4 << 20  # of a call: the session takes no more than 1 MiB of it
SESSION_HEADER = "x-session-id"  # that of clients which many conversations share: it names one of them
STARTED_S = 0.005
KEEP_ALIVE_S = 600


class _Reward(msgspec.Struct):
    reward: float


class AgentEpisode:
    """One episode, from the gateway's side. key: the agent's OPENAI_API_KEY. is_full: whether a call met a full
    context. refused: why the last call was refused; "" if it was not."""

    def __init__(
        self, session: Session, *, model: str, max_calls: int, own_temperature: bool, takes_reward: bool
    ) -> None:
        self.key = f"episode-{secrets.token_urlsafe(24)}"
        self.keys: set[str] = set()  # all that the gateway knows it by
        self.model = model
        self.is_full = False
        self.refused = ""
        self._session = session
        self._max_calls = max_calls
        self._own_temperature = own_temperature
        self._takes_reward = takes_reward
        self._num_calls = 0
        self._one_at_a_time = asyncio.Lock()

    async def answer(self, call: ChatCall | TextCall) -> Response:
        """The policy's turn as the call wants it. Raises RefusedError."""
        if call.model != self.model:
            raise RefusedError(f"model: got {call.model!r}; there is {self.model!r}", 404, "model_not_found")
        history = call.history()
        async with self._one_at_a_time:
            if self._num_calls == self._max_calls:
                raise RefusedError(f"this episode has had its {self._max_calls} calls (max_calls)", 403, "max_calls")
            try:
                turn = await self._session.sample(
                    max_tokens=call.limit,
                    temperature=call.temperature if self._own_temperature else None,
                    stop=call.stops,
                    seed=call.seed,
                    after=history,
                    with_tokens=call.logprobs not in (None, False),
                )
            except ContextFullError:
                self.is_full = True
                raise RefusedError("the context is full", 400, "context_length_exceeded") from None
            except ValueError as error:
                raise RefusedError(str(error)) from None
            except RuntimeError:
                raise RefusedError("this episode has ended", 403, "episode_ended") from None
            self._num_calls += 1
            name = f"call-{self._num_calls}"
        is_chat = isinstance(call, ChatCall)
        if not call.stream:
            answer = (protocol.chat_answer if is_chat else protocol.text_answer)(turn, self.model, name)
            return JSONResponse(answer)
        with_usage = call.stream_options is not None and call.stream_options.include_usage
        events = (protocol.chat_events if is_chat else protocol.text_events)(
            turn, self.model, name, with_usage=with_usage
        )
        return Response("".join(events), media_type="text/event-stream")

    def pay(self, value: float) -> None:
        """Add to the reward, for the policy's last turn. Raises RefusedError."""
        if not self._takes_reward:
            raise RefusedError("the reward of this episode is left to the stage (scored_by: reward)", 403)
        try:
            self._session.reward(value)
        except ValueError as error:
            raise RefusedError(str(error)) from None


class Gateway:
    """The server of one event loop, and its episodes by key."""

    def __init__(self) -> None:
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._models),
                Route("/v1/chat/completions", partial(self._call, kind=ChatCall), methods=["POST"]),
                Route("/v1/completions", partial(self._call, kind=TextCall), methods=["POST"]),
                Route("/v1/reward", self._reward, methods=["POST"]),
            ],
            exception_handlers={404: _unknown, 405: _unknown},
        )
        self.url = ""
        self._episodes: dict[str, AgentEpisode] = {}
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Serve on a free port of loopback until the event loop ends. Does nothing if it serves already."""
        if self._serving is None:
            listener = socket.socket()
            listener.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            config = uvicorn.Config(
                self.app,
                log_level="critical",
                access_log=False,
                lifespan="off",
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_S,
            )
            self._server = _Server(config)
            self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            await asyncio.sleep(STARTED_S)

    @contextlib.contextmanager
    def episode(self, session: Session, **settings: Any) -> Iterator[AgentEpisode]:
        """An episode whose key is known within the block. settings: see `AgentEpisode`."""
        episode = AgentEpisode(session, **settings)
        self.alias(episode, episode.key)
        try:
            yield episode
        finally:
            for key in episode.keys:
                del self._episodes[key]

    def alias(self, episode: AgentEpisode, key: str) -> None:
        """Know an episode by one more key, for clients that choose a secret of their own (`SESSION_HEADER`)."""
        episode.keys.add(key)
        self._episodes[key] = episode

    async def _call(self, request: Request, kind: type[ChatCall] | type[TextCall]) -> Response:
        episode: AgentEpisode | None = None
        try:
            body = await _body(request)
            episode = self._episode_of(request)
            return await episode.answer(_decoded(body, kind))
        except RefusedError as error:
            return _refusal(error, episode)

    async def _reward(self, request: Request) -> Response:
        episode: AgentEpisode | None = None
        try:
            body = await _body(request)
            episode = self._episode_of(request)
            episode.pay(_decoded(body, _Reward).reward)
            return JSONResponse({"object": "reward"})
        except RefusedError as error:
            return _refusal(error, episode)

    async def _models(self, request: Request) -> Response:
        try:
            name = self._episode_of(request).model
            model = {"id": name, "object": "model", "created": 0, "owned_by": "posttrain"}
            asked = request.path_params.get("name")
            if asked is None:
                return JSONResponse({"object": "list", "data": [model]})
            if asked != name:
                raise RefusedError(f"model: got {asked!r}; there is {name!r}", 404, "model_not_found")
            return JSONResponse(model)
        except RefusedError as error:
            return _refusal(error, None)

    def _episode_of(self, request: Request) -> AgentEpisode:
        key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        session = request.headers.get(SESSION_HEADER, "")
        if (episode := self._episodes.get(key) or self._episodes.get(session)) is None:
            raise RefusedError(
                "the key is that of no running episode: use the OPENAI_API_KEY that the agent was started with, and "
                "make no call after it has ended",
                401,
                "invalid_api_key",
            )
        return episode


_gateways: dict[asyncio.AbstractEventLoop, Gateway] = {}  # an environment process has one loop


async def running_gateway() -> Gateway:
    """The gateway of this process, which has been started."""
    loop = asyncio.get_running_loop()
    if (gateway := _gateways.get(loop)) is None:
        _gateways.clear()  # those of loops that have ended
        gateway = _gateways[loop] = Gateway()
    await gateway.start()
    return gateway


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process, whose server this is only on the side."""
        yield


async def _body(request: Request) -> bytes:
    """The whole body, also one that is too large, so that its sender gets the answer. Raises RefusedError."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            if len(body) <= MAX_BYTES:
                body += chunk
    except ClientDisconnect:
        raise RefusedError("the call was cut off") from None
    if len(body) > MAX_BYTES:
        raise RefusedError(f"the call has more than {MAX_BYTES} bytes", 413, "too_large")
    return bytes(body)


def _decoded(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RefusedError(f"the call cannot be read: {error}") from None


def _refusal(error: RefusedError, episode: AgentEpisode | None) -> Response:
    if episode is not None:
        episode.refused = str(error)
    told = {"message": str(error), "type": "invalid_request_error", "code": error.code, "param": None}
    return JSONResponse({"error": told}, error.status)


async def _unknown(request: Request, error: Exception) -> Response:
    return _refusal(
        RefusedError(
            f"there is no {request.method} {request.url.path}; there are POST /v1/chat/completions, "
            "/v1/completions and /v1/reward, and GET /v1/models",
            404,
            "not_found",
        ),
        None,
    )
