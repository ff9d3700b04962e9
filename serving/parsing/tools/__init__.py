"""Parsers of tool calls: one file per format, each a machine that is fed text and tells an emitter what it finds.

A call is told of as soon as it is certain: from then on its arguments are streamed as the model writes them, and stay
arguments even if they turn out not to be JSON (they are cut where the answer is cut). Before that, text that turns out
to be no call is content. No text is lost but the marks of the format and whitespace beside calls.
"""
