# docker buildx bake [environment | repository | triton | triton-prebuilt]. The guide is docs/how-to/docker.md.
# Set variables in the environment: TRITON_RELEASE=25.08 docker buildx bake triton

variable "PYTHON_IMAGE" {
  default = "python:3.11-slim-bookworm"
}

variable "TRITON_RELEASE" { # must be the release that the specs name
  default = "26.08"
}

variable "TRITON_IMAGE" {
  default = "nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3"
}

variable "TRITON_PYTHON" { # the Python of Triton's image, for Pillow
  default = "3.12"
}

variable "MODELS" { # names or patterns of folders in models/
  default = "*"
}

variable "IMAGE" {
  default = "triton-models"
}

group "default" {
  targets = ["triton"]
}

target "stages" {
  args = {
    PYTHON_IMAGE   = PYTHON_IMAGE
    TRITON_RELEASE = TRITON_RELEASE
    TRITON_IMAGE   = TRITON_IMAGE
    TRITON_PYTHON  = TRITON_PYTHON
    MODELS         = MODELS
  }
}

# PyTorch and doit, to run on a checkout: docker run --volume "$PWD:/workspace" triton-models-environment doit
target "environment" {
  inherits = ["stages"]
  target   = "environment"
  tags     = ["${IMAGE}-environment"]
}

# The model repository as folders on the host.
target "repository" {
  inherits = ["stages"]
  target   = "repository"
  output   = ["type=local,dest=build/.exported"]
}

# The server with the model repository in it.
target "triton" {
  inherits = ["stages"]
  target   = "triton"
  tags     = ["${IMAGE}:${TRITON_RELEASE}"]
}

# The server with the model_repository/ of this checkout, which may hold engines that `doit container` built. The named
# context replaces the stage `repository`, so that no stage before it runs. The stage `served` checks its release.
target "triton-prebuilt" {
  inherits = ["triton"]
  contexts = { repository = "model_repository" }
}
