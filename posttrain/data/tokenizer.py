"""The attributes of a tokenizer that this package uses, as a type. Fast tokenizers of transformers have all of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, overload

if TYPE_CHECKING:
    import tokenizers


class Tokenizer(Protocol):
    """The tokenizer of a model folder, as `posttrain.model.load.load_tokenizer` returns it."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    added_tokens_decoder: "Mapping[int, tokenizers.AddedToken]"
    backend_tokenizer: "tokenizers.Tokenizer"

    def __len__(self) -> int:
        """How many tokens there are, added ones too."""
        ...

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, list[int]]:
        """Encode a text. Returns a mapping with the key `input_ids`."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], **options: bool) -> str:
        """The text of token ids."""
        ...

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The ids of tokens. An unknown token has the id of the tokenizer's unknown token."""
        ...

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    @overload
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...
    def convert_ids_to_tokens(self, ids: int | list[int]) -> str | list[str]:
        """The tokens of ids."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """The ids of all tokens."""
        ...

    def get_added_vocab(self) -> dict[str, int]:
        """The ids of the tokens that were added to the model's vocabulary."""
        ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: object) -> Any:
        """Render messages. Returns text, token ids or a mapping, depending on `options`."""
        ...

    def save_pretrained(self, save_directory: str | Path) -> object:
        """Write the tokenizer into a folder."""
        ...
