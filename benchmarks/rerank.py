"""Reranking against the plain loop: one StableDiffusionPipeline call and one CLIP call per caption.

`python -m benchmarks.rerank` measures both on the same captions, solver, steps and noise, in one run, and checks that
they rank alike. Models are the miniature world's unless folders are given.
"""

import argparse
import statistics
import time

import torch

from cyclefit.captioners import Blip, Decoding
from cyclefit.data import evaluation_batches
from cyclefit.generators import StableDiffusion
from cyclefit.judges import Partners, Regeneration
from cyclefit.miniature import WEIGHTS
from cyclefit.rerank import rerank, sample_seed
from cyclefit.scorers import OpenClip


def plain_loop(pipeline, scorer, images, captions, latents, steps, guidance):
    """The paper's code: for every image and every caption one pipeline call and one CLIP call."""
    scores = []
    for i, row in enumerate(captions):
        source = scorer.embed_images(images[i : i + 1])
        found = []
        for text in row:
            drawn = pipeline(
                text, num_inference_steps=steps, guidance_scale=guidance, latents=latents[i : i + 1],
                output_type="pt", height=images.shape[2], width=images.shape[3],
            ).images  # fmt: skip
            found.append((scorer.embed_images(drawn.float()) * source).sum(-1))
        scores.append(torch.stack(found)[:, 0])
    return torch.stack(scores)


@torch.no_grad()
def main():
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", default="data/miniature/validation")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--candidates", type=int, default=10)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance_scale", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    folder = WEIGHTS / "stable-diffusion"
    captioner, scorer = Blip(str(WEIGHTS / "blip")), OpenClip(str(WEIGHTS / "clip"))
    generator = StableDiffusion(str(folder), arguments.steps, arguments.guidance_scale, batch_size=128)
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), torch_dtype=torch.float32, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(generator.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    batch = next(iter(evaluation_batches(arguments.shards, image_size=32, batch_size=arguments.images)))
    seeds = [sample_seed(key) for key in batch.keys]
    nucleus = [Decoding("nucleus", arguments.candidates)]
    partners = Partners(generator, scorer)
    ours, theirs, ratios = [], [], []
    for _ in range(arguments.rounds + 1):
        start = time.perf_counter()
        made = rerank(captioner, partners, {"image cycle": Regeneration()}, batch.images, nucleus, seeds)
        middle = time.perf_counter()
        captions = [
            [captioner.sample(batch.images[i : i + 1], nucleus[0], [seed])[0]][0] for i, seed in enumerate(seeds)
        ]
        latents = generator.noise([seed + 1 for seed in seeds])
        scores = plain_loop(
            pipeline, scorer, batch.images, captions, latents, arguments.steps, arguments.guidance_scale
        )
        end = time.perf_counter()
        assert captions == made.captions
        torch.testing.assert_close(scores, made.scores["image cycle"], atol=1e-3, rtol=0)
        ours.append(middle - start)
        theirs.append(end - middle)
        ratios.append((end - middle) / (middle - start))
    ours, theirs, ratios = ours[1:], theirs[1:], ratios[1:]  # the first round warms up
    n = arguments.images
    print(f"{n} images, {arguments.candidates} candidates, {arguments.steps} steps, {torch.get_num_threads()} threads")
    print(f"rerank      {n / statistics.median(ours):8.2f} images/s")
    print(f"plain loop  {n / statistics.median(theirs):8.2f} images/s")
    print(f"ratio       {statistics.median(ratios):8.2f}  (rounds: {', '.join(f'{r:.2f}' for r in ratios)})")


if __name__ == "__main__":
    main()
