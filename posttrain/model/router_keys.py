"""The check of the config section `router` against its model. Where the section is empty, torch is not imported."""

from posttrain.config.models import ModelConfig
from posttrain.errors import ConfigError
from posttrain.model.adapter import base_folder
from posttrain.model.folder import existing_folder

LLAMA4 = ("llama4_text", "llama4")


def check_router(model: ModelConfig) -> None:
    """Raise `ConfigError` if the `router` section sets a value, but this model has no routers that could use it.

    Only config.json is read.
    """
    asked = {f"router.{name}": value for name, value in model.router.model_dump().items() if value}
    if not asked:
        return
    from posttrain.model.load import read_config

    config = read_config(existing_folder(base_folder(model.path)))
    if config.model_type not in LLAMA4 or model.implementation != "native":
        what = f"a {config.model_type} model in the {model.implementation} implementation"
        rule = "routers are those of Llama 4 with model.implementation: native"
    elif not config.get_text_config().moe_layers:
        what, rule = "this model", "it has no mixture-of-experts layer"
    else:
        return
    raise ConfigError("model", [f"{key}: got {value} for {what}; {rule}" for key, value in asked.items()])
