"""How closely DiTAC comes to other activations: `python -m ditac_timm.match_table > docs/matching.md`."""

from torch import nn

from .activation import DEFAULT_DOMAINS, DiTAC
from .matching import match

__all__ = ["match_table"]


class QuickGELU(nn.Module):
    """`x sigmoid(1.702 x)`, as in CLIP."""

    def forward(self, x):
        return x * (1.702 * x).sigmoid()


ACTIVATIONS: dict[str, nn.Module] = {
    "GELU": nn.GELU(),
    "tanh-GELU": nn.GELU("tanh"),
    "QuickGELU": QuickGELU(),
    "ReLU": nn.ReLU(),
    "ReLU6": nn.ReLU6(),
    "LeakyReLU": nn.LeakyReLU(),
    "Hardswish": nn.Hardswish(),
    "SiLU": nn.SiLU(),
    "Mish": nn.Mish(),
    "ELU": nn.ELU(),
}

_HEAD = """# How closely each version comes to other activations

Theta fitted by `init="match"`, in each version's default domain, ten cells: root mean square of the difference under a
standard normal input / largest difference over |x| <= 6. Written by `python -m ditac_timm.match_table`.
"""


def match_table() -> str:
    """A table in Markdown, a row an activation and a column a version."""
    versions = list(DEFAULT_DOMAINS)
    lines = [_HEAD, f"| activation | {' | '.join(versions)} |", "| --- |" + " --- |" * len(versions)]
    for name, function in ACTIVATIONS.items():
        fits = [match(function, DiTAC(version)) for version in versions]
        lines.append(f"| {name} | {' | '.join(f'{fit.rms:.1e} / {fit.max:.1e}' for fit in fits)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(match_table())
