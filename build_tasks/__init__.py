"""The stages of the build, one module each, and the few rules that they share.

weights, labels, reference, torchscript, onnx, precision, engine, accuracy, config, publish   the stages
container                   the same build in NVIDIA's container
spec, reading, overrides    what models/<model>/model.toml may say, mistakes in it, and the command line's say
stage, files                what every stage obeys: fingerprints, whole-or-nothing
worker, server              the child process of a stage, and the end of the server it is forked from
digests, reporter           what doit is given: a checker of files, and a voice
architecture, compare       what several stages compute: the network, the error of an artifact
machine, compiler           what this machine has for TensorRT; TensorRT and TensorRT-RTX
sources                     where weights come from
"""
