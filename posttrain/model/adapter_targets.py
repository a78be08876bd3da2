"""The check, before any weight is loaded, that a model has what `lora` is to adapt.

Names are read from the headers of the weight files. Left out: families whose files name weights otherwise than the
loaded model does; for them the check is made when the model is loaded.
"""

from collections.abc import Mapping, Sequence

from posttrain.config.images import ImagesConfig, TrainedImagesConfig
from posttrain.config.models import ServedModelConfig
from posttrain.config.training import AdaptersConfig
from posttrain.files import read_object
from posttrain.model.adapter import base_folder
from posttrain.model.adapter_start import continues
from posttrain.model.folder import read_header
from posttrain.model.router_keys import LLAMA4
from posttrain.model.sharing import FAMILIES
from posttrain.model.vision.parts import part_of

_NO_LINEAR = ("embed_tokens", "lm_head")


def target_problems(
    model: ServedModelConfig, lora: AdaptersConfig | None, images: ImagesConfig | None = None
) -> list[str]:
    """One line, beginning with the key, for each key of `lora` that names what the trained model does not have.

    images: the section of a stage that trains with pictures. Without it only the text model is trained.
    """
    if lora is None or continues(model):
        return []
    folder = base_folder(model.path)
    if str((read_object(folder / "config.json") or {}).get("model_type")) not in (*LLAMA4, *FAMILIES):
        return []
    shapes = {
        name: tensor["shape"] for file in folder.glob("*.safetensors") for name, tensor in read_header(file).items()
    }
    frozen = images.freeze if isinstance(images, TrainedImagesConfig) else ("vision", "projector")
    return unknown_targets({name: shape for name, shape in shapes.items() if part_of(name) not in frozen}, lora)


def unknown_targets(shapes: Mapping[str, Sequence[int]], lora: AdaptersConfig) -> list[str]:
    """One line for each key of `lora` that names what a model with weights of these names and shapes lacks."""
    linear, stacked = set[str](), set[str]()
    for name, shape in shapes.items():
        module, _, parameter = name.rpartition(".")
        last = module.rpartition(".")[2]
        if len(shape) == 3:
            stacked.add(f"{last}.{parameter}")
        elif len(shape) == 2 and parameter == "weight":
            linear.add(last)
    wanted = lora.filled()
    return [
        *unknown("target_modules", wanted.target_modules, linear - set(_NO_LINEAR), what="linear modules"),
        *unknown("target_parameters", wanted.target_parameters, stacked, what="weights of all experts in one"),
    ]


def unknown(key: str, names: list[str] | None, known: set[str], *, what: str) -> list[str]:
    """One line if some of the names that a key of `lora` lists are not known; else an empty list."""
    missing = [name for name in names or () if name not in known]
    if not missing:
        return []
    rule = f"the {what} to choose from are {', '.join(sorted(known))}" if known else f"this model has no {what}"
    return [f"lora.{key}: got {', '.join(missing)}: {rule}"]
