# The two commands: make demo, make test. Each sets up what it needs.
# What this may be set to in a container keeps every process from reusing what another has compiled of the imported packages.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: setup demo lint test test-all test-oldest test-newest test-aot torture fidelity benchmark docs dist clean
BIN := .venv/bin
STAMP := .venv/.set-up

setup: $(STAMP)

$(STAMP): pyproject.toml packages/*/pyproject.toml scripts/setup.sh
	scripts/setup.sh
	@touch $@

demo: setup
	$(BIN)/tpuvid generate --model wan-tiny --prompt "a red circle moving right on a black background"

# Whether all of the Python passes ruff, stands as it formats, and has the types that it says: seconds, half a minute at first.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -n 2

# Two processes share the files of tests, each file to one, which makes its fixtures once; the slowest are named at the end.
PYTEST := python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=30 --durations-min=1

# What a change is checked with: everything but what repeats in kind. With PACKAGE=wan, its tests and core's alone, in an
# environment (.venv-wan) that has what it needs and nothing else of ours.
ifdef PACKAGE
test:
	scripts/setup.sh -e .venv-$(PACKAGE) -p "$(sort core $(if $(filter tiny,$(PACKAGE)),wan) $(PACKAGE))"
	.venv-$(PACKAGE)/bin/$(PYTEST) -m "not aot and not slow" $(sort tests/core tests/$(PACKAGE)) $(PYTEST_ARGS)
else
test: lint
	$(BIN)/$(PYTEST) -m "not aot and not slow" $(PYTEST_ARGS)
endif

# Every check that needs no TPU and no libtpu.
test-all: lint
	$(BIN)/$(PYTEST) $(PYTEST_ARGS)

# With the oldest, and with the newest, that the packages' own ranges allow, in environments of their own: each family against
# diffusers once, and what touches libraries that change.
RANGES := $(addprefix tests/core/test_,$(addsuffix .py,artifacts bridge compare noise registry rotary schedule video))
RANGES += $(addprefix tests/together/test_,$(addsuffix .py,checkpoint cli describe_doctor isolation))
RANGES += $(foreach family,wan cogvideox hunyuan,tests/$(family)/test_$(family)_fidelity.py) -k "not fidelity or DeepCache"

define test-range
	rm -rf .venv-$(1)
	scripts/setup.sh -e .venv-$(1) -p "core wan cogvideox hunyuan tiny" -v $(1)
	.venv-$(1)/bin/$(PYTEST) $(RANGES) $(PYTEST_ARGS)
endef

test-oldest:
	$(call test-range,oldest)

test-newest:
	$(call test-range,newest)

# Compiles for real TPUs with libtpu: minutes of CPU, gigabytes of memory, no TPU needed.
test-aot: setup
	scripts/setup.sh tpu
	$(BIN)/python -m pytest -m aot $(PYTEST_ARGS)

# Kills, damaged files, full disks and any arguments at all, in the long form; make test runs a short one.
torture: setup
	PYTHONPATH=tests $(BIN)/python -W ignore -m torture $(TORTURE_ARGS)

# tpuvid against stock diffusers, stage by stage: prints the tables of docs/results.md.
fidelity: setup
	PYTHONPATH=tests $(BIN)/python -W ignore -m wan.fidelity
	PYTHONPATH=tests $(BIN)/python -W ignore -m cogvideox.fidelity
	PYTHONPATH=tests $(BIN)/python -W ignore -m hunyuan.fidelity

# Time per stage, what DeepCache saves and costs, and each stage's peak memory: the tables of docs/results.md.
benchmark: setup
	$(BIN)/python benchmarks/against_diffusers.py
	$(BIN)/python -W ignore benchmarks/deepcache.py
	PYTHONPATH=tests $(BIN)/python -W ignore benchmarks/stage_memory.py

# The site of docs/, in site/. Whatever is not right in a page or a link stops it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo site/index.html

# The wheels of all packages, in dist/.
dist: setup
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist packages/*

clean:
	rm -rf .venv .venv-* dist site
