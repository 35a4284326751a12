"""What stages declare about the code that makes and runs networks: settings, tools, modules, and files of the user.

spec ─► task(model) ─► settings, tools and modules from here ─► fingerprint
                            └ the functions of those modules are imported by `build` alone

Every run of doit that may have something to do declares all stages, and most of those runs build few of them. So this
module holds what a declaration needs of the packages formats/ and verification/, and imports none of it.
"""

from build_tasks.formats.user_code import files_of_network
from build_tasks.runtime.stage import Settings
from build_tasks.spec.model import Model, table_settings
from build_tasks.spec.ragged import ragged_settings

SOURCE_SUFFIXES = (".py", ".json", ".yaml", ".yml", ".toml", ".cfg", ".ini")  # of files that make a network of the user

# The modules of the project that prepare pictures for a network.
TRANSFORM_MODULES = (
    "build_tasks.formats.picture_transform",
    "build_tasks.spec.picture_keys",
    "build_tasks.spec.pictures",
)

# The modules that make and run a network, for the fingerprint of the stages that use one.
NETWORK_MODULES = (
    "build_tasks.formats.pytorch_network",
    "build_tasks.formats.user_code",
    *TRANSFORM_MODULES,
    "build_tasks.tensors",
)
PROGRAM_MODULES = ("build_tasks.formats.torch_program", "build_tasks.formats.file_kinds")  # and for files of PyTorch

# The modules that run a network or an artifact, besides those that make a network.
INTERFACE_MODULES = (
    "build_tasks.formats.example_inputs",
    "build_tasks.formats.network_answer",
    "build_tasks.formats.serving_interface",
)

# The modules that affect the outputs of ONNX Runtime, for the fingerprint of the stages that run it.
ONNX_MODULES = (
    "build_tasks.formats.onnx_files",
    "build_tasks.formats.onnx_runtime",
    "build_tasks.formats.ragged_batches",
    "build_tasks.tensors",
    "build_tasks.verification.tolerance",
)

# The modules that compare an fp32 artifact with its network, and the pictures that they use.
COMPARISON_MODULES = (
    "build_tasks.formats.fp32_comparison",
    "build_tasks.formats.perturbation",
    "build_tasks.formats.shared_weights",
    "build_tasks.verification.tolerance",
)
PHOTOGRAPHS = ("build_tasks/verification/photographs/coffee.jpg",)

# The modules that affect a trace, besides those that make the network.
TRACE_MODULES = (
    "build_tasks.formats.per_sample_filters",
    "build_tasks.formats.shared_weights",
    "build_tasks.formats.torchscript_trace",
    "build_tasks.formats.torchscript_device",
    "build_tasks.formats.torchscript_graph",
)

# The modules that affect the exported graph, for the fingerprint of the stage `onnx`.
EXPORT_MODULES = (
    "build_tasks.formats.onnx_export",
    "build_tasks.formats.torch_export",
    "build_tasks.formats.onnx_clean_up",
    *COMPARISON_MODULES,
    *INTERFACE_MODULES,
    *NETWORK_MODULES,
    *ONNX_MODULES,
)
CLEAN_UP_TOOLS = ("onnx", "onnxslim", "onnxruntime", "polygraphy", "onnx-graphsurgeon")
EXPORT_TOOLS = ("torch", "timm", "onnxscript", *CLEAN_UP_TOOLS)

# The modules that read and change ONNX files of the user.
IMPORT_MODULES = (
    "build_tasks.formats.onnx_import",
    "build_tasks.formats.onnx_external_data",
    "build_tasks.formats.file_kinds",
)

# The modules of the project that only the stage `weights` uses to import an ONNX file.
EDIT_MODULES = ("build_tasks.formats.onnx_batch_first", "build_tasks.formats.onnx_names")

# The modules of the project that read a checkpoint.
CHECKPOINT_MODULES = (
    "build_tasks.formats.checkpoint_cleaning",
    "build_tasks.formats.checkpoints",
    "build_tasks.formats.file_kinds",
    "build_tasks.formats.state_dict_conversion",
    "build_tasks.formats.state_dict_mismatch",
    "build_tasks.formats.state_dicts",
)

# The modules that affect the errors of layers, for the fingerprint of the stages that compute them.
LAYER_MODULES = (
    "build_tasks.formats.layer_errors",
    "build_tasks.text_table",
    "build_tasks.verification.tolerance",
    *ONNX_MODULES,
)


def settings_of(model: Model) -> Settings:
    """Return the settings of the network, for the fingerprint of every stage that creates it."""
    settings: Settings = {"model": model.name, "architecture": table_settings(model.spec.architecture)}
    if model.spec.from_onnx and not model.spec.onnx.dynamic_axes:
        settings["batch"] = model.spec.onnx.batch_size  # the answers of some files depend on it
    return settings


def input_settings_of(model: Model) -> Settings:
    """Return the settings of the preprocessing, without those of the network."""
    return {
        key: value for key, value in table_settings(model.spec.input).items() if key not in ("min_size", "max_size")
    }


def source_modules(model: Model) -> tuple[str, ...]:
    """Return the project's modules that make the network, for the fingerprint of every stage that uses it."""
    return (
        *NETWORK_MODULES,
        *(ONNX_MODULES if model.spec.from_onnx else ()),
        *(PROGRAM_MODULES if model.spec.program_suffix else ()),
    )


def user_source_files(model: Model) -> tuple[str, ...]:
    """Return the user's files that make the network: those of Python except for a converter, and configurations.

    A network may read a configuration beside it, which nothing shows before it runs.
    """
    network = model.spec.architecture.network
    if network is None:
        return ()
    others = {model.source((model.spec.weights.converter or "").partition(":")[0]), model.file}
    files = {*files_of_network(model, *SOURCE_SUFFIXES)} - others
    return tuple(sorted(files | {model.source(network.partition(":")[0])}))


def file_settings_of(model: Model) -> Settings:
    """What an ONNX file has, and the interface of its artifacts does not."""
    spec = model.spec
    return {
        "ragged": ragged_settings(model),
        "output_keys": [output.key for output in spec.outputs],
        "picture": not spec.inputs,
        "batch_dimensions": {
            "inputs": [each.batch_dimension for each in spec.inputs],
            "outputs": [each.batch_dimension for each in spec.outputs],
        },
    }
