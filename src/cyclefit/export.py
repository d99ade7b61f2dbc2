"""Export of a run for other software: `python -m cyclefit.export RUN --format FORMAT --out PATH`."""

import argparse
from pathlib import Path

from cyclefit import UserError
from cyclefit.config.start import run as run_command
from cyclefit.files import atomic
from cyclefit.runs import load_run, read_run


def export(run: Path, form: str, out: Path, checkpoint: str = "last") -> str:
    """Exports the trained weights of a run in another library's format; returns the lines of code that load them there.

    `diffusers`: a folder for `load_lora_weights` of the generator's pipeline. `kohya`: one safetensors file for Stable
    Diffusion 1, 2 and XL with kohya's prefixes and diffusers' names of layers, which ComfyUI and others read. `blip`: a
    folder for `BlipForConditionalGeneration.from_pretrained` with tokenizer and image processor, adapters merged into
    the weights. `transformers`: a folder for `AutoModelForImageTextToText.from_pretrained` with its processor, adapters
    merged. `clipcap`: a folder for `ClipCap(pretrained=...)`.
    A generator's moving average is exported if the run kept one. `out` is written completely or not at all.

    Raises:
        FileNotFoundError: the folder is not a run, or has no such checkpoint.
        UserError: the run did not train a model of this format, or `out` exists.

    """
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists: delete it or choose another --out")
    _, trained = read_run(run, checkpoint)
    kinds = sorted({name.partition(".")[0] for name in trained})
    models = [load_run(run, checkpoint, kind)[0] for kind in kinds]
    model = next((model for model in models if form in model.formats), None)
    if model is None:
        formats = ", ".join(name for model in models for name in model.formats)
        raise UserError(f"{run} trained a {' and a '.join(kinds)}, which --format {form} cannot export: use {formats}")
    suffix = model.formats[form]
    if not out.name.endswith(suffix):
        raise UserError(f"--format {form} writes one file: --out {out} must end in {suffix}")
    with atomic(out) as partial:
        usage = model.export(form, partial)
    return usage.replace(str(partial), str(out))


def main(arguments: list[str]) -> int:
    """`python -m cyclefit.export RUN --format FORMAT --out PATH [--checkpoint last|best]`."""
    parser = argparse.ArgumentParser(
        prog="cyclefit export", description="Exports the trained weights of a run for other software."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--format", required=True, help="diffusers or kohya (a LoRA); blip, transformers or clipcap (a captioner)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write (kohya: .safetensors file)")
    parser.add_argument("--checkpoint", choices=["last", "best"], default="last")
    parsed = parser.parse_args(arguments)
    usage = export(parsed.run, parsed.format, parsed.out, parsed.checkpoint)
    print(f"exported {parsed.checkpoint} of {parsed.run} to {parsed.out}; load it with\n\n{usage}")
    return 0


if __name__ == "__main__":
    run_command(main)
