"""The Dockerfile, docker-bake.hcl, the CI example and the guide agree with each other and with the project.

tests/buildah.py tests what the Dockerfile builds.
"""

import re

import yaml  # type: ignore[import-untyped]
from tests.support.project import ROOT

from build_tasks.spec.tables import TritonKeys

DOCKERFILE = (ROOT / "Dockerfile").read_text()
BAKE = (ROOT / "docker-bake.hcl").read_text()
EXAMPLE = (ROOT / "docs/how-to/github-actions.yml").read_text()
GUIDE = (ROOT / "docs/how-to/docker.md").read_text()

ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(\S+)$", DOCKERFILE, re.MULTILINE))
STAGES = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
TARGETS = re.findall(r'^target "(\S+)"', BAKE, re.MULTILINE)


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    lines = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    copied_paths = {source.removesuffix("*") for line in lines for source in line.split()}
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignore
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == copied_paths


def test_defaults_are_the_same_everywhere() -> None:
    assert ARGUMENTS["TRITON_RELEASE"] == TritonKeys().release
    assert dict(re.findall(r'^variable "(\w+)" \{.*\n +default = "(.+)"$', BAKE, re.MULTILINE)) == {
        **ARGUMENTS,
        "IMAGE": "triton-models",
    }


def test_targets_of_bake_are_stages() -> None:
    assert set(re.findall(r'^ +target += "(\S+)"$', BAKE, re.MULTILINE)) <= set(STAGES)
    assert set(re.findall(r'^ +contexts = \{ (\S+) = "model_repository" \}$', BAKE, re.MULTILINE)) <= set(STAGES)


def test_the_guide_and_the_example_build_what_there_is() -> None:
    jobs = yaml.safe_load(EXAMPLE)["jobs"]
    steps = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    requested = re.findall(r"buildx bake(?: --\S+)* ([a-z-]+)", "\n".join([*steps, GUIDE]))
    assert set(requested) == {*TARGETS} - {"stages", "triton"}  # triton is the default
