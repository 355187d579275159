# syntax=docker/dockerfile:1
# Where release wheels are built: manylinux_2_28 (glibc 2.28) and a CUDA toolkit.
#
#   docker build -f docker/build.Dockerfile --target toolkit -t fastshard-build:cu13 .   # for cibuildwheel
#   docker build -f docker/build.Dockerfile --target wheel -o dist .                     # the wheel itself
#
# The CUDA major is the only axis: 13.0, or --build-arg CUDA_MAJOR=12 --build-arg CUDA_MINOR=9.

# The digest is of tag 2026.10.26-1, which cibuildwheel 4.3.5 pins too.
ARG MANYLINUX_IMAGE=quay.io/pypa/manylinux_2_28_x86_64
ARG MANYLINUX_DIGEST=sha256:e0adf18521ad35192df733a6c62d35df7801957d24e0470238aacecfab2188a3

FROM ${MANYLINUX_IMAGE}@${MANYLINUX_DIGEST} AS toolkit
ARG CUDA_MAJOR=13
ARG CUDA_MINOR=0
ENV CUDA_HOME=/usr/local/cuda-${CUDA_MAJOR}.${CUDA_MINOR} \
    WHEEL_PLATFORM=manylinux_2_28_x86_64 \
    WHEEL_PYTHON=/opt/python/cp312-cp312/bin/python \
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# The names of the packages hold the version.
# hadolint ignore=DL3041
RUN dnf -y install dnf-plugins-core \
    && dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo \
    && dnf -y install "cuda-nvcc-${CUDA_MAJOR}-${CUDA_MINOR}" "cuda-cudart-devel-${CUDA_MAJOR}-${CUDA_MINOR}" \
    && dnf clean all \
    && "$CUDA_HOME/bin/nvcc" --version \
    && ls "$CUDA_HOME/include/cuda_runtime.h" "$CUDA_HOME/lib64/libcudart_static.a"

FROM toolkit AS build
ARG TORCH_CUDA_ARCH_LIST=8.6+PTX
ARG MAX_JOBS
ARG SOURCE_DATE_EPOCH
WORKDIR /src
COPY . .
RUN docker/build_wheel.sh all /dist

FROM scratch AS wheel
COPY --from=build /dist/ /
