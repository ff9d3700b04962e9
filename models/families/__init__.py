"""Model families: recipes that translate a Hugging Face checkpoint into Quire's one decoder.

A family (one file each) says two things: how a `config.json` becomes a `ModelConfig`, and from which checkpoint
tensors each decoder parameter is assembled. What families share lives in `fields.py` (typed reading of the JSON),
`rope.py` (both dialects of rotary embeddings), `common.py` (the fields of every decoder) and `tensors.py` (the tensor
names of every decoder); a family file holds its true differences only. No family computes anything: the decoder is
built from `ModelConfig` alone. No jax here.
"""
