"""The pictures of requests as an engine takes them: read from the store of the stage, and cut into tiles by vLLM.

A request for the replies of a group is prepared once, so each of its pictures is decoded and cut once; vLLM keeps the
features of a picture, by its key, until the weights change.
"""

import asyncio
from typing import Any

from posttrain.compat.vllm_images import render_pictures
from posttrain.data.images.references import load_image
from posttrain.records import Media
from posttrain.sampling.requests import SampleRequest


class RequestPictures:
    """Renders the pictures of requests, one request at a time and outside of the event loop."""

    def __init__(self) -> None:
        self._one = asyncio.Lock()

    async def rendered(self, llm: Any, request: SampleRequest, image_id: int) -> Any:
        """What vLLM makes of a request's pictures; None for a request without any.

        image_id: of <|image|>. Raises KeyError for a picture that its store does not hold.
        """
        if not request.pictures:
            return None
        async with self._one:
            return await asyncio.to_thread(_render, llm, request.pictures, image_id)


def _render(llm: Any, references: tuple[str, ...], image_id: int) -> Any:
    keys = [Media(reference).key for reference in references]
    return render_pictures(llm, image_id, list(map(load_image, references)), keys=keys)
