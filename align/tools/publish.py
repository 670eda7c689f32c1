"""A finished run made ready for others: a model card beside its weights, and both in a repository of the Hugging Face hub."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from align.errors import UserError
from align.model.lora import ADAPTER_DIRECTORY
from align.model.policy import first_line
from align.report.model_card import is_edited, model_card, name_of_model, names_of_files
from align.report.read import RunRecord, read_run
from align.run import RunDirectory, redacted, write_atomically
from reward.learned import NOTES

CARD = "README.md"
OF_GIT = ".gitattributes"


def publish(
    path: Path,
    to: str | None,
    *,
    public: bool,
    overwrite: bool,
    new_card: bool,
    tell: Callable[[str], None],
) -> None:
    """Write the model card of the run in `path`, and push `final/` to the repository `to` where one is named.

    A card that somebody has edited stays, unless `new_card`. Raises UserError for a run without a finished model, and as `push` does.
    """
    run = read_run(path)
    final = final_of(run)
    card = final / CARD
    if to is not None:
        check_name(to)
    if card.exists() and is_edited(card) and not new_card:
        tell(f"{card} was edited, and stays as it is; --new-card writes it anew")
    else:
        write_atomically(card, model_card(run, to or run.name))
        tell(f"the model card is in {card}")
    if to is not None:
        tell(f"{final} is at {push(final, to, public=public, overwrite=overwrite)}")


def final_of(run: RunRecord) -> Path:
    """The weights of a run. Raises UserError where it has none, or has not finished."""
    final, state = RunDirectory(run.path).final_directory, run.whole.status.get("state")
    if run.whole.recipe.get("stage") == "pipeline":
        names = [stage.label for stage in run.stages[:-1] if (stage.path / final.name / "config.json").exists()]
        raise UserError(
            f"{run.path} is a pipeline: publish one of its stages ({', '.join(names)}), such as {run.path}/STAGE"
        )
    if state != "finished":
        raise UserError(
            f"{run.path} is {state}, so its recipe and what is in {final} may not go together: finish it first"
        )
    if not (final / "config.json").exists():
        raise UserError(f"{run.path} has made no model: there is none in {final}")
    return final


def check_name(to: str) -> None:
    """Raise UserError for what is no name of a repository."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(to)
    except HFValidationError as error:
        raise UserError(f"--to {to}: {first_line(error)}") from None
    if "/" not in to:
        raise UserError(f"--to {to}: write it with whose it is, like my-name/{to}")


def push(folder: Path, to: str, *, public: bool, overwrite: bool) -> str:
    """Commit the files of a folder to a repository, which is made where it is not there, private unless `public`; returns its address.

    Those that name places of this machine are pushed as `with_names` has them.

    Raises UserError where the repository has files and `overwrite` is false, where it is public and `public` is false or the other way round,
    without a token, and for whatever the hub refuses.
    """
    token = get_token()
    if token is None:
        raise UserError("no token for the hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    api = HfApi(token=token, library_name="moe-align")
    with said(to, token):
        try:
            there = api.model_info(to)
        except RepositoryNotFoundError:
            # Or it is there and the token may not see it; then making it is refused.
            api.create_repo(to, private=not public)
            there = api.model_info(to)
        files = [file.rfilename for file in there.siblings or () if file.rfilename != OF_GIT]
        if files and not overwrite:
            raise UserError(
                f"{to} has files ({', '.join(files[:3])}{', ...' if len(files) > 3 else ''}): --overwrite replaces those of the same names, or "
                "choose another repository"
            )
        if there.private is public:
            how = (
                "private, and --public makes none public that is there"
                if public
                else "public: give --public to push to it"
            )
            raise UserError(f"{to} is {how}")
        named = {file: file for file in sorted(folder.rglob("*")) if file.is_file()} | with_names(folder)
        # One commit, after everything is uploaded: whoever loads the model has all of one or all of the other.
        api.create_commit(
            to,
            [CommitOperationAdd(file.relative_to(folder).as_posix(), content) for file, content in named.items()],
            commit_message="Upload by align publish",
            parent_commit=there.sha,
        )
    return f"{constants.ENDPOINT}/{to}"


def with_names(folder: Path) -> dict[Path, bytes]:
    """What is pushed in place of the files of a model that name places of this machine: the same with names."""
    found: dict[Path, bytes] = {}
    if (notes := folder / NOTES).is_file():
        found[notes] = as_json(names_of_files(json.loads(notes.read_text(encoding="utf-8"))))
    config = folder / ADAPTER_DIRECTORY / "adapter_config.json"
    about = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if Path(base := str(about.get("base_model_name_or_path"))).is_absolute():
        name, card = name_of_model(Path(base)), config.with_name(CARD)
        found[config] = as_json(about | {"base_model_name_or_path": name})
        if card.is_file():  # PEFT writes one
            found[card] = card.read_text(encoding="utf-8").replace(base, name).encode()
    return found


def as_json(value: object) -> bytes:
    """JSON as files have it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def said(to: str, token: str) -> Iterator[None]:
    """Raise UserError, without the token, for what the hub's client raises."""
    try:
        yield
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = {
            401: "the token is invalid or has expired: run `hf auth login`, or set HF_TOKEN to one that may write",
            403: f"the token may not write to {to}: make one that may, at {constants.ENDPOINT}/settings/tokens",
            412: f"{to} was changed while this was uploaded; nothing was committed. Look at it, and try again",
        }.get(status, first_line(error))
        raise UserError(f"the hub refused ({status}): {redacted(why.replace(token, '***'))}") from None
    except Exception as error:  # the client's own libraries for HTTP and storage have their own
        why = redacted(first_line(error).replace(token, "***"))
        raise UserError(f"{to} could not be pushed to {constants.ENDPOINT}: {type(error).__name__}: {why}") from None
