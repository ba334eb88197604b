"""The learning core: policy, rollouts, rewards, GRPO step, gate and versions. Knows no HTTP and no Redis."""

if __name__ != "servetune.adapters":
    raise ImportError("import servetune.adapters, not the adapters/ folder")
