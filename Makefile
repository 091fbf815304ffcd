VENV ?= .venv
BIN := $(VENV)/bin
ALONE := "not broker and not promtool and not browser and not postgres"
MARKED := --include=test_*.py --include=conftest.py 'mark\.(broker|promtool|browser|postgres)|"each_journal"|, each_journal'
N ?= 100000
BASE ?= 0
MODEL ?= sssd
EXTRAS_sssd := demo
EXTRAS_ldm4ts := demo,hub

ifneq ($(filter demo,$(MAKECMDGOALS)),)
ifeq ($(EXTRAS_$(MODEL)),)
$(error MODEL=$(MODEL) is unknown: make demo MODEL=sssd, the default, or MODEL=ldm4ts)
endif
endif

.PHONY: help demo test check chaos bench bench-gpu bench-peers study fuzz soak clean
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.$(EXTRAS_$(MODEL)) ## show everything on real bars, MODEL=sssd or ldm4ts: broker, daemon, signals, retraining, replay, report
	$(BIN)/barcast demo --model $(MODEL)

test: check ## all checks and tests, with a real mosquitto, PostgreSQL, promtool and Chromium (installs them where it may)
	.ci/tools
	$(BIN)/pytest -n 3 -m "broker or promtool or browser or postgres" $(shell grep -rlE $(MARKED) tests | sed s,/conftest.py,,)

check: $(VENV)/.dev ## lint, types, layers and the tests that need no broker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p barcast.models -p barcast.strategies -p barcast.daemon -p barcast.backtest -p tests.bench
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 -m $(ALONE) tests

chaos: $(VENV)/.dev ## break broker, network, disk, clock and daemon at once for MINUTES (10) by SEED (1), and count what was lost
	.ci/tools
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),10) --seed $(or $(SEED),1)

bench: $(VENV)/.dev ## speed, latency, memory, cost, sizing, distance from an oracle in one run; writes bench.json
	$(BIN)/python -m tests.bench

bench-gpu: $(VENV)/.dev ## attention, checkpointing, samplers of LDM4TS on a GPU, or without one on a core; writes bench-gpu.json and .md
	$(BIN)/python -m tests.bench.gpu

bench-peers: $(VENV)/.dev .tools/peers/.made ## the same strategy in other engines and here, as ratios of CPU time; writes bench-peers.json
	$(BIN)/python -m tests.bench.peers

study: $(VENV)/.dev ## what each part of the model earns, out of sample; goes on where it was interrupted
	$(BIN)/python -m tests.bench.study

fuzz: $(VENV)/.dev .tools/fuzz/.made ## feed the decoders what coverage finds, FUZZ_MINUTES=60 of CPU; fails on a crash, a hang, or memory
	$(BIN)/python -m tests.fuzz

soak: $(VENV)/.dev ## the daemon in N simulated schedules from seed BASE on, with every fault; writes soak.json
	$(BIN)/python -m tests.simulation $(BASE) $(N)

clean: ## remove environments, caches and the demo's folder
	rm -rf $(VENV) .tools build dist demo-run .pytest_cache .mypy_cache .ruff_cache .hypothesis

.tools/peers/.made: tests/bench/peers/requirements.txt | $(VENV)/.dev
	$(BIN)/python -m venv --clear .tools/peers
	.tools/peers/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# It sees the packages of the main environment: torch is not installed twice.
.tools/fuzz/.made: tests/fuzz/requirements.txt | $(VENV)/.dev
	$(BIN)/python -m venv --clear .tools/fuzz
	.tools/fuzz/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$(.tools/fuzz/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	@touch $@

$(VENV)/.demo $(VENV)/.demo,hub $(VENV)/.dev: $(VENV)/.%: pyproject.toml constraints.txt
	.ci/venv $(VENV) $*
	@touch $@
