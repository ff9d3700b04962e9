"""How weight matrices lie packed on the device, and how they get there.

A parameter is a dense array or a `QuantizedWeight` (or, of fused projections that are stored in different ways, a
`MixedWeight`); layers multiply with any of them through `models.layers.product` and never ask which one they hold. Ways
of quantizing differ in how packed weights are *made*, at load:

    schemes.py      names of `quantization=`, and which parameter is stored how: pure data, no jax
    format.py       `WeightFormat`, what the loader asks of a way to make packed weights
    on_load.py      rounding a full-precision checkpoint's matrices to nearest (`quantization="int8"`, ...)
    checkpoints.py  which format a quantized checkpoint is in, as its config says, and which are refused by name

Each format of quantized checkpoints is one file: a `WeightFormat` that names the tensors it stores in place of a matrix
and turns them into a matrix on the device. What several formats share is beside them: the bit stream of small integers
(bitstream.py), integers with scales (integers.py), small floats with scales (floats.py), lists of modules that are
plain (modules.py). Where no kernel has a format's numbers or groups, its matrices are dequantized at load.

Norms, biases and the embedding stay as they are: they are a few percent of the bytes, and the most sensitive. So does
the head, unless a checkpoint has it quantized.
"""
