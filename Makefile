# Two commands: `make reproduce` and `make test`. Both set everything up by themselves.
PYTHON    ?= $(shell command -v python3.11 || command -v python3)
SCALE     ?= mini
SEEDS     ?= $(if $(filter mini,$(SCALE)),4,0)
BACKBONES ?= mini-chat
CORES     ?= 2
# "full" adds arms, doses, rates and tunings, the SPPFT grid, merges and further fine-tunings: docs/commands.md.
GRID      ?= default
ROOT      ?= runs
# Rules of the Snakefile, and what they need, instead of everything: notebook_03_safety_degradation_mini_chat_4, for example.
TARGETS   ?=
# A Snakemake profile: env/profiles/node (one machine, GPUs as a resource), env/profiles/slurm, or your own.
PROFILE   ?=
# How many GPUs the machine of env/profiles/node has, where they are not the eight that the profile says.
GPUS      ?=
BIN       := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# The bits of a training depend on the number of threads; it is fixed here and not left to the machine.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
# Kernels of this environment come before those that somebody has registered elsewhere under the same name.
unexport JUPYTER_PATH
export JUPYTER_PREFER_ENV_PATH := 1
# Snakemake and matplotlib keep caches below HOME; where that cannot be written they lie here, and weights stay where they are.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)
ifneq ($(shell mkdir -p "$(CACHE)" 2>/dev/null && test -w "$(CACHE)" && echo yes),yes)
export HF_HOME ?= $(CACHE)/huggingface
export XDG_CACHE_HOME := $(CURDIR)/.snakemake/cache
export MPLCONFIGDIR ?= $(CURDIR)/.snakemake/cache/matplotlib
endif
# Recipes take these from their environment, in quotes: paths hold spaces and apostrophes.
export SCALE SEEDS BACKBONES GRID ROOT

# An environment of another Python (an upgrade, another one on PATH when it was made) does not work: it is made again.
ifneq ($(wildcard .venv/.installed),)
ifneq ($(shell $(BIN)/python -c 'import yaml, vlsafe; print("works")' 2>/dev/null),works)
$(shell rm -f .venv/.installed)
endif
endif

# Values in quotes of YAML's: a folder named 007 is no number.
SNAKEMAKE = $(BIN)/snakemake $(if $(PROFILE),--profile $(PROFILE),--cores $(CORES)) $(if $(GPUS),--resources gpu=$(GPUS)) \
            --rerun-incomplete --rerun-triggers mtime params input --quiet rules \
            --config "scale=\"$$SCALE\"" "seeds=\"$$SEEDS\"" "backbones=\"$$BACKBONES\"" "root=\"$$ROOT\"" "grid=\"$$GRID\""

.PHONY: setup dev reproduce figures parts pocket-nano test processes loaded soak perf perf-sources browser lab results notebooks nbval lint types clean
# Compiling packages is half of an installation: on all cores, after pip, which takes one; their tests and the classes of models are
# compiled when they are used. Like pip it passes over files that are no Python of this version (templates), for which it fails.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/(tests|transformers/models)/' .venv/lib || true
setup: .venv/.installed

.venv/.installed: env/requirements.lock pyproject.toml
	$(BIN)/python -c 'import sys, pip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null \
	  || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r env/requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@$(COMPILE)
	touch $@

# What only developers need: a type checker, pre-commit, a driver for the browser.
dev: .venv/.dev

.venv/.dev: .venv/.installed env/dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c env/requirements.lock -r env/dev.lock
	touch $@

reproduce: setup $(if $(findstring pocket,$(SCALE)),parts)
	$(BIN)/vlsafe sweep --scale "$$SCALE" --seeds $(SEEDS) --backbones $(BACKBONES) --root "$$ROOT"
	$(BIN)/vlsafe unlock --root . -- $(SNAKEMAKE) $(if $(TARGETS),--) $(TARGETS)

# Scale pocket from its real parts with a few rows and steps: one stage of each kind in one process, and its tables. No number of
# it means anything. Where its packages cannot be installed it is skipped, which is said.
NANO := --scale env/scales/pocket-nano.yaml --root build/pocket-nano/runs
pocket-nano: setup
	@$(MAKE) --no-print-directory parts; \
	if ! [ -f .pocket/.installed ] || ! [ -f .pocket/debian/.installed ]; then \
	    echo "make pocket-nano: skipped: the packages of scale pocket cannot be installed on this machine"; \
	else \
	    $(BIN)/vlsafe stage examination/parent.aligned examination/instruct.filtered-full examination/safety.sl-full \
	        safety/dpo-both-full safety/grpo-text-full probe/localisation probe/direction probe/seeing merge/aligned \
	        --backbone pocket-chat --seed 0 $(NANO) && \
	    $(BIN)/vlsafe gallery $(NANO) --backbones pocket-chat --seeds 0 --out build/pocket-nano/figures && \
	    test -s build/pocket-nano/figures/T02_degradation.csv && test -s build/pocket-nano/figures/T03_seeing.csv; \
	fi

