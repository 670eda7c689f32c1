"""Data as a run would read them, for people: what a file or card has, what would be refused, and a row as the model sees it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.data.cards import CARDS, DataCard, OwnSource, list_cards, load_card
from align.data.chat import encode_prompt
from align.data.files import read_rows
from align.data.forms import COMPLETIONS, Form
from align.data.loader import load_preferences, load_split
from align.data.own import SHOWN, own_card, read_source, tables_of
from align.data.own_pairs import Pair
from align.data.own_rows import Turns, system_column
from align.data.rows import Row
from align.data.types import Example, Preference, SplitName
from align.errors import UserError
from align.model.policy import load_tokenizer
from align.stages.reward_model import encode_pair
from align.stages.sft import encode_demonstration, trained_turns
from reward.rows import DOMAINS, TRUTHS

MEASURED = 1000
"""Lengths are those of so many rows, evenly taken, where there are more."""
LONGEST_VALUE = 60
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
Items = Sequence[Example | Preference]
T = TypeVar("T")


class Joined(Sequence[Example | Preference]):
    """The items of several sequences, each read when it is asked for."""

    def __init__(self, parts: Sequence[Items]):
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        for part in self._parts:
            if place < len(part):
                return part[place]
            place -= len(part)
        raise IndexError


def show_data(name: str, model: str | None, console: Console) -> None:
    """Print what is in a file, in files of a pattern, in a directory, or in the data of a card; `model` gives tokenizer and template.

    Raises UserError where nothing of it can be read.
    """
    card = card_named(name)
    items = {split: loaded(card, split) for split in card.splits}
    every = Joined(list(items.values()))
    console.print(f"{card.called}: for {', '.join(card.stages)}", markup=False, highlight=False)
    if isinstance(card.source, OwnSource):
        show_columns(card.source, console)
    show_splits(card, items, console)
    encoded = [] if model is None else show_lengths(every, load_tokenizer(model), console)
    show_repeated(every, console)
    if isinstance(card.source, OwnSource):
        tables = read_source(card.source).values()
        reasons = [why for rows in tables for why in rows.bad]
        show_refused(reasons, "cannot be used", console, sum(rows.bad_count for rows in tables))
    for item in every[:1]:
        console.print(
            "\nThe first row of the training split" + (", as the model sees it:" if encoded else ":"), highlight=False
        )
        console.print(seen_by_model(encoded[0]) if encoded else as_written(item), soft_wrap=True)


def show_cards(console: Console) -> None:
    """Print the data cards that come with the project."""
    rows = [[card.name, ", ".join(card.stages), card.title, card.licence] for card in list_cards()]
    table(console, "card", rows, ["stages", "what it is", "licence"])
    console.print(
        f"They are in {CARDS}; `align data show CARD` shows one.", markup=False, highlight=False, soft_wrap=True
    )


def card_named(name: str) -> DataCard:
    """The card of a name, or the one that is made of files; these keep their bad rows for `show_refused`."""
    path = Path(name).expanduser()
    is_card = path.suffix == ".md" or (CARDS / f"{name}.md").is_file()
    if not is_card and (path.exists() or path.suffix or len(path.parts) > 1):
        return own_card(OwnSource(kind="own", path=name, bad_rows="leave_out"))
    return load_card(name)


def loaded(card: DataCard, split: SplitName) -> Items:
    """The rows of a split, without those whose prompts are held out from it."""
    if {"reward_model"} <= set(card.stages) <= {"reward_model", "eval"}:
        return load_preferences(card, split).examples
    return load_split(card, split).examples


def show_splits(card: DataCard, items: Mapping[SplitName, Items], console: Console) -> None:
    """Print how many rows each split has."""
    table(console, "split", [[split, len(items[split]), card.splits[split]] for split in items], ["rows", "what it is"])


def show_form(source: OwnSource, console: Console) -> Form:
    """Print the form of the files; returns it."""
    form = next(rows.form for rows in read_source(source).values())
    console.print(f"form: {form.name} ({form.columns}; {form.source})", markup=False, highlight=False)
    return form


def show_columns(source: OwnSource, console: Console) -> None:
    """Print the form of the files and what each of their columns is read as."""
    form = show_form(source, console)
    filled: Counter[str] = Counter()
    first = None
    for row in (row for files in tables_of(source).values() for file in files for row in read_rows(file)):
        if isinstance(row, Row):
            filled.update(column for column in row.values if row.has(column))
            first = row if first is None and can_be_read(form, row) else first
    assert first is not None
    uses = uses_of(form, first)
    found = [[c, filled[c], plain(first.values.get(c)), uses.get(c, "sample.metadata, for rewards")] for c in filled]
    table(console, "column", found, ["rows with it", "for example", "read as"])


def can_be_read(form: Form, row: Row) -> bool:
    """Whether the row is of the form, and nothing is wrong with it."""
    with suppress(UserError):
        return form.fits(row) and bool(form.read(row))
    return False


def uses_of(form: Form, row: Row) -> dict[str, str]:
    """What the columns of a row are read as, but those that rewards alone read."""
    truth = next((c for c in TRUTHS if row.has(c)), "")
    domain = next((c for c in DOMAINS if isinstance(row.values.get(c), str | list) and row.has(c)), "")
    read = form.read(row)
    turns: Turns = read.prompt if isinstance(read, Pair) else read.turns
    system = system_column(row, turns) or ""
    if isinstance(read, Pair):
        uses = dict.fromkeys(row.values, "for rewards of DPO's evaluation") | dict.fromkeys(read.columns, "prompt")
        return uses | {
            truth: "ground truth of DPO's evaluation",
            "chosen": "the better completion",
            "rejected": "the worse completion",
            "margin": "margin",
            "id": "id",
            domain: "domain",
            system: "system message",
        }
    uses = {truth: "ground truth, and for rewards", domain: "domain, and for rewards"}
    uses |= {"id": "id, and for rewards", "level": "level, and for rewards", "tools": "tools, and for rewards"}
    uses |= dict.fromkeys(read.columns, "conversation" if form.kind == "conversations" else "prompt")
    uses[system] = "system message" if system in read.columns else "system message, and for rewards"
    if form.name == "completion":
        uses[next(c for c in COMPLETIONS if row.has(c))] = "response, and for rewards"
    return uses


@dataclass(frozen=True, slots=True)
class Seen:
    """A row as token ids, of which `trained_on` says which are learned from."""

    token_ids: Sequence[int]
    trained_on: Sequence[bool]
    tokenizer: Any


def show_lengths(items: Items, tokenizer: Any, console: Console) -> list[Seen]:
    """Print how many tokens rows have, and which the template or tokenizer refuses. Returns what was measured, the first row's first."""
    seen: list[Seen] = []
    refused: list[str] = []
    chosen = some_of(items)
    for item in chosen:
        try:
            seen += encoded(item, tokenizer)
        except UserError as error:
            refused.append(str(error))
    if seen:
        rows = [
            [what, min(counts), round(median(counts)), nearest_rank(counts, 0.95), max(counts)]
            for what, counts in (
                ("all", [len(one.token_ids) for one in seen]),
                ("trained on", [sum(one.trained_on) for one in seen if any(one.trained_on)]),
            )
            if counts
        ]
        table(console, f"tokens of {len(seen)} sequences", rows, ["least", "median", "95 %", "most"])
    show_refused(
        refused,
        f"of {len(chosen)} that were encoded are refused by the model's template or tokenizer",
        console,
        len(refused),
    )
    return seen


