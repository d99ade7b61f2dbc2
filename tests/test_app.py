"""The app: both directions answer as an evaluation does, and the page works in a real browser without a network."""

import asyncio
import io
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from cyclefit import UserError
from cyclefit.app import main, read
from cyclefit.app.reports import framed, pages_in
from cyclefit.app.sides import Side, sides
from cyclefit.config.start import resolve_configs
from cyclefit.data import evaluation_batches
from cyclefit.evaluate import Captions
from cyclefit.evaluate.base import Inputs
from cyclefit.report.page import render_page
from tests.browser import CHROMIUM, opened
from tests.conftest import ROOT

PROMPT = "a small red circle to the left of a large blue star on white"


def of(*arguments: str) -> dict[str, Side | str]:
    return sides(*read(resolve_configs(["--config", *arguments])))


@pytest.fixture(scope="module")
def both() -> dict[str, Side]:
    """The two directions of the miniature world's base models."""
    return of(str(ROOT / "configs" / "miniature_evaluate.yaml"), "--num_candidates=3")


@pytest.fixture(scope="module")
def sample(world):
    """A scene of the test split with a caption of it."""
    return next(iter(evaluation_batches(str(world / "test"), image_size=32, batch_size=1)))


def encoded(batch, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    pixels = (batch.images[0].permute(1, 2, 0) * (1 if batch.images.dtype == torch.uint8 else 255)).byte().numpy()
    Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def test_captions_and_scores_are_those_of_an_evaluation(both, sample):
    side, evaluation = both["captions"], both["captions"].evaluation
    assert isinstance(evaluation, Captions)
    evaluation.fabric = SimpleNamespace(device=torch.device("cpu"))
    batch = sample.to("cpu")
    made = [
        one for one in evaluation.sample(Inputs("test"), "base", evaluation.base, batch, None) if one.decoding != "beam"
    ]
    answer = side.captions(encoded(sample), 2, made[0].noise_seed - 1)
    shown = [items[0].candidate for items in answer.rows.values()]
    assert list(answer.rows) == ["greedy", "nucleus 1", "nucleus 2"]
    assert [one.caption for one in shown] == [one.caption for one in made[:3]]
    for one, other in zip(shown, made, strict=False):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
    # Each judge's best score is marked, in at least one place.
    assert {judge for items in answer.rows.values() for judge in items[0].best} == set(evaluation.judges)


def test_false_parts_are_known_of_scenes_only(both, sample):
    facts = sample.facts[0]
    answer = both["captions"].captions(encoded(sample), 4, 3)
    assert facts["background"] in answer.facts and facts["things"][0]["shape"] in answer.facts
    assert all(items[0].candidate.facts for items in answer.rows.values())
    larger = both["captions"].captions(encoded(sample, 64), 1, 3)
    assert larger.facts is None and larger.rows["greedy"][0].candidate.facts is None


def test_images_of_a_prompt(both, generator):
    side = both["images"]
    answer = side.images(f"  {PROMPT}\n", 2, 7)
    assert list(answer.rows) == ["seed 7", "seed 8"]
    shown = [items[0] for items in answer.rows.values()]
    assert {one.candidate.prompt for one in shown} == {PROMPT}
    assert all(one.candidate.scores.keys() == {"text cycle", "image-text"} for one in shown)
    assert all(len(one.candidate.facts["stated"]) == 8 for one in shown)
    again = side.images(PROMPT, 1, 8).rows["seed 8"][0]
    assert again.image.uri == shown[1].image.uri != shown[0].image.uri
    assert again.candidate.caption == shown[1].candidate.caption


def test_a_run_stands_beside_the_base_where_it_was_finetuned(launch, world, sample):
    run = launch("miniature_sd_lora.yaml", "lora")
    config = str(ROOT / "configs" / "miniature_evaluate_images.yaml")
    found = of(config, f"--runs=[{run}]", '--judges={"image-text": {"class_path": "ImageText"}}')
    assert list(found["images"].models) == ["base", "lora"] and found["images"].notes == []
    assert list(found["captions"].models) == ["base"]
    assert found["captions"].notes == ["No run given has finetuned a captioner: the page shows the base alone."]
    answer = found["images"].images(PROMPT, 1, 0)
    assert answer.models.keys() == {"base", "lora"} and len(answer.rows["seed 0"]) == 2
    # A judge of both kinds that is given judges captions too.
    assert found["captions"].captions(encoded(sample), 1, 0).judges == ["image-text"]


def test_a_judge_that_contrasts_is_left_out():
    contrast = '{"class_path": "Denoising", "init_args": {"num_others": 2}}'
    judges = f'{{"alone": {{"class_path": "ImageText"}}, "contrast": {contrast}}}'
    side = of(str(ROOT / "configs" / "miniature_evaluate.yaml"), f"--judges={judges}")["captions"]
    assert list(side.evaluation.judges) == ["alone"]
    assert side.notes[0] == "contrast is left out, because it contrasts an input with others, and the page has one."


@pytest.mark.parametrize(
    ("ask", "given", "seed", "said"),
    [
        (Side.captions, None, 0, "Choose a photo first"),
        (Side.captions, b"no photo", 0, "cannot be read"),
        (Side.images, "  ", 0, "Write a prompt first"),
        (Side.images, "x" * 1001, 0, "shorten it to 1000"),
        (Side.images, PROMPT, None, "The seed must be a whole number"),
        (Side.images, PROMPT, -1, "The seed must be a whole number"),
    ],
)
def test_bad_input_is_a_sentence(both, ask, given, seed, said):
    with pytest.raises(UserError, match=said):
        ask(both["captions" if ask is Side.captions else "images"], given, 1, seed)


def test_reports_are_read_in_the_folder_only(tmp_path):
    folder, page = tmp_path / "runs", render_page("base.html.j2", title="<script>", byline=[])
    (folder / "captions").mkdir(parents=True)
    for path in (folder / "report.html", folder / "captions" / "report.html", tmp_path / "secret.html"):
        path.write_text(page)
    (folder / "other.html").write_text("<p>no report of ours</p>")
    (folder / "link.html").symlink_to(tmp_path / "secret.html")
    assert pages_in(folder) == [folder / "captions" / "report.html", folder / "report.html"]
    shown = framed(folder, "report.html")
    assert (
        'sandbox="allow-scripts" srcdoc="&lt;!doctype' in shown.replace("DOCTYPE", "doctype") and "<script" not in shown
    )
    assert "&lt;base href=&#34;about:srcdoc&#34;&gt;" in shown
    for name in ("../secret.html", "link.html", str(tmp_path / "secret.html"), "other.html"):
        assert "iframe" not in framed(folder, name) and "mistake" in framed(folder, name)


@pytest.mark.skipif(find_spec("gradio") is not None, reason="gradio is installed")
def test_without_gradio_it_says_how_to_install_it():
    with pytest.raises(UserError, match=r"pip install 'cyclefit\[app\]'"):
        main(["--config", "miniature_evaluate.yaml"])


CLICK = "[...document.querySelectorAll('button')].filter(one => one.textContent.trim() === '{}').at(-1).click()"
TABLE = "[...document.querySelectorAll('.cyclefit table')].find(one => one.offsetParent)?.innerText"
MISTAKE = "[...document.querySelectorAll('.mistake')].find(one => one.offsetParent)?.textContent"
WRITE = """
const area = [...document.querySelectorAll('textarea')].find(one => one.offsetParent);
area.value = {!r}; area.dispatchEvent(new Event('input', {{bubbles: true}}));
"""


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio, which the extra `app` installs")
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_page_in_a_browser(launch, sample, tmp_path):
    run, reports = launch("miniature_blip.yaml", "blip"), tmp_path / "reports"
    reports.mkdir()
    page = render_page("base.html.j2", title="A report", byline=[])
    (reports / "report.html").write_text(page)
    (tmp_path / "scene.png").write_bytes(encoded(sample))
    (tmp_path / "broken.png").write_bytes(b"no photo")
    (tmp_path / "large.png").write_bytes(bytes(21_000_000))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cyclefit.app", "--config", "miniature_evaluate.yaml", f"--runs=[{run}]"]
    environ = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    with subprocess.Popen([*command, f"--out={reports}"], stdout=subprocess.PIPE, text=True, env=environ) as server:
        try:
            url = next((line.split()[1] for line in server.stdout if line.startswith("app: ")), None)
            assert url == f"http://127.0.0.1:{port}/"
            asyncio.run(visit(url, tmp_path))
        finally:
            server.kill()


async def visit(url, folder):
    async with opened(url, folder / "profile") as tab:
        await tab.until("[...document.querySelectorAll('button')].some(one => one.textContent.trim() === 'Caption it')")
        await tab.run(CLICK.format("Caption it"))
        assert await tab.until(MISTAKE) == "Choose a photo first."
        await tab.upload("input[type=file]", folder / "large.png")
        await tab.until("/exceed/i.test(document.body.innerText)")
        await tab.upload("input[type=file]", folder / "broken.png")
        await tab.until("!!document.querySelector('.image-frame img')")
        await tab.run(CLICK.format("Caption it"))
        assert await tab.until(f"/cannot be read/.test({MISTAKE}) && {MISTAKE}")
        await tab.run("document.querySelector('[aria-label=\"Remove Image\"]').click()")
        await tab.until("!document.querySelector('.image-frame img') && !!document.querySelector('input[type=file]')")
        await tab.upload("input[type=file]", folder / "scene.png")
        await tab.until("document.querySelector('.image-frame img')?.naturalWidth === 32")
        await tab.run(CLICK.format("Caption it"))
        said = await tab.until(TABLE)
        for word in ("base", "blip", "greedy", "nucleus 2", "image cycle", "denoising", "image-text"):
            assert word in said, said
        await tab.until("[...document.querySelectorAll('.made img')].every(one => one.naturalWidth === 32)")

        await tab.run(CLICK.format("Prompt"))
        await tab.until("[...document.querySelectorAll('textarea')].some(one => one.offsetParent)")
        await tab.run(CLICK.format("Draw it"))
        assert await tab.until(MISTAKE) == "Write a prompt first."
        await tab.run(WRITE.format("a red star ${1+1} {{value}} <b>on white</b>"))
        await tab.run(CLICK.format("Draw it"))
        said = await tab.until(TABLE)
        assert "text cycle" in said and "seed 1" in said and "a red star ${1+1} {{value}} <b>on white</b>" in said

        await tab.run(CLICK.format("Report"))
        await tab.until("!!document.querySelector('input[type=radio]')?.offsetParent")
        await tab.run("document.querySelector('input[type=radio]').click()")
        await tab.until("document.querySelector('iframe')?.srcdoc.includes('A report')")
        outside = [one for one in tab.requested if not one.startswith((url, "data:", "blob:"))]
        assert outside == [] and len(tab.requested) > 10
