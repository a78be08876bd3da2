"""The sizes of a vision encoder's tiles, patches and features, checked against each other. No torch."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class VisionSizes:
    """image: side of a tile in pixels. patch: side of a patch in pixels. side: patches in a line that become one
    feature. channels: colours of a pixel.
    """

    image: int
    patch: int
    side: int
    channels: int

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image // self.patch

    @property
    def features(self) -> int:
        """Features that a tile becomes, and so the number of its <|patch|> tokens."""
        return (self.grid // self.side) ** 2

    @property
    def tile(self) -> tuple[int, int, int]:
        """The shape of a tile."""
        return (self.channels, self.image, self.image)


def vision_sizes(config: Any) -> VisionSizes:
    """The sizes of a `Llama4VisionConfig`. Raises ValueError, which names the keys, if they do not fit each other."""
    sizes = VisionSizes(
        config.image_size, config.patch_size, round(1 / config.pixel_shuffle_ratio), config.num_channels
    )
    if sizes.image % sizes.patch or sizes.grid % sizes.side:
        raise ValueError(
            f"vision_config: image_size {sizes.image} must be a multiple of patch_size {sizes.patch} times "
            f"{sizes.side}, the patches that pixel_shuffle_ratio {config.pixel_shuffle_ratio} joins in a line"
        )
    wide = config.hidden_size * sizes.side**2
    if config.intermediate_size != wide:
        raise ValueError(
            f"vision_config.intermediate_size is {config.intermediate_size}; it must be hidden_size / "
            f"pixel_shuffle_ratio**2 = {wide}, because the adapter reads as many channels"
        )
    if not config.projector_input_dim == config.projector_output_dim == config.vision_output_dim:
        raise ValueError(
            f"vision_config: projector_input_dim {config.projector_input_dim}, projector_output_dim "
            f"{config.projector_output_dim} and vision_output_dim {config.vision_output_dim} must be equal"
        )
    return sizes
