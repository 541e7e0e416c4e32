"""Engines that execute a quantized UNet with integers."""
