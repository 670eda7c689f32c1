"""Conversations as the stages encode them: `tests/reward/test_chat.py` has the laws; here are the errors and the runs' table."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from align.data.chat import answer_text, encode_example, encode_prompt
from align.errors import UserError
from align.evaluate.doctor import CheckStatus, check_round_trip, check_template
from align.run import read_samples, write_samples

NANO = AutoTokenizer.from_pretrained(Path(__file__).parents[3] / "recipes/nano/policy")
QUESTION = [{"role": "user", "content": "?"}]


def test_what_cannot_be_encoded_is_an_error_for_the_command_line() -> None:
    with pytest.raises(UserError, match="half of a surrogate pair"):
        encode_prompt(NANO, [{"role": "user", "content": "a \ud83d b"}])


def test_every_plane_of_unicode_survives_and_is_found_again_in_the_runs_table(tmp_path: Path) -> None:
    texts = [chr(code) + chr(code) for code in range(0x110000) if code % 1031 == 0 and not 0xD800 <= code < 0xE000]
    encoded = [encode_example(NANO, QUESTION, text) for text in texts]
    answers = [answer_text(NANO, QUESTION, ids[length:]) for ids, length in encoded]
    write_samples(tmp_path / "table.parquet", [{"completion": answer} for answer in answers])
    assert [row["completion"] for row in read_samples(tmp_path / "table.parquet")] == texts


def test_the_doctor_has_nothing_to_say_of_chatml() -> None:
    tokenizer = AutoTokenizer.from_pretrained(NANO.name_or_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert check_round_trip(tokenizer)[0] is check_template(tokenizer)[0] is CheckStatus.OK
