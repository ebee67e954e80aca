# The toolkit with its pinned environment: what `make setup` makes in a checkout, made by `make setup`.
#
#   docker build -t kd .
#   docker build -t kd:cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
#   docker run --rm -v "$PWD/output:/home/kd/toolkit/output" kd make demo
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/data:/home/kd/toolkit/datasets" kd:cuda kd-train -h
#
# The base needs Debian's packages and has Python 3.10 to 3.12, or gets its own. torch brings CUDA's
# libraries along, so that the second base adds no more than what a cluster may ask an image for.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# no versions: those of the base's release
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && if ! python3 -c "import ensurepip" 2> /dev/null; then \
        apt-get install --yes --no-install-recommends python3 python3-venv; \
    fi \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --shell /bin/bash kd && install -d -o kd -g kd /home/kd/toolkit
WORKDIR /home/kd/toolkit
COPY --chown=kd:kd . .
USER kd

ENV PIP_NO_CACHE_DIR=1
RUN make setup

ENV PATH=/home/kd/toolkit/.venv/bin:${PATH}
CMD ["kd-train", "-h"]
