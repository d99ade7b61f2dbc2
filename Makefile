PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
DEMO := runs/demo

.PHONY: help setup demo test lint docs bench pretrain study clean
help:
	@echo "make demo      finetune both models on the miniature world with and without the cycle, and with CLIP alone; write a report"
	@echo "make test      the test suite"
	@echo "make lint      ruff"
	@echo "make docs      the documentation as a site, site/index.html"
	@echo "make bench     the benchmarks"
	@echo "make study     every cycle over five seeds (hours)"
	@echo "make pretrain  train the miniature world's models from scratch (two and a half hours)"

setup: $(READY)
$(READY): pyproject.toml constraints.txt .ci/torchvision_cpu.py
	$(PYTHON) -c 'import sys; sys.exit("cyclefit needs Python 3.11 or newer; give one with PYTHON=...") if sys.version_info < (3, 11) else 0'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(PY) .ci/torchvision_cpu.py
	touch $@

data/miniature/prompts.txt: | $(READY)
	$(PY) -m cyclefit.miniature.scenes --out data/miniature

# Two at a time, each on one thread: models this small gain nothing from a second one. An evaluation starts as soon as its
# runs are done; in this order both cores are busy until the end.
STEPS := cycle control cycle_sd plain plain_sd captions images
RUN = OMP_NUM_THREADS=1 $(PY) train.py --config $(1) --runs $(DEMO) --name $(@F) --trainer.enable_model_summary=false
CONTROL := --model.cycle.reward=cyclefit.judges.ImageText --model.cycle.weight=2
demo: $(READY) data/miniature/prompts.txt
	rm -rf $(DEMO)
	@echo "Finetuning and evaluating three captioners and two generators, two at a time; each prints its output when done."
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target $(addprefix $(DEMO)/,$(STEPS))
	$(PY) evaluate.py report --evaluations '[$(DEMO)/captions, $(DEMO)/images]' --out $(DEMO)/report.html
$(DEMO)/plain: ; $(call RUN,miniature_blip.yaml)
$(DEMO)/control: ; $(call RUN,miniature_cycle_blip_reward.yaml) $(CONTROL)
$(DEMO)/cycle: ; $(call RUN,miniature_cycle_blip_reward.yaml)
$(DEMO)/plain_sd: ; $(call RUN,miniature_sd_lora.yaml)
$(DEMO)/cycle_sd: ; $(call RUN,miniature_cycle_sd.yaml)
EVALUATE = OMP_NUM_THREADS=1 $(PY) evaluate.py $(@F) --config $(1) --limit $(2) --out $@ --runs
$(DEMO)/captions: $(addprefix $(DEMO)/,plain control cycle)
	$(call EVALUATE,miniature_evaluate.yaml,100) '[$(DEMO)/plain, $(DEMO)/control, $(DEMO)/cycle]' --gallery 12
$(DEMO)/images: $(addprefix $(DEMO)/,plain_sd cycle_sd)
	$(call EVALUATE,miniature_evaluate_images.yaml,150) '[$(DEMO)/plain_sd, $(DEMO)/cycle_sd]'

test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(VENV)/.docs: $(READY)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "site/index.html; with search: $(PY) -m http.server --directory site"

bench: $(READY) data/miniature/prompts.txt
	$(PY) -m benchmarks.loader
	$(PY) -m benchmarks.rerank
	$(PY) -m benchmarks.text_cycle
	$(PY) -m benchmarks.training
	$(PY) -m benchmarks.speedups
	$(PY) -m benchmarks.deepcache
	$(PY) -m benchmarks.costs

study: $(READY) data/miniature/prompts.txt
	$(PY) -m studies.captions
	$(PY) -m studies.images
	$(PY) -m studies.soft_gradient
	$(PY) -m studies.captions --pair modern
	$(PY) -m studies.images --pair modern
	$(PY) -m studies.unpaired captions
	$(PY) -m studies.unpaired images

pretrain: $(READY)
	$(PY) -m studies.pretrain
	$(PY) -m studies.pretrain --pair modern

clean:
	rm -rf $(VENV) runs data site