def some_of(items: Sequence[T]) -> Sequence[T]:
    """Those of the items whose lengths are measured, the first among them."""
    return items[:: max(1, len(items) // MEASURED)]


def encoded(item: Example | Preference, tokenizer: Any) -> list[Seen]:
    """A row as a stage encodes it: the sequences of a demonstration, both completions of a pair, the better one first, or a prompt."""
    if isinstance(item, Preference):
        [pair] = encode_pair(tokenizer, item, margin_scale=0.0)
        prompt = pair.prompt_length
        completions = (pair.pair.chosen, pair.pair.rejected)
        return [Seen(ids, [place >= prompt for place in range(len(ids))], tokenizer) for ids in completions]
    if item.response is None:
        ids = encode_prompt(tokenizer, item.messages, item.tools)
        return [Seen(ids, [False] * len(ids), tokenizer)]
    return [Seen(s.token_ids, s.sampled.tolist(), tokenizer) for s in encode_demonstration(tokenizer, item)]


def nearest_rank(counts: Sequence[int], share: float) -> int:
    """The least of the counts that `share` of them do not exceed."""
    return sorted(counts)[max(0, -int(-share * len(counts) // 1) - 1)]


def show_repeated(items: Items, console: Console) -> None:
    """Print how many rows have a prompt that an earlier one has, and how many are wholly the same."""
    prompts = Counter(hash(item.prompt_key) for item in items)
    whole = Counter(hash(tuple(texts_of(item))) for item in items)
    repeated = sum(count - 1 for count in prompts.values())
    if repeated:
        same = sum(count - 1 for count in whole.values())
        console.print(
            f"{repeated} of {len(items)} rows have the prompt of another, {same} of them its answer too",
            highlight=False,
        )
    else:
        console.print("no prompt comes twice", highlight=False)


def texts_of(item: Example | Preference) -> Iterator[str | None]:
    """All that a row says, to tell rows that are the same."""
    yield from (message["content"] for message in item.messages)
    yield from (item.chosen, item.rejected) if isinstance(item, Preference) else (item.response, item.answer)


def show_refused(reasons: Sequence[str], what: str, console: Console, count: int) -> None:
    """Print the first of the `count` rows that a run would refuse, and their number."""
    if not reasons:
        return
    console.print(Text(f"{count} rows {what}{', the first of them' if count > SHOWN else ''}:", "bold red"))
    for reason in reasons[:SHOWN]:
        console.print(Text(f"  {CONTROL.sub('', reason)}"), soft_wrap=True)


def seen_by_model(seen: Seen) -> Text:
    """The text of a row's tokens, with a mark around what is trained on."""
    text = Text()
    place = 0
    for trained, part in groupby(seen.trained_on):
        count = len(list(part))
        said = seen.tokenizer.decode(list(seen.token_ids[place : place + count]), clean_up_tokenization_spaces=False)
        text.append(f"⟦{CONTROL.sub('', said)}⟧" if trained else CONTROL.sub("", said), "bold green" if trained else "")
        place += count
    note = "⟦ ⟧ is trained on" if any(seen.trained_on) else "nothing of it is trained on: the policy's own answers are"
    return text.append(f"\n({note})", "dim")


def as_written(item: Example | Preference) -> Text:
    """A row turn by turn, with a mark around what is trained on."""
    text = Text()
    turns: list[tuple[str, str]] = [(message["role"], message["content"]) for message in item.messages]
    if isinstance(item, Preference):
        turns += [("chosen", f"⟦{item.chosen}⟧"), ("rejected", item.rejected)]
    else:
        if item.response is not None:  # in the place of what it may be followed by, which is asked
            conversation, places = trained_turns(item)
            turns[: len(conversation)] = [
                (turn["role"], f"⟦{turn['content']}⟧" if place in places else turn["content"])
                for place, turn in enumerate(conversation)
            ]
        turns += [] if item.answer is None else [("ground truth", item.answer)]
    for who, said in turns:
        text.append(f"{who}: ", "bold").append(f"{CONTROL.sub('', said)}\n")
    trained = "⟦ ⟧ is trained on" if "⟦" in text.plain else "nothing of it is trained on: the policy's own answers are"
    return text.append(f"({trained}; --model M shows it in the chat template of M)", "dim")


def plain(value: Any) -> str:
    """A value in a line."""
    text = CONTROL.sub(" ", " ".join(str(value).split()))
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def table(console: Console, first: str, rows: Sequence[Sequence[Any]], others: Sequence[str]) -> None:
    """Print a table of texts and numbers."""
    made = Table(box=box.SIMPLE, pad_edge=False)
    for place, title in enumerate([first, *others]):
        numbers = bool(rows) and all(isinstance(row[place], int) for row in rows)
        made.add_column(title, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(str(cell)) for cell in row))
    console.print(made)
