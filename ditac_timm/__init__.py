"""DiTAC, a trainable activation (ECCV 2024), for any timm model.

Importing this package registers its architectures with timm: `ditac`, for any timm architecture as `base`, and named
variants such as `convnext_small_ditac`.
"""

from . import cpab
from .activation import DiTAC
from .calibration import calibrate
from .ditac_zoo import create_model
from .surgery import SurgeryReport, audit_activations, replace_activations

__all__ = ["DiTAC", "SurgeryReport", "audit_activations", "calibrate", "cpab", "create_model", "replace_activations"]
