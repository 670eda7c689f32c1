"""Chat templates and tokenizers for tests: all templates that TRL ships and that of DeepSeek-V2, over nano's tokenizer.

The control tokens that a template spells out are added to it.
"""

import re
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from reward.chat import TODAY

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
NANO = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "recipes" / "nano" / "policy")
TRL = Path(str(find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
TEMPLATES = ["deepseek_v2", *sorted(file.stem for file in TRL.glob("*.jinja"))]
CONTROL = re.compile(r"<[|｜/]?[\w▁]+[|｜]?>|\[/?[A-Z_]+\]|<\|/?[\w:.]+\|?>|<\w+\|>")
MARKUP = re.compile(r"think|tool|function|param|arg")
ENDS = [
    "<|im_end|>",
    "<｜end▁of▁sentence｜>",
    "<|return|>",
    "<|eot_id|>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot|>",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PLAIN, THOUGHTFUL = "It is 4.", "<think>\nTwo and two.\n</think>\n\nIt is 4."


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


CONVERSATIONS = {
    "a question": [user("What is 2 + 2?")],
    "a system message": [system("Be exact."), user("What is 2 + 2?")],
    "turns": [user("a"), assistant("b"), user("c")],
    "a thought of an earlier turn": [user("a"), assistant(THOUGHTFUL), user("c")],
    "thoughts and a system message": [
        system("S"),
        user("a"),
        assistant(THOUGHTFUL),
        user("c"),
        assistant("d"),
        user("e"),
    ],
    "white space": [user("  a \n\n"), assistant("\n b "), user("\tc\n")],
    "what a template would run": [user("{{ 1 }} {% raw %} naïve 你好 🙂 <b>x</b> a < b [c]")],
    "nothing": [user("")],
}


@cache
def tokenizer_with(template: str) -> Any:
    if template == "deepseek_v2":
        return AutoTokenizer.from_pretrained(NANO.name_or_path)
    source = (TRL / f"{template}.jinja").read_text(encoding="utf-8")
    found = sorted(set(CONTROL.findall(source)))
    return byte_level(
        source,
        special=[token for token in found if not MARKUP.search(token)],
        added=[token for token in found if MARKUP.search(token)],
        eos_token=next((end for end in ENDS if end in source), "<|endoftext|>"),
    )


def byte_level(
    template: str | None = CHATML,
    special: Sequence[Any] = ("<|im_start|>", "<|im_end|>"),
    added: Sequence[str] = (),
    eos_token: str | None = "<|im_end|>",
    normalizer: Any = None,
) -> Any:
    backend = Tokenizer(NANO.backend_tokenizer.model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=eos_token, chat_template=template
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(list(added))
    return tokenizer


def rendered(tokenizer: Any, messages: Any, *, answering: bool) -> str:
    """As the template renders it on the day that prompts are told."""
    told = {"tokenize": False, "add_generation_prompt": answering, "strftime_now": TODAY.strftime}
    return str(tokenizer.apply_chat_template(messages, **told))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """As a server tokenises a rendering: right where nobody spells out a control token."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])


def refused(why: str, *templates: str) -> dict[str, str]:
    return dict.fromkeys([name for name in TEMPLATES if name.removesuffix("_training") in templates], why)


# What is refused, by template, with a part of the reason.
TAKE_LISTS_ONLY = refused("leaves out what the|has no attribute 'text'", "idefics3", "smolvlm", "llava_next")
NO_SYSTEM_MESSAGES = refused("System role not supported", "gemma")
NO_DEMONSTRATIONS = refused("leaves the thoughts .* out", "deepseek_r1_distill", "deepseekv3")
del NO_DEMONSTRATIONS["deepseek_r1_distill_training"]
ONLY_WITH_A_THOUGHT = refused("each response needs one", *(name for name in TEMPLATES if name.startswith("nemotron")))
ONLY_WITH_A_THOUGHT["deepseek_r1_distill_training"] = "each response needs one"
ONLY_WITHOUT_A_THOUGHT = refused("ends a prompt in .* but writes something else", "qwen3_5_nothink")
ONLY_WITHOUT_A_THOUGHT |= refused("an empty thought before the thought", "qwen3_8")
