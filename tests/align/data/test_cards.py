import pytest

from align.data.cards import CARDS, list_cards, load_card, require_stage
from align.errors import UserError

from .. import rows

FIELDS = {"prompt": "q", "answer": "a"}
SHARED_ROWS = {"train": {"from": "a.jsonl", "percent": [4, 100]}, "test": {"from": "a.jsonl", "percent": [0, 5]}}
SHARED_SEEDS = {"train": {"size": 100, "seed": 0}, "test": {"size": 10, "seed": 99}}
FILES = {
    "kind": "file",
    "splits": {"train": {"from": "train.jsonl"}, "test": {"from": "test.jsonl"}},
    "fields": FIELDS,
}
HUB = FILES | {
    "kind": "hub",
    "path": "owner/name",
    "splits": {"train": {"from": "train"}, "test": {"from": "test"}},
}


def write_card(directory, source=FILES, **changes):
    return rows.write_card(directory / "mine.md", source, **({"stages": ["grpo", "eval"]} | changes))


def test_the_cards_of_the_repository_are_valid():
    names = [path.stem for path in CARDS.glob("*.md")]
    assert [card.name for card in list_cards()] == sorted(names)


def test_a_card_is_found_by_name_and_by_path(tmp_path):
    path = write_card(tmp_path)
    assert load_card("mine", tmp_path) == load_card(path) == load_card(str(path))


def test_files_start_at_the_card(tmp_path):
    card = load_card(write_card(tmp_path))
    assert card.source.splits["train"].table == str(tmp_path / "train.jsonl")


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(UserError, match=r"no data card 'nano_maths'.*did you mean 'nano_math'"):
        load_card("nano_maths")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"licens": "MIT"}, r"mine\.md: unknown key 'licens' \(did you mean 'licence'\?\)"),
        (
            {"source": FILES | {"field": {}}},
            r"mine\.md: source: unknown key 'field' \(did you mean 'fields'\?\)",
        ),
        (
            {"source": FILES | {"fields": {"prompt": "q", "anser": "a"}}},
            r"source\.fields: unknown key 'anser' \(did you mean 'answer'\?\)",
        ),
        ({"source": FILES | {"fields": {}}}, r"source\.fields\.prompt: Field required"),
        (
            {"source": FILES | {"fields": FIELDS | {"answer_after": "#", "answer_boxed": True}}},
            r"source\.fields: answer_after and answer_boxed are two places of one answer",
        ),
        (
            {"source": FILES | {"fields": {"prompt": "q", "answer_boxed": True}}},
            r"source\.fields: answer_after and answer_boxed need the column of the answer",
        ),
        (
            {"source": FILES | {"fields": FIELDS | {"tests": {"format": "mbp"}}}},
            r"source\.fields\.tests: .*'mbp'.*'human_eval', 'mbpp', 'apps'",
        ),
        (
            {"source": FILES | {"fields": FIELDS | {"tests": {"format": "apps", "casses": "c"}}}},
            r"source\.fields\.tests\.apps: unknown key 'casses' \(did you mean 'cases'\?\)",
        ),
        ({"source": HUB | {"files": {"train": "a.jsonl"}}}, "source: files: there are none of test"),
        ({"source": HUB | {"files": {"train": "a", "test": "b"}, "config": "c"}}, "source: config has no effect"),
        ({"source": {"kind": "hubb"}}, r"source: .*'hubb'.*'hub'"),
        ({"source": FILES | {"splits": SHARED_ROWS}}, "test and train take the same rows"),
        (
            {"source": {"kind": "reasoning_gym", "task": "chain_sum", "splits": SHARED_SEEDS}},
            r"train and test share seeds.*must start at 100",
        ),
        ({"splits": {"train": "some"}}, "describes .*train.*but the source has .*test"),
        ({"decontamination": {"against": ["validation"], "why": "so"}}, "there is no split validation"),
        ({"stages": ["sft"]}, "sft needs demonstrations"),
        ({"name": "other"}, r"its file must be other\.md"),
    ],
)
def test_a_wrong_card_names_file_and_key(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_card(write_card(tmp_path, **changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# Mine\n", "starts with YAML"),
        ("---\nname: mine\n", "starts with YAML"),
        ("---\nname: [\n---\n", "not YAML"),
        ("---\n- name\n---\n", "valid dictionary"),
    ],
)
def test_front_matter_that_is_none(tmp_path, text, message):
    path = tmp_path / "mine.md"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_card(path)


def test_a_missing_path_is_an_error_of_the_user(tmp_path):
    with pytest.raises(UserError, match="cannot read data card"):
        load_card(tmp_path / "none.md")


def test_a_stage_the_card_is_not_for():
    with pytest.raises(UserError, match="gsm8k is not for sft, only for grpo, eval"):
        require_stage(load_card("gsm8k"), "sft")
    require_stage(load_card("gsm8k"), "grpo")
