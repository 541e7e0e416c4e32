"""Reconstruction (BRECQ): units of the network learn, one after the other, to return what the float network returns."""
