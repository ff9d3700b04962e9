"""The parts of `make_golden.py`: the only code of the project that imports torch, and never at test time.

`specs.py` says which tiny models exist and what each one is there to catch, `tiny.py` builds and measures them,
`tiny_tokenizer.py` trains their tokenizer, `texts.py` holds the texts for the real model, `smollm2.py` measures it,
`measure.py` and `files.py` are what both share.
"""
