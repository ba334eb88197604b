"""The public contract: wire types, typed errors and the SDK. Imports pydantic and httpx2, nothing of ours."""

if __name__ != "servetune.clients":
    raise ImportError("import servetune.clients, not the clients/ folder")
