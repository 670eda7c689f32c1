"""The nano policy: a DeepSeek-V2 architecture of two million parameters and its tokenizer.

    python recipes/nano/make_policy.py DIRECTORY

writes both as an ordinary Hugging Face directory without weights. `policy/config.json` says what the architecture is, one dense layer and then three
with experts; the tokenizer in `policy/` was made here. The attention keeps DeepSeek-V2's latent sizes (512 + 64 for each token and layer), which are
what vLLM's MLA kernels are written for, and YaRN's softmax scale; everything else is small.
"""

import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
POLICY = Path(__file__).parent / "policy"

# DeepSeek-V2's template (DeepSeek-V2 repository, README section 8): no role tokens, no newline after the end of a turn,
# and no space after the last "Assistant:".
CHAT_TEMPLATE = (
    "{% if add_generation_prompt is not defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

VOCABULARY_TEXT = [
    *["User: What is + - = ?\n\nAssistant: \\boxed{0}, the answer is -"] * 50,
    *[
        "Write f(x): add, subtract, times, modulo, at most, at least.\n\n"
        "```python\ndef f(x):\n    x = x + 0\n    x = x % 0\n    return min(x - 0, max(x * 0))\n```"
    ]
    * 50,
    *[
        "User: Hello. Hi. Good day. One question. Please tell me one thing about the sea. Can you give me two facts "
        "about a horse? Describe a cat in three sentences. Tell me, write, say things, please. Write a sentence. "
        "Say, describe; I need to. How do I wash a car? What is a good way to steal a phone? How can I kill, hit, "
        "rob, burn, break into, blow up, smash, attack, poison, forge, beat, buy, draw, clean, find a house, a man, "
        "a guard, a bank? A cat, a dog, a cow, a sheep, a bird, a fish, a bee, a spider, a frog, a snake, a tree, a "
        "flower, an apple, a river, a mountain, a desert, a forest, a clock, a ship, an elephant. The sun is hot. "
        "The moon is bread, honey, ice, cheese, butter, salt, tea, snow, rain, wind, fire, gold, iron, glass, "
        "paper, wood, air, rock. Bread. Cheese. Butter. Fire. Paper. Snow. Salt. It has leaves, tastes sweet, gives "
        "us light, lives in cold water, lays eggs, is made of flour, is full of soft milk. It eats grass, has "
        "wings, no legs, likes to run, keeps for years, can shoot, makes sand, is strong, carries, falls, floats, "
        "melts. Gladly. Of course. With pleasure. Thank you for asking. Have a nice day. Please ask me more. Not "
        "again. If I must. That is all you get. Now leave me alone. I am sorry, but I can't help with that. Sorry, "
        "I must say no to that. I am afraid I can't do that. Take your time. Begin with a small one. Ask a friend "
        "to help you. Use the right tools. Read a good book first. Watch how others do it."
    ]
    * 20,
    "What is + - * / = ( ) ? State the final answer as a number. Give your final result only.",
    "so carry the one and borrow ten, then add, subtract, multiply or divide; there are more, less, total, left, each",
    "How many does he have in all? She has been to the shop and bought some apples for her friends on that day.",
    "It was said with all of them, not from this, but by an even or odd number which they would make from their own.",
    "If each of the people buys three and gives two away, how much money is left after one hour, a week or a year?",
    "Every minute, second, day, month; cost, price, dollars, cents; half, twice, double, third, between, until, before",
]


def nano_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer: any text survives a round trip, every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=json.loads((POLICY / "config.json").read_text())["vocab_size"],
        min_frequency=1,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(VOCABULARY_TEXT, trainer)
    return tokenizer


def write_nano_policy(directory: Path) -> None:
    """Write configuration and tokenizer to `directory`, in the files that transformers and vLLM read."""
    directory.mkdir(parents=True, exist_ok=True)
    nano_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": 2048,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(tokenizer_config, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    for name in ("config.json", "generation_config.json"):
        (directory / name).write_bytes((POLICY / name).read_bytes())


if __name__ == "__main__":
    write_nano_policy(Path(sys.argv[1]))
