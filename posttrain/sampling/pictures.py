"""The pictures of requests as an engine takes them: read from the store of the stage, and cut into tiles by vLLM.

Each picture of a group is decoded and cut once: what was made of the last pictures is kept, because a group that goes
on after its first replies shows them again. vLLM keeps the features of a picture, by its key, until the weights change.
"""

import asyncio
from contextlib import suppress
from typing import Any

from posttrain.compat.vllm_images import engine_prompt, render_pictures, rendered_cache
from posttrain.data.images.references import load_image
from posttrain.data.images.tiles import IMAGE
from posttrain.data.tokenizer import Tokenizer
from posttrain.errors import StageError
from posttrain.records import Media
from posttrain.sampling.requests import SampleRequest

KEPT_GIB = 0.25  # of tiles: those of eight pictures of 16 tiles of 336 pixels take 0.17


class RequestPictures:
    """Renders the pictures of requests to an engine, one request at a time and outside of the event loop."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._one = asyncio.Lock()
        self._kept: Any = None  # what vLLM made of the pictures of requests, by their references

    async def ready(self, llm: Any, tokenizer: Tokenizer) -> None:
        """Load what cuts pictures, if the model takes any: this may take longer than the admission of a request may."""
        if llm.model_config.is_multimodal_model:
            from PIL import Image

            blank = Image.new("RGB", (1, 1))
            image_id = tokenizer.convert_tokens_to_ids(IMAGE)
            await asyncio.to_thread(render_pictures, llm, image_id, [blank], keys=["blank"])

    async def rendered(self, llm: Any, request: SampleRequest, tokenizer: Tokenizer) -> Any:
        """What vLLM makes of a request's pictures; None for a request without any.

        Raises StageError for a picture that cannot be read, such as one that its store does not hold.
        """
        if not request.pictures:
            return None
        image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        try:
            async with self._one:
                return await self._rendered(llm, request.pictures, image_id)
        except (KeyError, ValueError, OSError) as error:
            shown = ", ".join(request.pictures)
            raise StageError(f"engine {self._engine}: a picture of {shown} cannot be used: {error}") from None

    async def _rendered(self, llm: Any, references: tuple[str, ...], image_id: int) -> Any:
        if self._kept is None:
            self._kept = rendered_cache(KEPT_GIB)
        name = "\n".join(references)
        if (found := self._kept.get(name)) is not None:
            return found
        rendered = await asyncio.to_thread(_render, llm, references, image_id)
        with suppress(ValueError):  # it is larger than the cache
            self._kept[name] = rendered
        return rendered

    def prompt(self, name: int | str, prompt_ids: list[int], rendered: Any, *, salt: str | None = None) -> Any:
        """The prompt of a request as vLLM takes it. rendered: of the request's pictures; None without any. salt:
        requests share cached prefixes only with those of the same.

        Raises StageError for token ids that are not those of the pictures.
        """
        try:
            return engine_prompt(prompt_ids, rendered, salt=salt)
        except ValueError as error:
            raise StageError(f"engine {self._engine}: request {name} cannot be sampled: {error}") from None


def _render(llm: Any, references: tuple[str, ...], image_id: int) -> Any:
    keys = [Media(reference).key for reference in references]
    return render_pictures(llm, image_id, list(map(load_image, references)), keys=keys)
