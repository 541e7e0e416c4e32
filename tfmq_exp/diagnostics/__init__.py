"""Why a quantized network errs: which features moved, which ranges do not fit, which units matter."""
