"""What servetune promises: each promise as a check, and a way to break it that the check must see."""
