"""Drafts that the device makes by itself, without a word from the host.

A step with such drafts is three executables, dispatched at once:

    draft    (last tokens, lengths, block tables, weights, cache) ─▶ draft_ids int32[S, K]
    forward  takes its draft tokens from draft_ids ─▶ logits of each sequence's last token and of its drafts
    verify   samples after each, keeps as many as were right

The plan holds `FROM_DRAFT` where the ids would be, so the host never waits, and a step is planned while another runs.

    drafter.py      `DeviceDrafter`: what a way to draft must bring, and how to plug in another
    steps.py        the jitted functions around it
    loop.py         K passes of a decoder, one token at a time
    layer_skip.py   the model itself with layers left out
    quantized.py    the model itself with its weights packed
"""
