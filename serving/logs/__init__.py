"""One line per request, written off the hot path.

A finished request becomes one frozen record (`lines.RequestLine`); a queue carries it to a thread that formats and
writes it, so that a slow terminal or disk never holds up the event loop. Lines have identifiers, counts and times:
never a prompt, an answer, a header or a key.
"""
