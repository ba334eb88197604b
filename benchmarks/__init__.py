"""Benchmarks: each a script that compares with a named peer in one run and prints JSON on its last line."""
