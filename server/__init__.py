"""Everything that talks HTTP or Redis: the API, the engine's thread, the buffer and the worker."""

if __name__ != "servetune.server":
    raise ImportError("import servetune.server, not the server/ folder")
