"""What specflow does on a device: `python -m benchmarks.device --out DIR`."""
