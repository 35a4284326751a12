"""TensorRT-RTX under TensorRT's name, at the version that the environment says."""

import os

from tensorrt_rtx import *  # type: ignore[import-untyped]  # noqa: F403

__version__ = os.environ["STAND_IN_TENSORRT"]
