"""The stages of the build, one module each, and the few rules that they share.

weights, labels, reference, torchscript, onnx, accuracy, config, publish   the stages
spec                        what models/<model>/model.toml may say
stage, worker, files        what every stage obeys: fingerprints, child processes, whole-or-nothing
digests, reporter           what doit is given: a checker of files, and a voice
architecture, compare       what several stages compute: the network, the error of an artifact
sources                     where weights come from
"""
