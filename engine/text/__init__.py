"""Text in, text out: the tokenizer, chat templates, and the way from sampled tokens back to a stream of text.

        text ─▶ Tokenizer.encode ─▶ prompt ids
        sampled ids ─▶ Detokenizer ─▶ stop strings ─▶ OutputText.push ─▶ new text

The difficulty is in the stream: a token may hold half a character or half a stop string, and text that was sent cannot
be taken back. `detokenizer` holds back bytes that are no character yet, `stop` holds back characters that may begin a
stop string, and `output_text` joins both per completion. Whatever the split into tokens and steps, the pieces sum up
to the text that decoding all tokens at once gives. All of it runs on the host, per sequence, without torch or
transformers.

Not here: which tokens end a sequence (the scheduler), HTTP bodies and tool calls (`serving`).
"""
