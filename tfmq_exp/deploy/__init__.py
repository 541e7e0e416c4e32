"""From a quantized UNet to one that an integer engine executes."""
