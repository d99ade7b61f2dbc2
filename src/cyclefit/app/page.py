"""The page: a tab for photos, one for prompts and one for reports. It needs nothing from the network."""

from collections.abc import Callable
from pathlib import Path

import gradio as gr
from markupsafe import Markup

from cyclefit import UserError
from cyclefit.app.reports import framed, html, mistake, pages_in
from cyclefit.app.sides import Answer, Side
from cyclefit.records import Kind
from cyclefit.report.page import TEMPLATES, environment

LARGEST = "20mb"
"""Of an uploaded file."""
MOST = 8
"""Samples of one input at most."""


def page(sides: dict[Kind, Side | str], folder: Path, seed: int) -> gr.Blocks:
    """The page of both directions and of the reports in a folder and the folders in it."""
    with gr.Blocks(title="cyclefit", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.HTML("<h1>cyclefit</h1>")
        with gr.Tab("Photo"):
            photo = gr.Image(label="photo", sources=["upload", "clipboard"], type="filepath", height=240, render=False)
            # The file as it is: what is wrong with it is said by the side.
            photo.preprocess = lambda given: Path(given.path).read_bytes() if given and given.path else None
            _direction(sides["captions"], photo, "nucleus samples", "Caption it", seed, Side.captions)
        with gr.Tab("Prompt"):
            prompt = gr.Textbox(label="prompt", lines=2, render=False)
            _direction(sides["images"], prompt, "images", "Draw it", seed, Side.images)
        with gr.Tab("Report"):
            reports = [str(path.relative_to(folder)) for path in pages_in(folder)]
            if reports:
                name = gr.Radio(reports, label=f"report in {folder}")
                shown = gr.HTML()
                name.change(lambda name: framed(folder, name), name, shown, api_visibility="private")
            else:
                none = (
                    f"There is no report in {folder}: give the folder of an evaluation, or the one above it, as --out."
                )
                gr.HTML(html(Markup("<p>{}</p>").format(none)))
    return blocks


def serve(blocks: gr.Blocks) -> int:
    """Serves the page to this machine until it is interrupted; requests wait for each other."""
    system = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Arial", "sans-serif"]
    _, url, _ = blocks.queue(max_size=32).launch(
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        max_file_size=LARGEST,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Base(font=system, font_mono=["ui-monospace", "Consolas", "monospace"]),
        css=(TEMPLATES / "app.css").read_text(encoding="utf-8"),
    )
    print(f"app: {url}", flush=True)
    blocks.block_thread()
    return 0


def _direction(
    side: Side | str, given: gr.Component, what: str, verb: str, seed: int, ask: Callable[..., Answer]
) -> None:
    """The inputs of a tab, and what comes out."""
    if isinstance(side, str):
        gr.HTML(html(Markup("<p>{}</p>").format(side)))
        return
    if side.notes:
        gr.HTML(html(Markup("").join(Markup("<p class='note'>{}</p>").format(note) for note in side.notes)))
    with gr.Row():
        with gr.Column(scale=3):
            given.render()
        with gr.Column(scale=2):
            count = gr.Slider(1, MOST, value=2, step=1, label=what)
            chosen = gr.Number(seed, precision=0, label="seed")
            button = gr.Button(verb, variant="primary")
    shown = gr.HTML()

    def asked(given, count: int, seed: int | None) -> str:
        try:
            answer = ask(side, given, count, seed)
        except UserError as error:
            return mistake(error)
        return html(Markup(environment().get_template("answer.html.j2").render(answer=answer)))

    triggers = [button.click, given.submit] if isinstance(given, gr.Textbox) else [button.click]
    # The models answer one at a time, whichever tab asks.
    queue = {"concurrency_limit": 1, "concurrency_id": "models"}
    gr.on(triggers, asked, [given, count, chosen], shown, **queue, api_visibility="private")
