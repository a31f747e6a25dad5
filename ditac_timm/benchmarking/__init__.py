"""What `benchmark.py` measures with; the library itself never imports it."""
