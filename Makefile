# Every recipe says what it does and may be repeated. `make help` lists the targets.
# TORCH_INDEX, TORCH_BUILD: see tools/install_torch.py. MODEL, HOST, PORT: what `make serve` serves.

PYTHON ?= python3
MODEL  ?= smollm2
HOST   ?= 127.0.0.1
PORT   ?= 8000
PEERS  ?= .peers
SEEDS  ?= 0:10000

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.xllm-setup
TEST_STAMP := $(VENV)/.xllm-test-setup

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
# Every target that the list of `make help` shows; none is a file.
.PHONY: $(shell awk -F: '/^[a-z-]+:.*\#\# / {print $$1}' $(firstword $(MAKEFILE_LIST)))

help:  ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

system-packages:  ## apt packages that some tests want, where one may install them; never fails
	@tools/system_packages.sh

setup: $(STAMP)  ## .venv with the xllm command (editable) and the native kernels; no torch

# The stamps make a second run free; a change of the dependency lists makes them run again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "xLLM needs Python >= 3.11, and %s is %d.%d; set PYTHON=/path/to/python3" % (sys.executable, v[0], v[1]))'
	@echo "== setup: virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "venv is missing: install your system's python3-venv package"; exit 1; }
	@echo "== setup: xLLM (editable), versions from constraints.txt"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@echo "== setup: native kernels"
	@$(BIN)/python -m xllm.engine.kernels.native.build
	@touch $(STAMP)
	@echo "== setup: done; $(BIN)/xllm is the command"

test-setup: $(TEST_STAMP)  ## setup, then the test tools and the CPU build of torch

$(TEST_STAMP): $(STAMP) tools/install_torch.py
	@echo "== setup: torch, CPU build, for the reference platform"
	@$(BIN)/python tools/install_torch.py
	@echo "== setup: test tools, versions from constraints.txt"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $(TEST_STAMP)

kernels: setup  ## build the native kernels again where their sources changed
	@$(BIN)/python -m xllm.engine.kernels.native.build

serve: setup kernels  ## set up, fetch the default model and serve it on 127.0.0.1:8000
	@$(BIN)/xllm pull $(MODEL)
	@exec $(BIN)/xllm serve $(MODEL) --host $(HOST) --port $(PORT)

# The integration tests want the default model. Without network they are skipped and say so.
model: setup  ## fetch the default model
	@$(BIN)/xllm pull smollm2 || echo "== no model: the tests that need it are skipped"

test: test-setup kernels model  ## lint, types, import contracts and every test that needs no GPU; prints seconds per stage
	@$(BIN)/python tools/stages.py

lint: test-setup  ## ruff, mypy and the import contracts only
	@$(BIN)/python tools/stages.py ruff mypy contracts

null: test-setup  ## tests that need neither torch nor a model
	@$(BIN)/python tools/stages.py null

native: test-setup kernels  ## tests of the native kernels
	@$(BIN)/python tools/stages.py native

reference: test-setup  ## tests on the torch reference platform
	@$(BIN)/python tools/stages.py reference

integration: test-setup kernels model  ## tests with real processes and the real model
	@$(BIN)/python tools/stages.py integration

robustness: test-setup  ## hostile and fault tests that take minutes; not part of `make test`
	@$(BIN)/python -m pytest tests/robustness tests/integration -m robustness -s --timeout=1200

exactness: test-setup kernels  ## bitwise logits on native, every model here and every weight class; minutes
	@$(BIN)/python -m pytest tests/matrix -q -rs $(ARGS)

exactness-moves: test-setup kernels  ## bitwise logits of moved sequences: transports, push and pull, chunks, cache, threads; minutes
	@$(BIN)/python -m pytest tests/matrix/test_moves.py -q -rs $(ARGS)

sanitize: test-setup  ## the native code and its tests under address, undefined-behaviour and thread sanitisers; minutes
	@$(BIN)/python tools/sanitize.py $(ARGS)

soak: test-setup kernels model  ## ten minutes of mixed native load with aborts: memory flat, pages conserved, replays equal
	@$(BIN)/python -m benchmarks.soak --model $(MODEL) $(ARGS)

soak-edge: test-setup kernels model  ## 30 minutes with pages for one sequence while eight run: no failure, no growth
	@$(BIN)/python -m benchmarks.soak --edge --model $(MODEL) $(ARGS)

# SEEDS: first:last+1. A failing one is printed with the command that shows it again.
simulate: test-setup  ## random fault schedules on a virtual clock: 10,000 unless SEEDS says otherwise
	@$(BIN)/python -m xllm.simulation --seeds $(SEEDS) --jobs 2

