# From the specs in models/ to Triton's image with the repository in it; the guide is docs/how-to/docker.md.
#
#     environment ──► repository-build ──► repository ──► triton
#     pip             doit                 folders        tritonserver
#
# Nothing here goes beyond what both BuildKit and buildah 1.28 can do.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# The release that the specs name (triton.release); repository-build refuses another.
ARG TRITON_RELEASE=26.08
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3


FROM ${PYTHON_IMAGE} AS environment
# pip installs here whatever the distribution of the base image thinks of that.
RUN python3 -m venv /environment
ENV PATH=/environment/bin:$PATH
WORKDIR /workspace
# PyTorch is 6 GB: only another requirement installs it anew, and not what the second step reads.
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache \
    grep -v '^[.]' requirements.txt > /tmp/requirements.txt && pip install -r /tmp/requirements.txt
COPY pyproject.toml README.md doit_model_repository.py* ./
RUN --mount=type=cache,target=/root/.cache pip install -r requirements.txt


FROM environment AS repository-build
COPY dodo.py ./
COPY build_tasks build_tasks
COPY models specs
# Names of models, or patterns. What is not named has no spec here, so that `doit` takes it out of the repository.
ARG MODELS=*
RUN mkdir models && cd specs && cp -r ${MODELS} ../models
# One image has one server. `doit list` tells of mistakes in a spec in a line each.
ARG TRITON_RELEASE
RUN doit list > /dev/null && python -c "import dodo, os, sys; release = os.environ['TRITON_RELEASE']; \
    sys.exit('; '.join(f'{m.file}: triton.release is {m.release}, but TRITON_RELEASE is {release}' \
    for m in dodo.MODELS if m.release != release) or 0)"
# Both folders outlive the build, so that only what is outdated is built, and older versions stay; doit compares
# contents, so that what a cache lost, or another build left there, costs time and nothing else. A task that fails
# (the gate!) fails the build. Only the folders that are copied end in the layer.
RUN --mount=type=cache,id=triton-models-build,target=/workspace/build,sharing=locked \
    --mount=type=cache,id=triton-models-published,target=/workspace/model_repository,sharing=locked \
    --mount=type=cache,target=/root/.cache \
    doit && mkdir /repository && cp -a model_repository/*/ /repository


# Folders alone, as Triton loads them; `--output type=local,dest=model_repository` writes them to the host.
FROM scratch AS repository
COPY --from=repository-build /repository /


FROM ${TRITON_IMAGE} AS triton
COPY --from=repository / /models
# Ensembles decode pictures with Pillow, which Triton's image does not have; in the version that was compared with.
RUN --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    --mount=type=cache,target=/root/.cache \
    if grep -qs '^backend: "python"' /models/*/config.pbtxt; then \
        PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CONSTRAINT= pip install "$(grep -o '^pillow==[0-9.]*' /tmp/requirements.txt)"; \
    fi
EXPOSE 8000 8001 8002
CMD ["tritonserver", "--model-repository=/models"]
