# Everything runs in .venv, which is made when it is needed; test-gpu alone uses what is installed.
#
#   PYTHON  the Python that .venv is made with
#   TORCH   what pip installs first: the tested version, or what is named here, such as
#           TORCH=torch==2.11.0 or TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#   BENCH   arguments of the benchmarks, such as BENCH="--quick --only geglu"

PYTHON ?= python3
TORCH ?= torch
BENCH ?=
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-gpu bench clean FORCE

help:
	@echo "make demo      install into .venv, recolor a picture, make one in a photo's colors, see demo/"
	@echo "make test      lint, tests, Triton's interpreter, ahead-of-time compilation; no GPU needed"
	@echo "make test-gpu  build and test with the Python, torch and nvcc of this machine, on its GPU"
	@echo "make docs      build the site of the documentation, in build/site"
	@echo "make bench     run the benchmarks on this machine; BENCH=--quick takes minutes"
	@echo "make clean     remove what was built, but not .venv's packages"
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  TORCH=$(TORCH)  BENCH=$(BENCH)"

demo: $(VENV)/installed
	mkdir -p demo
	$(BIN)/sdcore recolor --output demo/recolored.png --figure demo/recolor.png
	$(BIN)/sdcore color --reference coffee --prompt "a red circle left of a blue square" \
	  --guidance 4 --seed 1 --output demo/colored.png --figure demo/color.png
	@echo
	@echo "Pictures before and after, with their colors, in $(CURDIR)/demo:"
	@echo "  recolor.png   a photo in the colors of another (alone: recolored.png)"
	@echo "  color.png     a picture made in the colors of a photo (alone: colored.png)"

# The interpreter replaces Triton's compiler when Triton is imported: hence a process of its own.
test: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interpreter
	$(BIN)/python -m tests.aot

# The theme's maintainers warn of MkDocs 2 at each build; the version is fixed in constraints.txt.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test-gpu:
	bash benchmarks/gpu.sh

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks $(BENCH)

clean:
	rm -rf build dist demo *.egg-info .pytest_cache .ruff_cache $(VENV)/installed
	rm -f sdcore/_build.json sdcore/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# The package itself, editable: only a change of what is compiled, or of the build, installs it
# again. Folders are listed too, for their time changes when a file is added or deleted.
BUILT_FROM := setup.py pyproject.toml sdcore/__init__.py $(shell find csrc)

# Both variables, because newer versions of pip don't apply the first to the build's requirements.
$(VENV)/installed: export PIP_CONSTRAINT = $(CURDIR)/$(VENV)/constraints.txt
$(VENV)/installed: export PIP_BUILD_CONSTRAINT = $(CURDIR)/$(VENV)/constraints.txt
$(VENV)/installed: $(VENV)/torch $(BUILT_FROM)
	$(BIN)/python -m pip install -e ".[cli,dev]"
	touch $@

# torch comes first, so that the user decides which build of it the rest settles for.
$(VENV)/torch: $(VENV)/wanted constraints.txt
ifeq ($(strip $(TORCH)),torch)
	cp constraints.txt $(VENV)/constraints.txt
else
	grep -v -e '^torch==' -e '^triton==' constraints.txt > $(VENV)/constraints.txt
endif
	$(BIN)/python -m pip install $(TORCH) -c $(VENV)/constraints.txt
	touch $@

# Rewritten only if TORCH is not what it was.
$(VENV)/wanted: FORCE | $(BIN)/python
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
