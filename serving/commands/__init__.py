"""One file per command. Each has `SUMMARY`, `set_up(parser, backend)` for its flags, and `run` for its work."""
