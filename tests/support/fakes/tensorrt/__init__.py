"""TensorRT-RTX under TensorRT's name, with the version that FAKE_TENSORRT names."""

import os

from tensorrt_rtx import *  # type: ignore[import-untyped]  # noqa: F403

__version__ = os.environ["FAKE_TENSORRT"]
