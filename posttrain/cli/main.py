"""The `posttrain` command: joins the commands of the other files, and turns an exception into an exit code.

Each command is a thin layer over the package, and imports heavy packages only when it needs them.

Exit codes: 0 done; 2 the input is wrong; 3 the run failed and can be resumed; 130 interrupted, resumable.
"""

import signal
import sys
from typing import Annotated, Any

import typer

from posttrain.cli import merge, prune  # noqa: F401  (add their commands to info_app and data_app)
from posttrain.cli.data import data_app
from posttrain.cli.environments import environments_app
from posttrain.cli.info import info_app, ledger_app
from posttrain.cli.rewards import rewards_app
from posttrain.cli.serving import serving_app
from posttrain.cli.stages import stages_app
from posttrain.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, PosttrainError

# typer raises the exceptions of its own copy of click, which are other classes than those of the package click.
UsageError: type[Exception] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="posttrain",
    help="The post-training recipe behind Llama 4: judge filter, light SFT, asynchronous online RL, light DPO.",
    epilog="First steps: [bold]posttrain doctor[/], then [bold]posttrain run quickstart[/].",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(stages_app)
app.add_typer(info_app)
app.add_typer(serving_app)
app.add_typer(rewards_app, name="rewards")
app.add_typer(environments_app, name="environments")
app.add_typer(data_app, name="data")
app.add_typer(ledger_app, name="ledger")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"posttrain {version('posttrain')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """The post-training recipe behind Llama 4: judge filter, light SFT, asynchronous online RL, light DPO."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    try:
        result: Any = app(arguments, standalone_mode=False, prog_name="posttrain")
        return result if isinstance(result, int) else EXIT_OK
    except (KeyboardInterrupt, typer.Abort):
        if arguments is None:  # this process ends now: a second Ctrl-C on its way out would hide the exit code
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return EXIT_INTERRUPTED
    except UsageError as error:
        error.show(file=sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
        if (option := getattr(error, "option_name", None)) is not None:
            from posttrain.cli.hints import override_hint

            print(override_hint(option, sys.argv[1:] if arguments is None else arguments), end="", file=sys.stderr)
        return EXIT_USER
    except PosttrainError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        return EXIT_OK
    except Exception as error:
        traceback = _keep_traceback()
        print(f"posttrain: failed: {type(error).__name__}: {error}; the traceback is in {traceback}", file=sys.stderr)
        return EXIT_FAILED


def _keep_traceback() -> str:
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile("w", prefix="posttrain-error-", suffix=".log", delete=False) as log:
        traceback.print_exc(file=log)
    return log.name


if __name__ == "__main__":
    sys.exit(main())
