"""Seconds and bytes as a person says them."""


def format_duration(seconds: float) -> str:
    """Days and hours, hours and minutes, or minutes and seconds."""
    for unit, smaller, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            whole, rest = divmod(round(seconds / part), size // part)
            return f"{whole} {unit} {rest} {smaller}"
    return f"{seconds:.1f} s"


def format_bytes(count: float) -> str:
    """Gigabytes, or megabytes below one."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