# What scale `pocket` is made of, in .pocket: packages whose files are read and whose code is not imported, and a reader of GGUF
# files. The pictures are Debian's and need no root here; where apt-get or dpkg is missing they are skipped, which is said.
PICTURES  := openclipart-png tuxpaint-stamps-default
parts: .pocket/.installed .pocket/debian/.installed

.pocket/.installed: .venv/.installed env/pocket.lock env/gguf.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r env/gguf.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --no-compile --upgrade \
	    --target .pocket -r env/pocket.lock
	touch $@

.pocket/debian/.installed:
	@mkdir -p .pocket/debian && cd .pocket/debian && rm -f *.deb && \
	if ! { command -v apt-get && command -v dpkg; } > /dev/null; then \
	    echo "make parts: skipped the pictures ($(PICTURES)): no apt-get and dpkg on this machine; scale pocket needs them," \
	        "SCALE=env/scales/pocket-emoji.yaml does without"; \
	elif apt-get -qq download $(PICTURES); then \
	    for file in *.deb; do dpkg -x "$$file" . && rm "$$file" || exit 1; done && touch .installed; \
	else \
	    echo "make parts: skipped the pictures: apt-get knows no $(PICTURES); run 'apt-get update' as root, then again; or use" \
	        "SCALE=env/scales/pocket-emoji.yaml"; \
	fi

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup

# The tests that start trainings in processes of their own: each process imports torch and transformers first, so they are minutes.
processes: setup
	$(BIN)/python -m pytest -m processes -n 2 --dist loadgroup tests/training

# Hot paths, each beside the barest thing that does the same work; fails where a bound is missed. A minute, then the streaming
# merge: minutes, 10 GB of disk, and far longer where mergekit is installed or named in MERGEKIT, which it is then held to.
perf: setup
	PYTHONPATH=. $(BIN)/python tests/perf.py
	PYTHONPATH=. $(BIN)/python tests/perf_score.py
	PYTHONPATH=. $(BIN)/python tests/perf_merge.py

# The paper's corpora at full size, synthesised: memory of the loaders, and a screen that is killed half-way.
perf-sources: setup
	PYTHONPATH=. $(BIN)/python tests/perf_sources.py

# At NANO: the chain of notebooks from an empty run store, and the whole graph through Snakemake and papermill under twenty random
# kills; then merge, score, human import and download under forty each. A quarter of an hour, so not a part of `make test`.
soak: setup
	$(BIN)/python -m pytest -m soak -p no:xdist

# The whole graph of a tiny scale that loads, from hub folders and official files (invented rows) to notebooks, figures and claims.
loaded: setup
	$(BIN)/python -m pytest -m loaded -p no:xdist tests/project/test_loaded_graph.py

# JupyterLab in a headless Chromium, from cached runs; pictures of the screen in build/browser. Needs the system's Chromium.
browser: dev
	$(BIN)/python -m pytest -m browser -p no:xdist tests/project/test_browser.py

types: dev
	$(BIN)/mypy

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

lab: setup
	$(BIN)/jupyter lab notebooks

# The committed tables and figures of a scale again, from the committed results of its runs and without a model.
figures: GRID := full
figures: setup
	rm -rf "build/results/$$SCALE"
	$(BIN)/vlsafe unpack figures/"$$SCALE"/results/*.tar.xz --root "build/results/$$SCALE"
	$(BIN)/vlsafe gallery --all --scale "$$SCALE" --backbones $(BACKBONES) --root "build/results/$$SCALE" --grid "$$GRID" --out "figures/$$SCALE"

# The committed results of studies in the run store: notebooks then show them at once, and train only what they run themselves.
results: setup
	$(BIN)/vlsafe unpack $(foreach b,$(BACKBONES),$(foreach s,$(SEEDS),figures/"$$SCALE"/results/$(b)-seed$(s).tar.xz)) --root "$$ROOT"

# Execute at mini, median seed, and copy the outputs back into the committed notebooks.
notebooks: reproduce
	$(BIN)/vlsafe notebooks --root "$$ROOT"

# The committed notebooks and the golden numbers against the runs that are here.
nbval: setup
	$(BIN)/python -m pytest -p no:xdist tests/publish/test_golden.py
	$(BIN)/python -m pytest --nbval-lax --nbval-cell-timeout=1800 -n 2 --dist loadfile notebooks

clean:
	rm -rf runs figures/mini-partial .snakemake
