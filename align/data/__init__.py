"""What is trained and evaluated on: data cards, their examples, and the token ids of conversations."""

from align.data.cards import DataCard, list_cards, load_card, require_stage
from align.data.chat import answer_text, decode_completion, encode_example, encode_prompt
from align.data.loader import load_split
from align.data.own import read_user_file
from align.data.types import Example, LoadedSplit, Message, SplitName

__all__ = [
    "DataCard",
    "Example",
    "LoadedSplit",
    "Message",
    "SplitName",
    "answer_text",
    "decode_completion",
    "encode_example",
    "encode_prompt",
    "list_cards",
    "load_card",
    "load_split",
    "read_user_file",
    "require_stage",
]
