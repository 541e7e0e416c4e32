"""Placing integers on the real line where more than one range serves a tensor: groups, tokens, and how ranges are searched."""
