"""`posttrain merge`: a model folder from a folder of adapters and their base."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from posttrain.cli.info import info_app
from posttrain.errors import ConfigError


@info_app.command()
def merge(
    adapters: Annotated[Path, typer.Argument(metavar="ADAPTERS", help="Folder of adapters.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder of the model.", show_default=False)],
    *,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Data type in which they are added and written.")
    ] = "bfloat16",
) -> None:
    """Add adapters into their base, and write the whole model. Stages do it by themselves; other programs may need it.

    Example: posttrain merge runs/sft/sft/adapter models/merged
    """
    from posttrain.model.adapter import is_adapter
    from posttrain.pipeline.model_folders import model_folder_problems

    if problems := model_folder_problems(str(adapters)):
        raise ConfigError("ADAPTERS", problems)
    if not is_adapter(adapters):
        raise ConfigError("ADAPTERS", [f"got {str(adapters)!r}: it holds a whole model, with nothing to merge"])
    if target.exists():
        raise ConfigError("FOLDER", [f"got {str(target)!r}: it exists already; name a folder that does not"])
    from posttrain.parallel.adapters import merge_adapter

    typer.echo(str(merge_adapter(adapters, dtype, target=target)))
