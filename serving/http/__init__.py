"""The HTTP side of the server: the app, its context, errors, streams, limits. What each endpoint does is in
`serving/endpoints`."""
