"""From the text that a model writes to what an API shows: content, reasoning and tool calls.

The problem: models mark reasoning and tool calls in their text, each family in its own way, and the text comes in
pieces that are cut anywhere. The idea: a parser is fed pieces and returns deltas as soon as they are certain; whatever
the cuts, the deltas concatenate to the same result, and that result is what a reply that is not streamed shows.

It does not know of HTTP, of the API's JSON, or of tokens.
"""
