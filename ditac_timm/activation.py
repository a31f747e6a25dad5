"""DiTAC, the trainable activation, as a module.

Source: Chelly, Finder, Ifergane, Freifeld, "Trainable Highly-expressive Activation Functions", ECCV 2024, and its
supplement, section C (equations 4 to 7).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import cpab, ops
from .frozen import FrozenDiTAC
from .ops import reference

__all__ = ["DiTAC", "FrozenDiTAC"]

DEFAULT_DOMAINS = {"ditac": (-3.0, 3.0), "ge": (0.0, 3.0), "leaky": (-3.0, 3.0), "inf": (-3.0, 3.0)}
INITS = ("identity", "prior")

# Width of a table's bins at most: GELU is then interpolated to within 1e-6. A cell has at least so many of them.
_BIN_WIDTH = 1 / 320
_MIN_BINS_PER_CELL = 64
_MAX_NODES = 1_000_000


class DiTAC(nn.Module):
    """A trainable activation: `T(x) * Phi(x)` on a domain `[a, b]`, GELU outside; T a CPAB diffeomorphism.

    | version | on the domain | outside | default domain |
    | --- | --- | --- | --- |
    | `ditac` (eq. 4) | `T(x) Phi(x)` | `x Phi(x)` | (-3, 3) |
    | `ge` (eq. 5) | `T(x)` on [0, b] | GELU for x < 0, x for x > b | (0, 3) |
    | `leaky` (eq. 6) | `T(x)` | leaky ReLU of slope 0.01 | (-3, 3) |
    | `inf` (eq. 7) | `T(x)` | the flow of the edge cells, affine | (-3, 3) |

    `leaky`, as the paper prints it, jumps at a < 0 by `abs(a) * 0.99`. `inf` reads equation 7's `A x` as the edge
    cells' flow, which joins T smoothly; the literal product would jump.

    The one parameter, `theta`, has `cells - 1` numbers whatever the input: the field's coordinates in the basis of
    `cpab.Tessellation`. It is 1-D, so timm's optimizers give it no weight decay. Values come from a table with linear
    interpolation, the same in training and evaluation.

    Args:
        version: "ditac", "ge", "leaky" or "inf".
        cells: Cells of the tessellation, at least 2.
        domain: `(a, b)`; the version's default where None. `ge`'s begins at 0.
        init: "identity" (theta = 0: T(x) = x, `ditac` is GELU) or "prior" (drawn from `cpab.sample_prior`).
        inplace: Accepted, for timm passes it to activations, and ignored.
        device: Of theta.
        dtype: Of theta; the arithmetic is in float32 at least.

    Shape:
        Any, floating dtype; output of the same shape, dtype and device, strides as `torch.empty_like(x)`.

    Raises:
        ValueError: An argument is not one of those named.
    """

    def __init__(
        self,
        version: str = "ditac",
        cells: int = 10,
        domain: tuple[float, float] | None = None,
        init: str = "identity",
        inplace: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if version not in reference.VERSIONS:
            raise ValueError(f"version must be one of {', '.join(reference.VERSIONS)}, but is {version!r}.")
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, but is {init!r}.")
        self.version = version
        self.init = init
        # What it stands for, where `replace_activations` has put it; not a child, whose weights would be the model's.
        self.__dict__["original"] = None
        self._set_tessellation(cells, DEFAULT_DOMAINS[version] if domain is None else domain)
        self.theta = nn.Parameter(torch.empty(self.tessellation.dim, device=device, dtype=dtype))
        self._start: tuple[float, ...] | None = None
        self.reset_parameters()

    original: Callable[[Tensor], Tensor] | None

    def _set_tessellation(self, cells: int, domain: tuple[float, float]) -> None:
        version = self.version
        self.tessellation = cpab.Tessellation(cells, domain)
        if self.tessellation.dim < 1:
            raise ValueError("cells must be at least 2: a single cell with its ends fixed has nothing to train.")
        if version == "ge" and self.domain[0] != 0:
            raise ValueError(f"the domain of version 'ge' must begin at 0, but is {self.domain}.")
        if version == "leaky" and not self.domain[0] <= 0 <= self.domain[1]:
            raise ValueError(f"the domain of version 'leaky' must contain 0, but is {self.domain}.")
        a, b = self.domain
        self.bins = self.cells * max(math.ceil((b - a) / self.cells / _BIN_WIDTH - 1e-9), _MIN_BINS_PER_CELL)
        if reference.nodes(version, self.domain, self.bins) > _MAX_NODES:
            raise ValueError(
                f"cells={cells} on the domain {self.domain} need a table of more than {_MAX_NODES:,} nodes."
            )

    def set_domain(self, domain: tuple[float, float]) -> None:
        """Change the domain; theta stays, and means the same field in its unit.

        Raises:
            ValueError: The version does not take it.
        """
        before = self.domain
        try:
            self._set_tessellation(self.cells, domain)
        except ValueError:
            self._set_tessellation(self.cells, before)
            raise

    @property
    def cells(self) -> int:
        return self.tessellation.cells

    @property
    def domain(self) -> tuple[float, float]:
        return self.tessellation.domain

    def reset_parameters(self) -> None:
        """Initialise theta as `init` says, or as `start_from` was told."""
        with torch.no_grad():
            if self._start is not None:
                self.theta.copy_(torch.tensor(self._start, dtype=self.theta.dtype, device="cpu"))
            elif self.init == "prior":
                self.theta.copy_(cpab.sample_prior(self.tessellation))
            else:
                self.theta.zero_()

    def start_from(self, theta: Sequence[float]) -> None:
        """Set theta, now and whenever parameters are reset (a model built on the meta device has no values yet)."""
        self._start = tuple(theta)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return ops.activate(x, self.theta, self.tessellation, self.version, self.bins)

    def _table(self, dtype: torch.dtype) -> Tensor:
        velocities = self.tessellation.velocities(self.theta.to(dtype))
        return ops.tabulate(velocities, self.version, self.domain, self.bins)

    def __prepare_scriptable__(self):
        raise RuntimeError("torch.jit.script does not know DiTAC's operators; use torch.compile or torch.export.")

    @torch.no_grad()
    def curve(self, points: int | Tensor = 1001) -> tuple[Tensor, Tensor]:
        """Sample what was learned, by the table.

        Args:
            points: How many, equally spaced over the domain and half its width to either side; or the points
                themselves, any shape.

        Returns:
            x and y, float64 on theta's device, or of the shape, dtype and device of the points given.
        """
        if not isinstance(points, Tensor):
            a, b = self.domain
            reach = (b - a) / 2
            dtype = cpab.internal_dtype(self.theta.device)
            points = torch.linspace(a - reach, b + reach, points, dtype=dtype, device=self.theta.device)
        return points, self(points)

    @torch.no_grad()
    def fuse(self) -> "FrozenDiTAC":
        """This activation with theta fixed, for deployment; `timm.utils.reparameterize_model` fuses a whole model."""
        dtype = torch.float64 if self.theta.dtype == torch.float64 else torch.float32
        table = self._table(dtype)[:2]
        layout = reference.Layout(table, self.version, self.domain, self.bins)
        least = layout.low - layout.width if self.version in ("ditac", "ge") else -math.inf
        return FrozenDiTAC(layout.lines(table).T, layout.low, layout.width, least)

    def extra_repr(self) -> str:
        return f"version={self.version!r}, cells={self.cells}, domain={self.domain}, init={self.init!r}"
