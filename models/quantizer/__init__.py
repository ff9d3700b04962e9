"""Making quantized checkpoints that other engines load too: `quire quantize`.

    types.py       `Settings`, `QuantizedMatrix`: what is asked for, and one matrix as integers
    grid.py        scales and zero points of groups, rounding
    blocks.py      one block of the decoder as plain functions: forward, and the inputs of its matrices
    methods/       rtn, gptq, awq, autoround: how a block's matrices become integers
    writers/       the tensors and the config of each checkpoint format
    job.py         layer by layer, with bounded memory
    partial.py     what an unfinished job keeps: it goes on where it was
    evaluate.py    perplexity, divergence and agreement with the original
    texts/         what is calibrated and measured with by default

It knows the decoder and checkpoints, not tokenizers or requests: texts come in as token ids.
"""
