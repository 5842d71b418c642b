# sails-align in a container.
#   docker build -t sails-align .                                          for CPUs
#   docker build -t sails-align:cuda --build-arg TORCH_INDEX=https://pypi.org/simple \
#       --build-arg EXTRAS=deepspeed,vllm,harness,performance .            for NVIDIA GPUs (run with --gpus all)
# DeepSpeed compiles some of its CUDA kernels when they are first used, which needs a base image with CUDA's compiler:
#   --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=deepspeed,harness,inspect
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && if ! command -v python3 > /dev/null; then apt-get install --yes --no-install-recommends python3-dev python3-venv; fi \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --create-home --uid 1000 --non-unique sails

# The libraries first: they stay in Docker's cache while only the package's own code changes.
WORKDIR /opt/sails-align
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir sails_align && touch sails_align/__init__.py \
    && pip install --extra-index-url "$TORCH_INDEX" -c constraints.txt ".[$EXTRAS]" \
    && pip uninstall --yes sails-align

COPY . .
RUN pip install --no-deps . && sails doctor

USER sails
# Ubuntu's images have a user 1000 of their own, whose home it would be otherwise.
ENV HOME=/home/sails
WORKDIR /home/sails
ENTRYPOINT ["sails"]
CMD ["--help"]
