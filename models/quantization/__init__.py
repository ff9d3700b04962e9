"""How weight matrices lie packed on the device, and how they get there.

A parameter is a dense array or a `QuantizedWeight`; layers multiply with either through `models.layers.product` and
never ask which one they hold. Ways of quantizing differ in how packed weights are *made*, at load:

    schemes.py   names, and which parameter is stored how: pure data, no jax
    format.py    `WeightFormat`, what the loader asks of a way to make packed weights
    on_load.py   rounding a full-precision checkpoint's matrices to nearest (`quantization="int8"`, ...)

A checkpoint that is quantized already is one more file here: a `WeightFormat` that names the tensors it stores in place
of a matrix and turns them into a `QuantizedWeight`. `checkpoints.py` lists them; others are refused by name.

Norms, biases, the embedding and the head stay as they are: they are a few percent of the bytes, and the most sensitive.
"""
