"""Checks a picture, and makes RGB of it in one way, so that trainer and engine see the same pixels.

A picture that is RGB already, and is not turned, is kept as it was encoded. Any other is converted and encoded again
without loss. Transparent parts become white: vLLM does that, and transformers would show the colours behind them.
Left out: animations (which picture of them is meant is not said), and formats that run programs, such as EPS.
"""

import io
import warnings
from dataclasses import dataclass
from typing import Any

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
PHOTO = "MPO"  # a JPEG behind which a camera has put more, such as a smaller copy; the first picture is the photo
MAX_PIXELS = 64_000_000
_ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")


class PictureError(ValueError):
    """What is wrong with a picture: the value and the rule, without its place."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture whose decoded pixels are RGB: the encoded bytes, and its size in pixels."""

    data: bytes
    width: int
    height: int


def checked(data: bytes) -> Encoded:
    """Decode a picture once to check it. Raises `PictureError` for one that cannot be used."""
    from PIL import Image

    if not data:
        raise PictureError("holds no bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures, which are refused here by their size
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError:
            raise PictureError(f"has more than {MAX_PIXELS:,} pixels; make it smaller") from None
        except Exception:
            raise PictureError(f"is none of {', '.join(FORMATS)}, or its header is damaged") from None
        with image:
            try:
                return _decoded(image, data)
            except PictureError:
                raise
            except Exception as error:  # of many kinds, in a damaged file: Pillow does not say which
                raise PictureError(f"cannot be decoded: {error}") from None


def _decoded(image: Any, data: bytes) -> Encoded:
    _check_header(image)
    image.load()
    turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    if image.mode == "RGB" and not turned and "transparency" not in image.info:
        return Encoded(data, image.width, image.height)
    converted = to_rgb(image)
    buffer = io.BytesIO()
    converted.save(buffer, "PNG")
    return Encoded(buffer.getvalue(), converted.width, converted.height)


def _check_header(image: Any) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise PictureError(f"is {width} x {height} pixels; it must have at least one")
    if width * height > MAX_PIXELS:
        raise PictureError(f"is {width} x {height} pixels, more than {MAX_PIXELS:,} in all; make it smaller")
    if image.format != PHOTO and (frames := getattr(image, "n_frames", 1)) > 1:
        raise PictureError(f"is an animation of {frames} pictures; give one of them")


def to_rgb(image: Any) -> Any:
    """An upright RGB picture of a decoded one, with white behind transparent parts. Raises `PictureError`."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = _of_16_bits(image)
    elif image.mode == "F":
        raise PictureError("has floating-point pixels, whose range is not said; convert it to 8 bits")
    if image.mode in _TRANSPARENT or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _of_16_bits(image: Any) -> Any:
    """Grey of 8 bits from one of 16 bits. Pillow alone would cut values off above 255."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise PictureError("has grey values of more than 16 bits; convert it to 8 bits")
    return Image.fromarray((values.astype(np.uint32) // 257).astype(np.uint8))
