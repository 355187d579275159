# syntax=docker/dockerfile:1
# Runs fastshard from a wheel in dist/: no compiler, no CUDA toolkit, not root.
#
#   docker build -f docker/runtime.Dockerfile -t fastshard .
#   docker run --rm --gpus all -v "$HOME/models:/models:ro" fastshard generate --model /models/NAME "..."
#
# The CUDA libraries come with torch, the driver from the host, by the NVIDIA container toolkit.

# A release names the digest: --build-arg PYTHON_DIGEST=sha256:...
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG PYTHON_DIGEST=

FROM ${PYTHON_IMAGE}${PYTHON_DIGEST:+@$PYTHON_DIGEST}
ARG TORCH_VERSION=2.13.0
# For the wheel of CUDA 12, a torch of the same major: https://download.pytorch.org/whl/cu126
ARG PIP_EXTRA_INDEX_URL=
RUN --mount=type=bind,source=dist,target=/dist \
    pip install --no-cache-dir "torch==$TORCH_VERSION" /dist/fastshard-*.whl

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 fastshard
USER 1000
WORKDIR /home/fastshard
ENTRYPOINT ["fastshard"]
CMD ["--help"]
