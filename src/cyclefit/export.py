"""Export of a run for other software: `python -m cyclefit.export RUN --format FORMAT --out PATH`."""

import argparse
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cyclefit import UserError
from cyclefit.card import Export, model_card, public
from cyclefit.config.start import run as run_command
from cyclefit.files import atomic, write_atomic
from cyclefit.runs import load_run, read_run


def export(
    run: Path,
    form: str,
    out: Path,
    checkpoint: str = "last",
    evaluation: Path | None = None,
    repo: str | None = None,
    revision: str | None = None,
) -> str:
    """Exports the trained weights of a run in another library's format; returns the lines of code that load them there.

    `diffusers`: a folder for `load_lora_weights` of the generator's pipeline. `kohya`: one safetensors file for Stable
    Diffusion 1, 2 and XL with kohya's prefixes and diffusers' names of layers, which ComfyUI and others read. `blip`: a
    folder for `BlipForConditionalGeneration.from_pretrained` with tokenizer and image processor, adapters merged into
    the weights. `transformers`: a folder for `AutoModelForImageTextToText.from_pretrained` with its processor, adapters
    merged. `clipcap`: a folder for `ClipCap(pretrained=...)`.
    A generator's moving average is exported if the run kept one. `out` is written completely or not at all. A folder
    has the model card in `README.md`, a file has it beside it, with the suffix `.md`: see `model_card` for
    `evaluation`. With `repo` and `revision`, the lines of the card load the weights from there, and it names no local
    folder.

    Raises:
        FileNotFoundError: the folder is not a run, or has no such checkpoint.
        UserError: the run did not train a model of this format, `out` exists, or `evaluation` is not one of the run.

    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists: delete it or choose another --out")
    config, trained = read_run(run, checkpoint)
    kinds = sorted({name.partition(".")[0] for name in trained})
    models = {kind: load_run(run, checkpoint, kind)[0] for kind in kinds}
    kind = next((kind for kind, model in models.items() if form in model.formats), None)
    if kind is None:
        formats = ", ".join(name for model in models.values() for name in model.formats)
        raise UserError(f"{run} trained a {' and a '.join(kinds)}, which --format {form} cannot export: use {formats}")
    suffix = models[kind].formats[form]
    if not out.name.endswith(suffix):
        raise UserError(f"--format {form} writes one file: --out {out} must end in {suffix}")
    if suffix and card_beside(out).exists():
        raise UserError(f"{card_beside(out)} exists: delete it or choose another --out")
    count = sum(parameter.numel() for name, parameter in trained.items() if name.startswith(f"{kind}."))
    with atomic(out) as partial:
        usage = models[kind].export(form, partial)
        here = usage.replace(str(partial), str(out))
        there = here if repo is None else _from_hub(usage, partial, form, repo, revision, suffix and out.name)
        about = Export(run, checkpoint, kind, form, config, count, there)
        name = repo.rpartition("/")[2] if repo else out.name.removesuffix(suffix)
        card = model_card(about, name, evaluation)
        if suffix:
            write_atomic(card_beside(out), card)
        else:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return here


def card_beside(out: Path) -> Path:
    """The model card of an export that is one file."""
    return out.with_suffix(".md")


def _from_hub(usage: str, partial: Path, form: str, repo: str, revision: str | None, file: str) -> str:
    """The lines that load what was written to `partial` from the hub."""
    where = [repr(repo), *([f"revision={revision!r}"] if revision else [])]
    if form == "clipcap":  # which loads folders only
        where = [f"snapshot_download({', '.join(where)})"]
        usage = f"from huggingface_hub import snapshot_download\n{usage}"
    where += [f"weight_name={file!r}"] if file else []
    return public(usage.replace(repr(str(partial)), ", ".join(where)))


def push(out: Path, repo: str, private: bool = False, revision: str | None = None) -> str:
    """Uploads an export to a model repository of the hub, which is created if need be; returns its address.

    Raises:
        UserError: the hub does not answer or does not allow it, or the repository is public and `private` is set.

    """
    from huggingface_hub import HfApi

    later = f"; {out} is complete: delete it and run the command again, or upload it with `hf upload`"
    with tempfile.TemporaryDirectory() as staged:
        folder = out
        if out.is_file():
            folder = Path(staged)
            shutil.copyfile(out, folder / out.name)
            shutil.copyfile(card_beside(out), folder / "README.md")
        with _asking(repo, later):
            api = HfApi()
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise UserError(
                    f"{repo} exists and is public, so nothing was uploaded: leave out --private, or choose another "
                    f"name{later}"
                )
            if revision:
                api.create_branch(repo, branch=revision, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message="Export of cyclefit")
    return str(url)


def check_push(repo: str) -> None:
    """Checks the repository's name and asks the hub whether it knows the user, before anything is written.

    Raises:
        UserError: it does not, or does not answer.

    """
    from huggingface_hub import HfApi

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UserError(f"--push {repo} is not the name of a repository on the hub: write it as ORG/NAME")
    with _asking(repo, ""):
        HfApi().whoami()


@contextmanager
def _asking(repo: str, later: str) -> Iterator[None]:
    """Turns the errors of the hub's client into one sentence that names the way out."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except UserError:
        raise
    except LocalTokenNotFoundError:
        said = "there is no token for the hub: log in with `hf auth login`, or set HF_TOKEN"
    except OfflineModeIsEnabled:
        said = "HF_HUB_OFFLINE is set: unset it to use the hub"
    except HFValidationError as error:
        said = f"--push {repo} is not the name of a repository on the hub: {error}"
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error if isinstance(error, RuntimeError) else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        said = {
            401: "the hub does not accept the token: log in with `hf auth login`, or set HF_TOKEN to a valid one",
            403: f"the token has no right to write to {repo}: use one with write access to it, or choose another name",
            404: f"the hub has no {repo} that the token can see: check the name, and the token's access to it",
        }.get(status, f"the hub did not take {repo} ({reason}): try again later, or choose another name")
        if status is None and isinstance(cause, HTTPError | OSError):
            said = f"{constants.ENDPOINT} does not answer ({reason}): check the network, or HF_ENDPOINT"
    else:
        return
    raise UserError(said + later)


