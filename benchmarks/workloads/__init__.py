"""Workloads as code: lengths and seeds are committed, token ids are made from them and checked against a hash."""
