"""What the stages write: artifacts run at every batch size, and contain nothing about the machine."""

import hashlib
import importlib
import io
import json
import pickletools
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from tests.support.project import TINY, VERSION_RECORDS, Project

SPEC = """\
max_batch_size = 3
formats = [{formats}]

[architecture]
network = "network.py:build"

[input]
shape = [3, 16, 16]

[weights]
source = "random://1"

[onnx]
{onnx}
"""

NETWORK = """\
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        features = self.conv(x).mean(dim=(2, 3))
        {body}

def build():
    return Network()
"""


def add_own(project: Project, name: str, body: str, onnx: str = "", formats: str = '"torchscript", "onnx"') -> None:
    """Add a model with its own network; `body` is the end of its forward()."""
    project.model(name, SPEC.format(onnx=onnx, formats=formats), network_py=NETWORK.replace("{body}", body))


def config(project: Project, name: str) -> ModelConfig:
    return text_format.Parse((project / f"model_repository/{name}/config.pbtxt").read_text(), ModelConfig())


def session(project: Project, path: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(str(project / path), providers=["CPUExecutionProvider"])


def test_the_repository_holds_what_triton_expects(built_tiny: Project) -> None:
    beside = ["SHA256SUMS", "config.pbtxt", "labels.txt", "preprocessing.json"]
    for name, artifact in (("tiny", "model.pt"), ("tiny_onnx", "model.onnx")):
        version = [f"1/{file}" for file in (artifact, *VERSION_RECORDS)]
        assert sorted(built_tiny.tree(f"model_repository/{name}")) == sorted([*version, *beside])


def test_both_formats_agree_at_any_batch(built_tiny: Project) -> None:
    script = torch.jit.load(built_tiny / "model_repository/tiny/1/model.pt")
    run = session(built_tiny, "model_repository/tiny_onnx/1/model.onnx")
    for size in (1, 2, 3, 7):
        batch = torch.randn(size, 3, 160, 160)
        expected = script(batch).numpy()
        (actual,) = run.run(["OUTPUT__0"], {"INPUT__0": batch.numpy()})
        np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def strings(archive: bytes) -> list[str]:
    """All text in a zip archive of pickles and sources."""
    texts: list[str] = []
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        for name in file.namelist():
            data = file.read(name)
            if name.endswith(".py"):
                texts.append(data.decode())
            elif name.endswith("pkl"):
                texts += [str(argument) for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    return texts


def test_model_pt_tells_nothing_of_the_machine(built_tiny: Project) -> None:
    text = "\n".join(strings((built_tiny / "build/tiny/model.pt").read_bytes()))
    assert "site-packages" not in text
    assert str(Path.home()) not in text
    assert "/timm/" not in text


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_model_onnx_tells_nothing_of_the_machine(project: Project, exporter: str) -> None:
    add_own(project, "own", "return self.head(features)", f'exporter = "{exporter}"\nopset = 18')
    project.built("onnx:own")
    graph = onnx.load(project / "build/own/model.onnx")
    text = str(graph)
    assert "network.py" not in text
    assert "site-packages" not in text
    assert str(project.root) not in text
    assert not graph.doc_string


def test_dynamo_steps_in_where_the_torchscript_exporter_fails(project: Project) -> None:
    add_own(project, "own", "return torch.sinc(self.head(features))", "opset = 18")
    run = project.built()
    assert "exporter: dynamo, because torchscript failed: Exporting the operator 'aten::sinc'" in run.out
    record = json.loads((project / "build/own/model.onnx.export.json").read_text())
    assert (record["exporter"], record["opset"]) == ("dynamo", 18)


def test_what_no_exporter_can_write_is_one_line_about_both(project: Project) -> None:
    add_own(project, "own", "return torch.linalg.inv(features[:, :4].reshape(-1, 2, 2) + 9 * torch.eye(2))")
    run = project.doit("onnx:own")
    assert run.code == 1
    (line,) = [line for line in run.out.splitlines() if line.startswith("✗")]
    assert "the torchscript exporter failed: Exporting the operator 'aten::linalg_inv'" in line
    assert "the dynamo exporter failed: No ONNX function found for" in line
    assert not (project / "build/own/model.onnx").exists()


def test_a_network_that_bakes_the_batch_in_is_refused(project: Project) -> None:
    add_own(project, "own", "return self.head(features) + torch.zeros(int(len(x)), 4)")
    run = project.doit()
    assert run.code == 1
    assert run.failed == ["torchscript:own"]
    assert "the trace, taken at batch 2, fails at batch 1" in run.out


def test_what_is_no_tensor_in_an_answer_is_named(project: Project) -> None:
    add_own(project, "own", 'return {"scores": self.head(features), "size": len(x), "loss": None}')
    run = project.doit()
    assert run.code == 1
    assert "the network answers with dict, in which size is int; Triton needs tensors: name those to serve" in run.out


def test_several_outputs_are_served_in_order(project: Project) -> None:
    add_own(project, "own", "return self.head(features), features, features.argmax(dim=1)")
    project.built()
    for name in ("own", "own_onnx"):
        outputs = [(o.name, o.data_type, list(o.dims), o.HasField("reshape")) for o in config(project, name).output]
        assert outputs == [  # 11 is TYPE_FP32, 9 is TYPE_INT64
            ("OUTPUT__0", 11, [4], False),
            ("OUTPUT__1", 11, [5], False),
            ("OUTPUT__2", 9, [1], True),  # one value per sample: Triton allows no empty dims
        ]


def test_a_list_of_outputs_is_a_tuple_in_every_format(project: Project) -> None:
    add_own(project, "own", "return [self.head(features), features]")
    add_own(project, "by_dynamo", "return [self.head(features)]", 'opset = 18\nexporter = "dynamo"')
    add_own(project, "nested", "return self.head(features), [features]", formats='"torchscript", "onnx"')
    project.model(
        "pyramid",
        'formats = ["torchscript", "onnx"]\nmax_batch_size = 2\n[input]\nshape = [3, 64, 64]\n'
        '[architecture]\ntimm = "test_resnet"\narguments = { features_only = true }\n[weights]\nsource = "random://0"\n',
    )
    project.built()
    for name, count in (("own", 2), ("by_dynamo", 1), ("pyramid", 5), ("nested", 2)):
        batch = torch.randn(2, *([3, 64, 64] if name == "pyramid" else [3, 16, 16]))
        answer = torch.jit.load(project / f"model_repository/{name}/1/model.pt")(batch)
        assert isinstance(answer, tuple), "Triton's PyTorch backend refuses a list"
        found = session(project, f"model_repository/{name}_onnx/1/model.onnx").run(None, {"INPUT__0": batch.numpy()})
        assert len(answer) == len(found) == len(config(project, name).output) == count
        for one, other in zip(answer, found, strict=True):
            np.testing.assert_allclose(one.numpy(), other, rtol=1e-3, atol=1e-4)


def test_a_fixed_batch_is_served_without_batching(project: Project, tiny_weights: Path) -> None:
    add_own(project, "own", "return self.head(features)", "dynamic_axes = false\nbatch_size = 3")
    project.built()
    fixed = config(project, "own_onnx")
    assert (fixed.max_batch_size, list(fixed.input[0].dims)) == (0, [3, 3, 16, 16])
    assert not fixed.HasField("dynamic_batching")
    assert "max_batch_size: 0" in (project / "model_repository/own_onnx/config.pbtxt").read_text()
    assert config(project, "own").max_batch_size == 3, "the TorchScript model keeps its batches"


def test_external_data_takes_the_form_of_a_folder(project: Project) -> None:
    add_own(project, "own", "return self.head(features)", "external_data = true")
    larger = "nn.Conv2d(3, 5, 11)"  # too large for onnx to keep its weights in the graph
    project.edit("models/own/network.py", "nn.Conv2d(3, 5, 3)", larger)
    project.built()
    files = sorted(project.tree("model_repository/own_onnx/1"))
    assert files == sorted(["model.onnx/model.onnx", "model.onnx/model.onnx.data", *VERSION_RECORDS])
    run = session(project, "model_repository/own_onnx/1/model.onnx/model.onnx")
    assert run.run(None, {"INPUT__0": np.zeros((2, 3, 16, 16), np.float32)})[0].shape == (2, 4)
    project.edit("models/own/model.toml", "external_data = true", "external_data = false")
    project.built()
    assert sorted(project.tree("model_repository/own_onnx/1")) == sorted(["model.onnx", *VERSION_RECORDS]), (
        "a file replaces the folder"
    )


def test_labels_must_be_as_many_as_classes(tiny: Project) -> None:
    """The first stage that runs the network finds it, before the long ones."""
    (tiny / "models/tiny/labels.txt").write_text("cat\ndog\n")
    run = tiny.doit()
    assert run.code == 1
    assert run.failed == ["config:tiny", "config:tiny_onnx", "reference:tiny"]
    assert run.out.index("✗ reference") < run.out.index("✓ torchscript")
    assert (
        "models/tiny/model.toml: labels: expected one label for each of the 1000 classes of OUTPUT__0, found 2 labels"
        in run.out
    )
    assert not (tiny / "model_repository").exists()


def test_an_artifact_beyond_its_tolerance_is_not_published_and_the_last_good_one_stays(tiny: Project) -> None:
    tiny.built()
    before = tiny.tree()
    tiny.edit("models/tiny/model.toml", "[accuracy]", "[onnx]\nopset = 16\n\n[accuracy]")
    with (tiny / "models/tiny/model.toml").open("a") as spec:
        spec.write("\n[[accuracy.gate]]\nrelative_l2 = 1e-12\n")
    run = tiny.doit()
    assert run.code == 1
    assert run.failed == ["accuracy:tiny", "accuracy:tiny_onnx"]
    assert "output OUTPUT__0: relative L2 error" in run.out
    assert "limit 1.0e-12" in run.out
    assert tiny.tree() == before


def test_outputs_that_never_differ_are_not_called_accurate(project: Project) -> None:
    add_own(project, "own", "return self.head(features) * 0 + 1")
    project.edit("models/own/model.toml", "random://1", "weights.safetensors")
    project.edit("models/own/model.toml", '"weights.safetensors"', '"random://1"')
    project.built("weights:own")
    (project / "build/own/weights.safetensors").rename(project / "models/own/weights.safetensors")
    project.edit("models/own/model.toml", "random://1", "weights.safetensors")
    run = project.doit()
    assert run.code == 1
    assert "accuracy cannot be tested: output OUTPUT__0 is the same for all samples" in run.out
    (project / "models/own/model.toml").write_text(
        (project / "models/own/model.toml").read_text() + "[accuracy]\nallow_untestable = true\n"
    )
    run = project.built()
    assert "accuracy: not testable: output OUTPUT__0 is the same for all samples" in run.out


def test_what_was_not_compared_itself_is_not_published_even_on_demand(tiny: Project) -> None:
    tiny.built()
    published = tiny.tree()
    tiny.built("onnx:tiny", "--opset_version", "13")
    run = tiny.doit("-s", "publish:tiny_onnx")
    assert run.code == 1
    assert "model.onnx.verdict.json is the gate result of another file than build/tiny/model.onnx" in run.out
    assert tiny.tree() == published


def test_a_config_of_another_artifact_is_not_published_even_on_demand(tiny: Project) -> None:
    tiny.built()
    published = tiny.tree()
    tiny.built("onnx:tiny", "--no-dynamic_axes", "accuracy:tiny_onnx")
    run = tiny.doit("-s", "publish:tiny_onnx")
    assert run.code == 1
    assert "model.onnx.config.pbtxt describes another file than build/tiny/model.onnx" in run.out
    assert tiny.tree() == published


def test_another_scheduler_takes_the_place_of_dynamic_batching(tiny: Project) -> None:
    spec = tiny / "models/tiny/model.toml"
    spec.write_text(TINY + "[triton]\nsequence_batching = { max_sequence_idle_microseconds = 5 }\n")
    tiny.built("publish:tiny")
    assert config(tiny, "tiny").WhichOneof("scheduling_choice") == "sequence_batching"
    spec.write_text(TINY + "[triton]\ndynamic_batching = false\n")
    tiny.built("publish:tiny")
    assert config(tiny, "tiny").WhichOneof("scheduling_choice") is None


def test_another_config_writes_no_artifact_again(tiny: Project) -> None:
    """A published artifact that has not changed stays the same file, also for a server that polls the repository."""
    tiny.built()
    artifact, config = (tiny / "model_repository/tiny" / name for name in ("1/model.pt", "config.pbtxt"))
    before, good = artifact.stat(), artifact.read_bytes()
    tiny.edit("models/tiny/model.toml", "[accuracy]", "[triton]\ninstance_group = [{ count = 2 }]\n\n[accuracy]")
    assert "publish:tiny" in tiny.built().ran
    now = artifact.stat()
    assert "count: 2" in config.read_text()
    assert (now.st_ino, now.st_mtime_ns, now.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)
    assert now.st_nlink == 1, "the link in the replaced folder is gone"
    assert tiny.built().ran == []
    with open(artifact, "r+b") as file:
        file.write(b"damaged")
    tiny.edit("models/tiny/model.toml", "count = 2", "count = 3")
    assert "publish:tiny" in tiny.built().ran
    assert artifact.read_bytes() == good
    assert "count: 3" in config.read_text()


def test_prune_removes_what_was_generated_and_nothing_else(tiny: Project) -> None:
    tiny.built()
    repository = tiny / "model_repository"
    shutil.copytree(repository / "tiny", repository / "mine")
    shutil.copytree(repository / "tiny_onnx", tiny / "outside")
    (repository / "linked").symlink_to(tiny / "outside")
    tiny.edit("models/tiny/model.toml", '["torchscript", "onnx"]', '["torchscript"]')
    run = tiny.built()
    assert run.ran == ["prune", "summary:tiny"]
    assert "removing model_repository/tiny_onnx: no spec describes it any more" in run.out
    assert sorted(path.name for path in repository.iterdir()) == ["linked", "mine", "tiny"]


def test_an_attention_model_is_saved_though_its_archive_names_its_version_elsewhere(project: Project) -> None:
    """PyTorch keeps the version of archives that older ones cannot read under another name."""
    import torch

    project.model(
        "vit", 'formats = ["torchscript"]\n[architecture]\ntimm = "test_vit"\n[weights]\nsource = "random://0"\n'
    )
    project.built()
    reader = torch._C.PyTorchFileReader(str(project / "build/vit/model.pt"))
    assert ".data/version" in reader.get_all_records()


def test_the_guides_options_override_the_spec_for_one_run(tiny: Project) -> None:
    tiny.built()
    path = tiny / "build/tiny/model.onnx"
    as_in_the_spec = path.read_bytes()
    assert "onnx:tiny" in tiny.built("onnx:tiny", "--opset_version", "13", "--batch_size", "2").ran
    assert {entry.version for entry in onnx.load(path).opset_import} == {13}
    run = tiny.built("onnx:tiny", "--no-dynamic_axes", "--batch_size", "3")
    assert run.ran == ["onnx:tiny"]
    assert onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert tiny.built("onnx:tiny", "--no-dynamic_axes", "--batch_size", "3").ran == [], (
        "the same override is up to date"
    )
    assert tiny.built().ran == ["onnx:tiny"], "a plain run returns to the spec"
    assert path.read_bytes() == as_in_the_spec


ON_ITS_DEVICE = "features = features + torch.zeros(x.shape[0], 5, device=x.device)"


def test_tensors_that_forward_creates_are_on_the_device_of_the_input(project: Project) -> None:
    body = f"{ON_ITS_DEVICE}\n        return self.head(features * torch.arange(features.shape[1], device=x.device))"
    add_own(project, "own", body)
    add_own(project, "half", body, formats='"torchscript"')
    with (project / "models/half/model.toml").open("a") as spec:
        spec.write('\n[triton]\ndevice = "gpu"\n')
    project.built()
    for name in ("own/1/model.pt", "half/1/model.pt"):
        module = torch.jit.load(project / "model_repository" / name)
        constants = [node for node in module.graph.findAllNodes("prim::Constant") if "cpu" in str(node)]
        assert not constants
        assert module.graph.findNode("prim::device")


def test_a_trace_that_would_fail_on_a_gpu_is_refused_unless_it_is_served_on_cpus(project: Project) -> None:
    add_own(project, "own", "return self.head(features) + torch._shape_as_tensor(x)")
    run = project.doit()
    assert run.failed == ["config:own"]
    assert "model.pt would fail on a GPU: " in run.out
    assert "device=x.device" in run.out
    with (project / "models/own/model.toml").open("a") as spec:
        spec.write('\n[triton]\ndevice = "cpu"\n')
    project.built()


@pytest.mark.parametrize("name", ["tiny", "tiny_onnx"])
def test_the_provenance_is_a_statement_of_in_toto_about_the_published_files(built_tiny: Project, name: str) -> None:
    folder = f"{built_tiny.root}/model_repository/{name}"
    text = Path(f"{folder}/1/provenance.json").read_text()
    statement = json.loads(text)
    for subject in statement["subject"]:
        content = Path(f"{folder}/1/{subject['name']}").read_bytes()
        assert subject["digest"]["sha256"] == hashlib.sha256(content).hexdigest()
    names = [entry["name"] for entry in statement["predicate"]["buildDefinition"]["resolvedDependencies"]]
    assert {"weights", "spec", "code of publish", "samples", "torch"} <= {*names}
    (result,) = statement["predicate"]["runDetails"]["byproducts"]
    figures = result["annotations"]["outputs"]["OUTPUT__0"]["relative_l2"]
    assert 0 <= figures["value"] <= figures["limit"]
    assert str(built_tiny.root) not in text
    statements = pytest.importorskip("in_toto_attestation.v1.statement")
    parse = importlib.import_module("google.protobuf.json_format").Parse
    statement_pb = importlib.import_module("in_toto_attestation.v1.statement_pb2").Statement()
    statements.Statement.copy_from_pb(parse(text, statement_pb)).validate()
    predicate = importlib.import_module("in_toto_attestation.predicates.provenance.v1.provenance_pb2").Provenance()
    parse(json.dumps(statement["predicate"]), predicate)  # refuses unknown fields


def test_the_bill_of_materials_is_valid(built_tiny: Project) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    version = importlib.import_module("cyclonedx.schema").SchemaVersion.V1_6
    text = (built_tiny / "model_repository/tiny_onnx/1/bom.cdx.json").read_text()
    assert validation.JsonStrictValidator(version).validate_str(text) is None
    bom = json.loads(text)
    card = bom["metadata"]["component"]["modelCard"]
    assert card["modelParameters"]["modelArchitecture"] == "test_efficientnet"
    assert card["modelParameters"]["datasets"][0]["name"] == "unknown"
    assert "relative_l2" in {metric["type"] for metric in card["quantitativeAnalysis"]["performanceMetrics"]}
    licensed = {component["name"] for component in bom["components"] if "licenses" in component}
    assert {"torch", "onnx"} <= licensed
    assert "timestamp" not in bom["metadata"]
