"""The JSON bodies of the API, as pydantic models: what a client may send and what it gets back.

Requests are strict about types (`"5"` is no number) and open about names: OpenAI's clients send fields that a server
need not know. A field that asks for a feature that Quire does not have is refused, never ignored. The models are also
where `/openapi.json` comes from. Nothing here knows sockets or engines.
"""
