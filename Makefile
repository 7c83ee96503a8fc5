# Everything runs in a virtual environment of its own, made when it is first needed.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
NOTEBOOKS := $(BIN)/python scripts/notebooks.py
INPUTS := setup.py settings.ini constraints.txt scripts/environment.sh
CHECKS := $(NOTEBOOKS) check || status=1; \
	{ $(BIN)/ruff check --quiet --output-format concise . && echo "ruff: ok"; } || status=1;

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo explore test check notebooks export readme clean distclean
test notebooks: export OMP_NUM_THREADS ?= 1

help:
	@echo "make demo       compress a photo and bring it back; says where the results lie"
	@echo "make explore    the explorer of bitrate against quality, as a page; PHOTO=photo.jpg to begin with yours,"
	@echo "                PAGE=inside_the_codec or what_the_gan_adds for the others"
	@echo "make test       every check and every test"
	@echo "make notebooks  run every room and the index, save their outputs"
	@echo "make export     write the modules of hific_nb/ from the notebooks"
	@echo "make readme     write README.md from nbs/index.ipynb"
	@echo "make check      the quick half of make test: notebooks clean and in sync, ruff"
	@echo "make clean      remove what building and testing left; make distclean: $(VENV) too"
	@echo "Options: PYTHON=python3.12 (3.10 or newer), VENV=.venv, OMP_NUM_THREADS=1"

demo: $(VENV)/.ready-notebooks
	@$(BIN)/hific demo

explore: $(VENV)/.ready-notebooks
	@$(BIN)/hific explore $(if $(PAGE),--page "$(PAGE)") $(if $(PHOTO),"$(PHOTO)")

# All parts run even if an earlier one fails, and pytest, whose closing line sums up, comes last. It runs the notebooks too,
# each once, the rooms with their exercises (tests/test_rooms.py).
test: $(VENV)/.ready-dev
	@status=0; checks=; \
	$(CHECKS) \
	[ $$status = 0 ] || checks="the checks before pytest found faults, above"; \
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile || status=1; \
	[ -z "$$checks" ] || echo "$$checks"; \
	exit $$status

check: $(VENV)/.ready-dev
	@status=0; \
	$(CHECKS) \
	exit $$status

notebooks: $(VENV)/.ready-dev
	@$(NOTEBOOKS) run

export: $(VENV)/.ready-dev
	@$(BIN)/nbdev_export

readme: $(VENV)/.ready-dev
	@$(NOTEBOOKS) readme

$(VENV)/.ready-notebooks: $(INPUTS)
	@sh scripts/environment.sh "$(VENV)" "$(PYTHON)" notebooks

# The development environment holds the other one.
$(VENV)/.ready-dev: $(INPUTS)
	@sh scripts/environment.sh "$(VENV)" "$(PYTHON)" dev
	@cp -p $@ $(VENV)/.ready-notebooks

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find hific_nb nbs tests scripts \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
