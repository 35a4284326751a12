# docker buildx bake [environment | repository | triton | triton-prebuilt]; the guide is docs/how-to/docker.md.
# Each variable can be set in the environment: TRITON_RELEASE=25.08 docker buildx bake triton

variable "PYTHON_IMAGE" {
  default = "python:3.11-slim-bookworm"
}

variable "TRITON_RELEASE" { # the one that the specs name
  default = "26.08"
}

variable "TRITON_IMAGE" {
  default = "nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3"
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
    MODELS         = MODELS
  }
}

# PyTorch and doit, to run over a checkout: docker run --volume "$PWD:/workspace" triton-models-environment doit
target "environment" {
  inherits = ["stages"]
  target   = "environment"
  tags     = ["${IMAGE}-environment"]
}

# The repository as folders on the host.
target "repository" {
  inherits = ["stages"]
  target   = "repository"
  output   = ["type=local,dest=build/.exported"]
}

# The server with the repository in it.
target "triton" {
  inherits = ["stages"]
  target   = "triton"
  tags     = ["${IMAGE}:${TRITON_RELEASE}"]
}

# The same of the model_repository/ that is here, with the engines that `doit container` put there: the named context
# takes the place of the stage `repository`, and nothing before it runs.
target "triton-prebuilt" {
  inherits = ["triton"]
  contexts = { repository = "model_repository" }
}
