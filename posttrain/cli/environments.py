"""`posttrain environments`: list the environments that are registered."""

import typer

environments_app = typer.Typer(no_args_is_help=True, help="Environment plug-ins: list those that are registered.")


@environments_app.callback()
def _environments() -> None:
    """Keep `list` a command of its own."""


@environments_app.command("list")
def environments_list() -> None:
    """List the registered environments: name, what it does, and where the function is."""
    from posttrain.scoring.plugins.lookup import ENVIRONMENT, list_plugins

    found = list_plugins(ENVIRONMENT)
    width = max((len(info.name) for info in found), default=0)
    for info in found:
        typer.echo(f"{info.name:<{width}}  {info.summary}  ({info.where})")
    if not found:
        typer.echo("no environments are registered; is the package installed? (pip install -e .)", err=True)
