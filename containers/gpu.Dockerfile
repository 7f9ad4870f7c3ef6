# stepagent on NVIDIA GPUs, with its Triton kernels compiled beforehand: the first step of a run waits
# for no compiler. From the root of the repository:
#
#   docker build -f containers/gpu.Dockerfile --build-arg ARCHS="sm_80 sm_90" -t stepagent .
#   docker run --gpus all stepagent doctor
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ git \
    && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip wheel --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
# Triton compiles the few lines of C with which Python calls a kernel, when a kernel first runs.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
# The index's torch has CUDA and its Triton.
RUN pip install --no-cache-dir "$(echo /wheels/stepagent-*.whl)[train]"

# Only the same version of Triton finds what is compiled here, so nothing is installed after it.
ENV TRITON_CACHE_DIR=/opt/triton-cache
ARG ARCHS="sm_80 sm_90"
RUN stepagent warmup $(for arch in $ARCHS; do echo --arch "$arch"; done) \
    && chmod -R a+rwX "$TRITON_CACHE_DIR"
ENTRYPOINT ["stepagent"]
