"""One module per endpoint, each with its `ROUTES`: handlers, and the schemas that validate and document them."""
