"""Llama 4 with images: features of pictures stand among the embeddings of tokens, and the text model reads both.

Parameters have the names and shapes of transformers' `Llama4ForConditionalGeneration`, and the model computes the same
function, so each loads the other's folders. What differs: the caller can say where features stand, so that a <|patch|>
token which a policy sampled stays a token; documents packed into a row are isolated, as in the text model; the tiles of
all rows are encoded as one batch.

Shapes: B rows, S tokens of a row, N tiles of all pictures, P features of a tile, D the text model's width.
"""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin, Llama4Config, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from posttrain.compat.deepspeed import is_divided
from posttrain.model.native import NativeLlama4ForCausalLM, NativeModelOutput
from posttrain.model.vision.encoder import VisionEncoder


class Projector(nn.Module):
    """From the adapter's width to that of the text model."""

    def __init__(self, config: Llama4Config):
        super().__init__()
        vision, text = _configs(config)
        self.linear_1 = nn.Linear(vision.vision_output_dim, text.hidden_size, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_1(features)


class NativeLlama4ForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Vision encoder, projector and the native text model. Source: transformers' `Llama4ForConditionalGeneration`.

    `backbone` is all of it but the head. `base_model_prefix` names it, and so trainers find it that compute the loss
    from hidden states.
    """

    config_class = Llama4Config
    config: Llama4Config
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DecoderLayer", "VisionLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_sdpa = True

    def __init__(self, config: Llama4Config):
        super().__init__(config)
        vision, text = _configs(config)
        self.vision_model = VisionEncoder(vision)
        self.multi_modal_projector = Projector(config)
        self.language_model = NativeLlama4ForCausalLM(text)
        self.vocab_size = text.vocab_size
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Tiles [N, 3, H, W] -> one vector for each <|patch|>, in order: [N * P, D]."""
        features = self.vision_model(pixel_values.to(self.multi_modal_projector.linear_1.weight.dtype))
        return self.multi_modal_projector(features.flatten(0, 1))

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        *,
        shown_tiles: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embeddings of tokens, [B, S, D], with features of pictures in their places. Arguments as in `forward`."""
        embeds_BSD = self.get_input_embeddings()(input_ids)
        if pixel_values is None or len(pixel_values) == 0:
            if places is not None and len(places):
                raise ValueError(f"{len(places)} tokens stand for an image, but there are no tiles (pixel_values)")
            return embeds_BSD + self._no_features(embeds_BSD) if self._others_wait() else embeds_BSD
        features = self.image_features(pixel_values)
        shown = len(pixel_values)
        if shown_tiles is not None:
            features, shown = features.unflatten(0, (shown, -1))[shown_tiles].flatten(0, 1), len(shown_tiles)
        places = image_places(input_ids, self.config.image_token_id) if places is None else places
        if len(features) != len(places):
            raise ValueError(
                f"{shown} tiles have {len(features)} features, but {len(places)} tokens stand for an "
                "image; both numbers must be equal"
            )
        flat = embeds_BSD.flatten(0, 1).index_copy(0, places, features.to(embeds_BSD.dtype))
        return flat.view_as(embeds_BSD)

    def _others_wait(self) -> bool:
        """Whether other ranks may wait for this one at the weights of the vision encoder.

        They do in a training of these weights, whose gradients ranks divide, and under ZeRO-3 in every forward, because
        a rank gets weights that are divided, frozen ones too, only if all ranks ask for them.
        """
        weights = (*self.vision_model.parameters(), *self.multi_modal_projector.parameters())
        if any(is_divided(weight) for weight in weights):
            return True
        return self.training and torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)

    def _no_features(self, embeds_BSD: torch.Tensor) -> torch.Tensor:
        """0, with a gradient of 0 for every vision weight, for a batch without a picture."""
        blank = embeds_BSD.new_zeros(1, *self.vision_model.sizes.tile)
        return self.image_features(blank).sum().to(embeds_BSD.dtype) * 0.0

    def backbone(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        image_places: torch.Tensor | None = None,
        shown_tiles: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> NativeModelOutput:
        """All but the head; `last_hidden_state` is [B, S, D]. Arguments as in `forward`."""
        embeds_BSD = self._embeds(input_ids, pixel_values, image_places, shown_tiles=shown_tiles, given=inputs_embeds)
        return self.language_model.model(inputs_embeds=embeds_BSD, attention_mask=attention_mask, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_places: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        shown_tiles: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model. Arguments not named here are those of `NativeLlama4ForCausalLM.forward`.

        Args:
            input_ids: int64 [B, S], with one <|patch|> (`config.image_token_id`) for each feature of a picture.
            pixel_values: tiles of the pictures of all rows in order, [N, 3, image_size, image_size]; None for none.
            image_places: int64 [N * P], flat places in [B * S] of the tokens that stand for features, in order.
                None takes every <|patch|>, as transformers does; `image_places(...)` gives those of the prompts where a
                policy can have sampled one.
            inputs_embeds: [B, S, D] in place of input_ids, with features in their places already.
            shown_tiles: int64 [M], the tiles that stand in the places, in order, as indices into pixel_values. A
                picture that several rows show is then encoded once. None: each tile once.

        Raises:
            ValueError: there are more or fewer places than features, or tiles have another size.
        """
        embeds_BSD = self._embeds(input_ids, pixel_values, image_places, shown_tiles=shown_tiles, given=inputs_embeds)
        return self.language_model(inputs_embeds=embeds_BSD, attention_mask=attention_mask, **kwargs)

    def _embeds(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        places: torch.Tensor | None,
        *,
        shown_tiles: torch.Tensor | None,
        given: torch.Tensor | None,
    ) -> torch.Tensor:
        if (input_ids is None) == (given is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            return self.embed(input_ids, pixel_values, places, shown_tiles=shown_tiles)
        if pixel_values is not None:
            raise ValueError("pixel_values are placed among input_ids; give no inputs_embeds with them")
        assert given is not None
        return given

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, but config.json names `Llama4ForConditionalGeneration`, which other tools load."""
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if path.exists() and kwargs.get("is_main_process", True):
            config = json.loads(path.read_text())
            config["architectures"] = ["Llama4ForConditionalGeneration"]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _configs(config: Llama4Config) -> tuple[Any, Any]:
    """The configs of the vision encoder and of the text model."""
    return config.vision_config, config.text_config


def image_places(input_ids: torch.Tensor, image_token_id: int, sampled_BS: torch.Tensor | None = None) -> torch.Tensor:
    """The flat places, int64, of the <|patch|> tokens of a batch that stand for pictures, in order.

    sampled_BS: bool [B, S], True for tokens that a policy sampled. They stand for no picture, whatever their id is.
    """
    stands = input_ids == image_token_id
    if sampled_BS is not None:
        stands = stands & ~sampled_BS.bool()
    return stands.flatten().nonzero().squeeze(1)