def main(arguments: list[str]) -> int:
    """The command `cyclefit export`; its options are below."""
    parser = argparse.ArgumentParser(
        prog="cyclefit export", description="Exports the trained weights of a run, with a model card."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--format", required=True, help="diffusers, kohya or peft (a LoRA); blip, transformers or clipcap (a captioner)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write (kohya: .safetensors file)")
    parser.add_argument("--checkpoint", choices=["last", "best"], default="last")
    parser.add_argument("--evaluation", type=Path, help="folder of the evaluation for the model card; default: those "
                        "beside the run that contain these weights")  # fmt: skip
    parser.add_argument("--push", metavar="ORG/NAME", help="upload the export to this repository of the hub")
    parser.add_argument("--private", action="store_true", help="with --push: create the repository as a private one")
    parser.add_argument("--revision", help="with --push: the branch to upload to, created if need be")
    parsed = parser.parse_args(arguments)
    if parsed.push is None and (parsed.private or parsed.revision):
        raise UserError("--private and --revision say how to upload: add --push ORG/NAME, or leave them out")
    if parsed.push is not None:
        check_push(parsed.push)
    usage = export(
        parsed.run, parsed.format, parsed.out, parsed.checkpoint, parsed.evaluation, parsed.push, parsed.revision
    )
    print(f"exported {parsed.checkpoint} of {parsed.run} to {parsed.out}; load it with\n\n{usage}")
    if parsed.push is not None:
        print(f"\nuploaded to {push(parsed.out, parsed.push, parsed.private, parsed.revision)}")
    return 0


if __name__ == "__main__":
    run_command(main)
