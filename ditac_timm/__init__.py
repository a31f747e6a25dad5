"""DiTAC, a trainable activation, for timm."""
