"""Where the scale and zero point of a quantizer come from."""
