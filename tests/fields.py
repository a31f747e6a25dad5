"""Velocity fields that try a kernel: ordinary ones, and those at which a closed form may stumble."""

import torch
import torch.nn.functional as F

from ditac_timm import cpab

DOMAINS = {"ditac": (-3.0, 3.0), "ge": (0.0, 3.0), "leaky": (-3.0, 3.0), "inf": (-3.0, 3.0)}
VERSIONS = list(DOMAINS)
FIELDS = [
    "prior", "rough", "zero", "zero in a cell", "a resting knot", "equal neighbours", "nearly equal neighbours", "fast",
    "fast to the left", "very rough", "open ends",
]  # fmt: skip


def field(kind, domain, cells=10):
    """Float64 knot velocities."""
    generator = torch.Generator().manual_seed(0)
    width = domain[1] - domain[0]
    if kind == "prior":
        tessellation = cpab.Tessellation(cells, domain)
        return tessellation.velocities(cpab.sample_prior(tessellation, generator=generator))
    velocities = F.pad(torch.randn(cells - 1, generator=generator, dtype=torch.float64) * 0.03 * width, (1, 1))
    middle = cells // 2
    if kind == "zero":
        velocities.zero_()
    elif kind == "zero in a cell":
        velocities[middle : middle + 2] = 0
    elif kind == "a resting knot":
        velocities[middle] = 0
    elif kind == "equal neighbours":
        velocities[middle] = velocities[middle - 1]
    elif kind == "nearly equal neighbours":
        velocities[middle] = velocities[middle - 1] + 1e-6
    elif kind.startswith("fast"):
        velocities[1:-1] = width * (-3 if "left" in kind else 3)
    elif kind == "very rough":
        velocities *= 30
    elif kind == "open ends":
        velocities[0], velocities[-1] = 0.7, -0.4
    return velocities
