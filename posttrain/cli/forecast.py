"""`posttrain plan PIPELINE --cluster FILE`: reads the two files, simulates, prints."""

from collections.abc import Sequence
from pathlib import Path

import typer

from posttrain.config.base import validate_config
from posttrain.errors import ConfigError
from posttrain.resources import bundled, bundled_names
from posttrain.rl.config import RlConfig


def read_stage(file: str, overrides: Sequence[str] = (), kind: str | None = None) -> RlConfig:
    """The config of the RL stage of a pipeline, or of that stage alone. Its inputs need not exist.

    Raises ConfigError unless there is one.
    """
    from posttrain.cli.check import read_any

    stages = read_any(file, overrides, kind).stages
    found = [stage for stage in stages if stage.kind == "rl"]
    if len(found) != 1:
        names = ", ".join(stage.name for stage in found) or "none"
        raise ConfigError(file, [f"a forecast is made of one stage of kind rl; the pipeline has {names}"])
    return validate_config(RlConfig, dict(found[0].config), file)


def print_forecast(
    file: str, overrides: Sequence[str], cluster: Path, *, calibrate: Path | None, as_json: bool
) -> None:
    """Print the forecast of the RL stage of a pipeline. file: a pipeline, a stage's config, or a bundled name."""
    import json

    from posttrain.forecast.calibration import calibrate as fit
    from posttrain.forecast.calibration import describe
    from posttrain.forecast.read import find_device, find_models, read_cluster
    from posttrain.forecast.text import forecast_json, render_forecast, title_of

    config = read_stage(_bundled_config(file), overrides)
    found = read_cluster(Path(_bundled_config(str(cluster))))
    calibration = fit(calibrate) if calibrate is not None else None
    device = find_device(found)
    from posttrain.forecast.forecast import make_forecast

    try:
        forecast = make_forecast(
            config, found, device, models=find_models(config, found, calibrated=calibrate), calibration=calibration
        )
    except ValueError as error:
        raise ConfigError(file, [str(error)]) from None
    if as_json:
        typer.echo(json.dumps(forecast_json(forecast), indent=2))
        return
    typer.echo(render_forecast(forecast, title=title_of(file, found, device)))
    if calibration is not None:
        typer.echo(f"\ncosts of {calibrate}: {describe(calibration)}")


def _bundled_config(name: str) -> str:
    """The path of a bundled config by its name, such as scale/scout-8/rl; any other name as it is."""
    return str(bundled("configs", name)) if name in bundled_names("configs") else name
