PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DEMO := runs/demo

.PHONY: help setup demo test lint bench pretrain study clean
help:
	@echo "make demo      finetune both models plainly, with the cycle and with CLIP alone on the miniature world, write a report"
	@echo "make test      the test suite"
	@echo "make lint      ruff"
	@echo "make bench     the benchmarks"
	@echo "make study     the demo over five seeds and every cycle (about two hours)"
	@echo "make pretrain  train the miniature world's models from nothing (about an hour)"

setup: $(READY)
$(READY): pyproject.toml constraints.txt .ci/torchvision_cpu.py
	$(PYTHON) -c 'import sys; sys.exit("cyclefit needs Python 3.11 or newer; give one with PYTHON=...") if sys.version_info < (3, 11) else 0'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PY) .ci/torchvision_cpu.py
	touch $@

data/miniature/novel/manifest.json: | $(READY)
	$(PY) -m cyclefit.miniature.scenes --out data/miniature

# Two at a time, each on one thread: models this small gain nothing from a second one.
RUNS := plain control cycle plain_sd control_sd cycle_sd
RUN = OMP_NUM_THREADS=1 $(PY) train.py --runs $(DEMO) --name $(@F) --trainer.enable_model_summary=false --config
CONTROL := --model.cycle.reward=cyclefit.judges.ImageText --model.cycle.weight=2
CONTROL_SD := --model.cycle.likelihood_weight=0 --model.cycle.image_text_weight=1 --model.cycle.weight=1
demo: $(READY) data/miniature/novel/manifest.json
	rm -rf $(DEMO)
	@echo "Finetuning three captioners and three generators, two at a time; each prints what it did when it is done."
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(addprefix $(DEMO)/,cycle $(filter-out cycle,$(RUNS)))
	@echo "Evaluating them, captions and images side by side."
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(DEMO)/images $(DEMO)/captions
	$(PY) evaluate.py report --evaluations '[$(DEMO)/captions, $(DEMO)/images]' --out $(DEMO)/report.html
$(DEMO)/plain: ; $(RUN) miniature_blip.yaml
$(DEMO)/control: ; $(RUN) miniature_cycle_blip_reward.yaml $(CONTROL)
$(DEMO)/cycle: ; $(RUN) miniature_cycle_blip_reward.yaml
$(DEMO)/plain_sd: ; $(RUN) miniature_sd_lora.yaml
$(DEMO)/control_sd: ; $(RUN) miniature_cycle_sd.yaml $(CONTROL_SD)
$(DEMO)/cycle_sd: ; $(RUN) miniature_cycle_sd.yaml
EVALUATE = OMP_NUM_THREADS=1 $(PY) evaluate.py $(@F) --limit 150 --out $@ --runs
$(DEMO)/captions: ; $(EVALUATE) '[$(DEMO)/plain, $(DEMO)/control, $(DEMO)/cycle]' --config miniature_evaluate.yaml
$(DEMO)/images: ; $(EVALUATE) '[$(DEMO)/plain_sd, $(DEMO)/control_sd, $(DEMO)/cycle_sd]' --config miniature_evaluate_images.yaml

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(READY) data/miniature/novel/manifest.json
	$(PY) -m benchmarks.loader
	$(PY) -m benchmarks.rerank
	$(PY) -m benchmarks.text_cycle
	$(PY) -m benchmarks.training
	$(PY) -m benchmarks.means
	$(PY) -m benchmarks.reuse
	$(PY) -m benchmarks.costs

study: $(READY) data/miniature/novel/manifest.json
	$(PY) -m cyclefit.miniature.study
	$(PY) -m cyclefit.miniature.study_images

pretrain: $(READY)
	$(PY) -m cyclefit.miniature.pretrain

clean:
	rm -rf $(VENV) runs data
