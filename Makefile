# `make reproduce` and `make test` set everything up themselves; both can be repeated at any time.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
export PYTHONUNBUFFERED := 1
unexport PYTHONDONTWRITEBYTECODE  # containers set it, and every process would compile its thousands of modules again
export TOKENIZERS_PARALLELISM := false

# pip would compile thirty thousand modules; these are the ones that commands and notebooks import.
define COMPILE_ALL_IN_USE
from echochamber.study import cli, fork_server, reproduction, report
from echochamber.study.fingerprint import notebooks_folder
for notebook in [*notebooks_folder().glob('experiments/[!.]*.ipynb'), *notebooks_folder().glob('figures/[!.]*.ipynb')]:
    try: fork_server.import_for([notebook])
    except SyntaxError: pass  # a notebook that is being written
endef
export COMPILE_ALL_IN_USE

.PHONY: help reproduce figures test sessions fuzz gpu lint sync notebooks unit lab readme export clean

help:
	@echo "make reproduce   pretrain, fine-tune, evaluate and draw the headline figure (ARGS='all --preset laptop --seeds 3')"
	@echo "make figures     draw every figure again from the shipped results, without training"
	@echo "make test        lint, notebooks in sync, every notebook's checks, pytest, the whole study at preset smoke"
	@echo "make sessions    more of pytest: whole sessions that are killed, interrupted and continued, schedulers, SLURM jobs, several"
	@echo "                 ranks, corpora from a hub, compiled pretraining, figures and front page drawn again, JupyterLab (CI runs both)"
	@echo "make fuzz        property tests on new random examples for FUZZ_MINUTES (20)"
	@echo "make gpu         on a GPU, under nine minutes: tests marked cuda, the benchmarks, convergence at preset gpu as far as it"
	@echo "                 comes (it resumes); results in outputs/ (DEVICE=cpu tries the same with tiny sizes, four minutes)"
	@echo "make lab         open JupyterLab at nbs/index.ipynb, with the project's kernel"
	@echo "make export      write echochamber/*.py and README.md from the notebooks"
	@echo "make clean       remove the environment and what notebooks left behind (outputs/ stays)"

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; run make with PYTHON=/path/to/python3.11") if sys.version_info < (3, 11) else None'
	@echo "Setting up .venv from requirements.txt (one to two minutes, once) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Echo Chamber" > /dev/null
	@PYDEVD_DISABLE_FILE_VALIDATION=1 $(BIN)/python -c "$$COMPILE_ALL_IN_USE"
	@touch $(READY)

reproduce: $(READY)
	@$(BIN)/echochamber reproduce $(ARGS)

figures: $(READY)
	@$(BIN)/echochamber figures $(ARGS)

test: $(READY) lint sync notebooks unit

lint: $(READY)
	@$(BIN)/ruff check nbs tests

sync: $(READY)
	@$(BIN)/python -m pytest tests/test_sync.py

notebooks: $(READY)
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 3 --do_print --timing

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations=10
unit: $(READY)
	@$(PYTEST) -m "not sessions" --ignore=tests/test_sync.py

sessions: $(READY)
	@$(PYTEST) -m sessions

FUZZ_MINUTES ?= 20
fuzz: $(READY)
	@end=$$(( $$(date +%s) + 60 * $(FUZZ_MINUTES) )); while [ $$(date +%s) -lt $$end ]; do \
		HYPOTHESIS_PROFILE=fuzz OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m hypothesis --numprocesses 2 --exitfirst || exit 1; done

# Each part gets what is left of GPU_SECONDS; a part that fails is named, and the others run. Executed notebooks are in
# outputs/benchmarks, figures in outputs/results/benchmarks/<machine> (of a trial: outputs/benchmarks/quick).
DEVICE ?= cuda
ON_GPU := $(filter cuda,$(DEVICE))
GPU_SECONDS ?= $(if $(ON_GPU),530,235)
GPU_SIZES := $(if $(ON_GPU),-y '{sizes: {repetitions: 2}}',-p quick True)
gpu: $(READY)
	@end=$$(( $$(date +%s) + $(GPU_SECONDS) )); failed=; mkdir -p outputs/benchmarks; \
	$(if $(ON_GPU),,export CUDA_VISIBLE_DEVICES=;) \
	$(if $(ON_GPU),$(BIN)/python -c 'from echochamber.study.speed import use_device; use_device("cuda")' || exit 1;) \
	part() { name=$$1; shift; left=$$(( end - $$(date +%s) )); echo "== $$name, $$left seconds left"; \
		test $$left -gt 0 && timeout -s TERM -k 10 $$left "$$@" || failed="$$failed $$name"; }; \
	notebook() { name=$$1; shift; part $$name $(BIN)/papermill nbs/benchmarks/$$name.ipynb \
		outputs/benchmarks/$$name.ipynb --kernel python3 --cwd nbs/benchmarks --no-progress-bar "$$@"; }; \
	part tests $(BIN)/python -m pytest -m cuda; \
	notebook generation -p device $(DEVICE) $(GPU_SIZES); \
	notebook pretraining -p device $(DEVICE) $(GPU_SIZES); \
	notebook rl_step -p device $(DEVICE) $(GPU_SIZES); \
	notebook grading $(if $(ON_GPU),-y '{sizes: {completions: 2000}}',-p quick True); \
	part convergence $(BIN)/echochamber reproduce convergence --preset $(if $(ON_GPU),gpu,smoke); \
	test -z "$$failed" || { echo "not finished:$$failed; the lines above say why, and convergence goes on where it was"; \
		test "$$failed" = " convergence"; }

# Served from here, because pictures lie in outputs/, and Jupyter shows nothing above its root. The environment's kernel
# goes before one of the same name in the user's home. Root (of a container) has to be allowed.
lab: $(READY)
	@JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" \
		--LabApp.default_url=/lab/tree/nbs/index.ipynb $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

export: $(READY)
	@$(BIN)/nbdev_export
	@$(MAKE) --no-print-directory readme

README ?= README.md
readme: $(READY)
	@$(BIN)/jupyter nbconvert --log-level WARN --to markdown --stdout --TagRemovePreprocessor.enabled=True \
		--TagRemovePreprocessor.remove_input_tags=hide-input nbs/index.ipynb \
		| sed 's#(\.\./#(#g' | awk '/^```/ { inside = !inside; if (inside && $$0 == "```") $$0 = "```python" } 1' | cat -s > $(README)

clean:
	rm -rf .venv .pytest_cache .ruff_cache
