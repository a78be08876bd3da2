"""`posttrain serve` and `posttrain chat`: a finished model for other programs, and for a person."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

serving_app = typer.Typer()

Model = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RUN", help="A model folder, or a run: its last model.", show_default=False)
]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="dtype, and keys of engine, as in a stage.")
]


@serving_app.command()
def serve(
    model: Model,
    settings: Settings = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    *,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model in the API; its folder's by default.")] = None,
) -> None:
    """Serve a model with vLLM's own OpenAI server, until Ctrl-C.

    Examples:

      posttrain serve runs/quickstart

      posttrain serve models/mine engine.max_model_len=8192 --port 9000
    """
    with _server(model, settings, host, port=port, name=name) as server:
        typer.echo(f"model {server.name} at {server.url} (Ctrl-C ends it)")
        try:
            code = server.process.wait()
        except KeyboardInterrupt:
            return
        from posttrain.errors import StageError

        raise StageError(f"the server ended with code {code}")


@serving_app.command()
def chat(
    model: Model,
    settings: Settings = None,
    system: Annotated[str | None, typer.Option(help="A system instruction.")] = None,
    *,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0: always the likeliest token.")] = 0.7,
) -> None:
    """Try a model by hand: each line is a turn, /new begins another conversation, Ctrl-D ends.

    Examples:

      posttrain chat runs/quickstart

      echo "What is 2 + 2?" | posttrain chat models/mine --temperature 0
    """
    from openai import OpenAI

    from posttrain.cli.environments import printable
    from posttrain.serving.chat import converse

    if sys.stdin.isatty():
        typer.echo("the model is loaded ...", err=True)
    with _server(model, settings, "127.0.0.1", port=0, name=None) as server:
        client = OpenAI(base_url=server.url, api_key=os.environ.get("VLLM_API_KEY", "none"), max_retries=0)
        converse(
            client,
            server.name,
            _lines(),
            write=lambda text: typer.echo(printable(text), nl=False),
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
        )


def _lines() -> Iterator[str]:
    """The lines of standard input, in a terminal after a sign that one is awaited."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


@contextlib.contextmanager
def _server(model: str, settings: list[str] | None, host: str, *, port: int, name: str | None) -> Iterator[Any]:
    from posttrain.config.base import apply_overrides, validate_config
    from posttrain.sampling.client import require_vllm
    from posttrain.serving.models import served_folder, whole_model
    from posttrain.serving.server import ServeConfig, served_dtype, serving

    config = validate_config(ServeConfig, apply_overrides(ServeConfig().model_dump(), settings or []), "serve")
    folder = served_folder(model)
    require_vllm()
    with (
        whole_model(folder, served_dtype(folder, config)) as whole,
        serving(whole, config, host=host, port=port, name=name or folder.name) as server,
    ):
        yield server
