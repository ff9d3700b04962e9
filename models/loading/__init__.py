"""From a model directory to parameters on the device.

    files ─▶ TensorSource (HF names and layouts) ─▶ assemble (transpose, fuse, cast) ─▶ device, parameter by parameter

`load.py` is the entry. A source is whatever can name, measure and read tensors: safetensors here, GGUF likewise, so
that every format goes through the same family recipe and the same check. Two ways need no recipe: `orbax.py` keeps
parameters that are already fused (save once, load fast), and `dummy.py` makes random ones on the device. The host
never holds more than a few parameters at a time, however large the model is.

Not here: what a model reference means and how it is fetched, tokenizers, anything that runs the model.
"""
