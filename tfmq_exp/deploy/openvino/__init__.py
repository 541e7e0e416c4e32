"""OpenVINO: export of a quantized UNet as one graph, and its execution on the CPU."""
