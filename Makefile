# make demo     train on drawn landscapes, test, and print where the images are
# make smoke    20 training steps, to check the installation
# make test     lint, types and the everyday tests
# make format   format the code with ruff
# make slow     the tests that take longer
# make browser  install what the slow tests with a browser need, as root on Debian; without it they are skipped
# make gpu      what only a GPU can show, written to docs/gpu.md; DATA=DIR contains horse2zebra
# make runtimes run every kind of generator in every runtime of docs/deploy.md, each installed by itself
# make results  train and score the rows of docs/experiments again: many hours; DATA=DIR contains the data sets
PYTHON ?= python3
BIN := .venv/bin
DEMO := @recipes/day2night.txt

.PHONY: demo smoke test format slow browser gpu runtimes results clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: .venv/installed
	if [ -f saved_models/day2night/latest.pt ]; then $(BIN)/python train.py --dataset_name day2night --start_from latest; \
	else $(BIN)/python train.py $(DEMO); fi
	$(BIN)/python test.py --dataset_name day2night --metrics paired,cycle,losses
	@echo "training grids: generated_images/day2night/   test images: generated_images/day2night/test/index.html"

smoke: .venv/installed
	$(BIN)/python train.py $(DEMO) --run_name smoke --overwrite --num_epochs 1 --steps_per_epoch 20
	$(BIN)/python test.py --dataset_name day2night --run_name smoke --num_test 2

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/ty check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

browser:
	command -v chromium || { apt-get update --quiet && apt-get install --yes --quiet chromium; }
	npm ci --ignore-scripts --prefix examples/web

DATA ?= datasets
results: .venv/installed
	$(BIN)/python benchmarks/reproduce.py day2night mnist2usps daisy2sunflower checkerboards distillation ablations fine_tuning pixels maps skips facades --data_root $(DATA)

runtimes: .venv/installed-dev
	$(BIN)/python benchmarks/runtimes.py

DEVICE ?= cuda
gpu: .venv/installed-dev
	$(BIN)/python benchmarks/gpu.py --device $(DEVICE) --data_root $(DATA) $(if $(filter cpu,$(DEVICE)),--tiny)

clean:
	rm -rf .venv