bench-ttft: setup  ## time to first token of the default model, served locally
	@$(BIN)/python benchmarks/ttft.py --model $(MODEL)

bench-serve: setup kernels  ## `xllm bench serve` at several request rates against a local server
	@$(BIN)/python benchmarks/serve_rates.py --model $(MODEL)

bench-client: setup  ## how many tokens a second the load generator itself can take
	@$(BIN)/python benchmarks/client_limit.py

bench-routing: setup  ## router policies on shared-prefix multi-turn load, in virtual time; minutes
	@$(BIN)/python -m benchmarks.routing $(ARGS)

bench-routing-live: test-setup kernels model  ## the same comparison against real servers over HTTP
	@$(BIN)/python -m benchmarks.routing_live --model $(MODEL) $(ARGS)

# No model is needed: steps take a fixed time and no CPU.
bench-overhead: setup  ## CPU time of front and engine around a step that computes nothing
	@$(BIN)/python -m benchmarks.overhead.front
	@$(BIN)/python -m benchmarks.overhead

bench-faults: test-setup kernels model  ## engines killed and stopped under 32 streams: equal answers, gaps, goodput
	@$(BIN)/python -m benchmarks.faults --kills 100 --stops 20 $(ARGS)

bench-transfer: test-setup  ## KV pages between engines: bytes a second of each way against memcpy
	@$(BIN)/python -m benchmarks.transfer $(ARGS)

bench-xtensor: test-setup kernels model  ## KV memory in one piece against page tables: kernel time, mappings, reuse
	@$(BIN)/python -m benchmarks.xtensor --model $(MODEL) $(ARGS)

bench-handover: test-setup kernels model  ## what a hand-over costs: hidden share, first token, first gap, live moves
	@$(BIN)/python -m benchmarks.handover $(ARGS)

bench-roles: setup  ## policies for roles under load that shifts, in virtual time; minutes
	@$(BIN)/python -m benchmarks.simulated_roles $(ARGS)

bench-load-shift: test-setup  ## load that turns from prompts to answers and back: roles that follow it or not
	@$(BIN)/python -m benchmarks.load_shift $(ARGS)

bench-service: test-setup kernels model  ## what HTTP and the front add to the same engine driven over the wire
	@$(BIN)/python -m benchmarks.overhead.service $(ARGS)

bench-overload: setup  ## ten times more requests than can be served, for a minute: goodput, waits, recovery
	@$(BIN)/python -m benchmarks.overload $(ARGS)

# PEERS: the folder of the peers' virtual environments, weights and logs; it may be shared by checkouts.
# ARGS: of the command, e.g. make bench-compare ARGS="--quick" or ARGS="--rates 1 1.5 2 --concurrency".
bench-peers: test-setup  ## vLLM, OpenVINO GenAI and llama.cpp, each into an environment of its own (minutes)
	@$(BIN)/python -m benchmarks.compare.install --peers-dir $(PEERS)

bench-compare: test-setup model  ## xLLM and its peers, same weights, interleaved; the table goes to benchmarks/results
	@$(BIN)/python -m benchmarks.compare --model $(MODEL) --peers-dir $(PEERS) $(ARGS)

bench-rates: test-setup model  ## the highest Poisson rate that each engine keeps at p99 TPOT <= 30, 50 and 100 ms
	@$(BIN)/python -m benchmarks.compare.rates --model $(MODEL) --peers-dir $(PEERS) $(ARGS)

bench-step: test-setup kernels model  ## the native step alone (prefill, decode) and the machine's peaks
	@$(BIN)/python -m benchmarks.native_step --model $(MODEL) --peers-dir $(PEERS) $(ARGS)

bench-pipeline: test-setup kernels model  ## idle gap between native steps, executed and handed over while one runs
	@$(BIN)/python -m benchmarks.native_queue --models $(MODEL) $(ARGS)

bench-perplexity: test-setup model  ## what each encoding of the weights costs in perplexity
	@$(BIN)/python -m benchmarks.compare.perplexity --model $(MODEL) --weights-dir $(PEERS)/weights $(ARGS)

bench-ablation: test-setup kernels model  ## every technique off in turn: the same tokens, and what each is worth
	@$(BIN)/python -m benchmarks.ablation $(ARGS)

freeze: test-setup  ## rewrite constraints.txt from what is installed in .venv
	@$(BIN)/python tools/freeze.py

clean:  ## remove .venv and caches
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
