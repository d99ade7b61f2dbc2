PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DEMO := runs/demo

.PHONY: help setup demo test lint bench pretrain study clean
help:
	@echo "make demo      finetune both models with and without the cycle on the miniature world, evaluate, write a report"
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

demo: $(READY) data/miniature/novel/manifest.json
	rm -rf $(DEMO)
	$(PY) train.py --config miniature_blip.yaml --runs $(DEMO) --name plain
	$(PY) train.py --config miniature_cycle_blip_reward.yaml --runs $(DEMO) --name cycle
	$(PY) train.py --config miniature_sd_lora.yaml --runs $(DEMO) --name plain_sd
	$(PY) train.py --config miniature_cycle_sd.yaml --runs $(DEMO) --name cycle_sd
	$(PY) evaluate.py captions --config miniature_evaluate.yaml --runs '[$(DEMO)/plain, $(DEMO)/cycle]' --limit 150 --out $(DEMO)/captions
	$(PY) evaluate.py images --config miniature_evaluate_images.yaml --runs '[$(DEMO)/plain_sd, $(DEMO)/cycle_sd]' --limit 150 --out $(DEMO)/images
	$(PY) evaluate.py report --evaluations '[$(DEMO)/captions, $(DEMO)/images]' --out $(DEMO)/report.html

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
