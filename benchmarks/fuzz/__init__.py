"""Bytes that nobody meant, thrown at what parses bytes from outside."""
