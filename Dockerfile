# Builds Triton's image with the models of models/ in it. The guide is docs/how-to/docker.md.
#
#     environment ──► repository-build ──► repository ──► triton
#     pip             doit                 folders        tritonserver
#
# It uses only what both BuildKit and buildah 1.28 support.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
# The release that the specs name in triton.release. The stage repository-build refuses another value.
ARG TRITON_RELEASE=26.08
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3


FROM ${PYTHON_IMAGE} AS environment
# In a virtual environment pip installs packages even if the distribution of the base image forbids it.
RUN python3 -m venv /environment
ENV PATH=/environment/bin:$PATH
WORKDIR /workspace
# PyTorch is 6 GB. So it is installed again only if requirements.txt changes, not if the files of the second step do.
COPY requirements.txt ./
RUN --mount=type=cache,target=/root/.cache \
    grep -v '^[.]' requirements.txt > /tmp/requirements.txt && pip install -r /tmp/requirements.txt
COPY pyproject.toml README.md doit_model_repository.py* ./
RUN --mount=type=cache,target=/root/.cache pip install -r requirements.txt


FROM environment AS repository-build
COPY dodo.py ./
COPY build_tasks build_tasks
COPY models specs
# Names of models, or patterns. Other models have no spec here, and so `doit` removes them from the repository.
ARG MODELS=*
RUN mkdir models && cd specs && cp -r ${MODELS} ../models
# One image has one server, of one release. `doit list` prints mistakes in specs, one line each.
ARG TRITON_RELEASE
RUN doit list > /dev/null && python -c "import dodo, os, sys; release = os.environ['TRITON_RELEASE']; \
    sys.exit('; '.join(f'{m.file}: triton.release is {m.release}, but TRITON_RELEASE is {release}' \
    for m in dodo.MODELS if m.release != release) or 0)"
# Both folders are kept between builds, so that doit builds only what is outdated, and older versions stay. doit
# compares contents: what a cache has lost, or what another build left there, costs time and nothing else. A task that
# fails, such as the accuracy gate, fails the build. The layer contains only the folders that are copied.
RUN --mount=type=cache,id=triton-models-build,target=/workspace/build,sharing=locked \
    --mount=type=cache,id=triton-models-published,target=/workspace/model_repository,sharing=locked \
    --mount=type=cache,target=/root/.cache \
    doit && mkdir /repository && cp -a model_repository/*/ /repository


# Only the folders that Triton loads; `--output type=local,dest=model_repository` writes them to the host.
FROM scratch AS repository
COPY --from=repository-build /repository /


FROM ${TRITON_IMAGE} AS triton
COPY --from=repository / /models
# Ensembles decode pictures with Pillow, which Triton's image lacks. It gets the version that the build used.
RUN --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    --mount=type=cache,target=/root/.cache \
    if grep -qs '^backend: "python"' /models/*/config.pbtxt; then \
        PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CONSTRAINT= pip install "$(grep -o '^pillow==[0-9.]*' /tmp/requirements.txt)"; \
    fi
EXPOSE 8000 8001 8002
# The option lets version-compatible plans load (docs/how-to/engines.md); no other plan needs it.
CMD ["tritonserver", "--model-repository=/models", "--backend-config=tensorrt,version-compatible=true"]
