"""The paper's experiments, and a fair test on real images: `python -m ditac_timm.experiments`."""
